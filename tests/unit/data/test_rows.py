"""Rows: each read once per epoch, by whatever ranks; permutations are permutations; batches line up."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.data.batch import IGNORED, next_token_batch
from open_mythos.data.permute import permuted
from open_mythos.data.rows import RowLoader, Tokens, in_order, tokenize
from open_mythos.data.tokenizer import ByteTokenizer


def count(size: int, pieces: int = 1) -> Tokens:
    """The tokens 0, 1, 2, .., in several arrays."""
    return Tokens(np.array_split(np.arange(size, dtype=np.uint16), pieces), eos=9)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 50))
def test_a_permutation_is_one(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(size), size, (seed, epoch)).tolist()) == list(range(size))


def test_permutations_mix_and_differ() -> None:
    size = 10_000
    order = permuted(np.arange(size), size, (0, 0))
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    for other in ((0, 1), (1, 0)):
        assert (order == permuted(np.arange(size), size, other)).mean() < 0.01
    counts = np.zeros((8, 8))
    for seed in range(800):  # each of 8 places gets each of 8 values equally often
        counts[np.arange(8), permuted(np.arange(8), 8, (seed, 0))] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 110  # chi-squared, 49 degrees of freedom, p < 1e-6


def test_reading_crosses_arrays() -> None:
    tokens = count(100, pieces=7)
    for start in range(0, 90, 3):
        assert tokens.read(start, 10).tolist() == list(range(start, start + 10))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_row_is_read_once_per_epoch_over_all_ranks(world: int) -> None:
    loaders = [RowLoader(count(1000), length=7, batch=3, seed=5, rank=r, world=world) for r in range(world)]
    seen = []
    while len(seen) < 3 * loaders[0].count:
        seen += [row for loader in loaders for row in next(loader).tokens[:, 0].tolist()]
    rows = loaders[0].count
    epochs = [seen[i : i + rows] for i in range(0, len(seen) - rows + 1, rows)]
    assert all(sorted(epoch) == list(range(0, rows * 7, 7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_going_on_is_exact_with_another_number_of_ranks() -> None:
    def read(samples: int, batch: int, world: int, state: dict[str, object] | None) -> tuple[list[int], dict]:
        loaders = [RowLoader(count(500), length=4, batch=batch, rank=r, world=world) for r in range(world)]
        for loader in loaders:
            if state:
                loader.load_state_dict(json.loads(json.dumps(state)))
        got: list[int] = []
        while len(got) < samples:
            got += [row for loader in loaders for row in next(loader).tokens[:, 0].tolist()]
        return got, loaders[-1].state_dict()

    whole, _ = read(192, batch=12, world=1, state=None)
    first, state = read(96, batch=3, world=4, state=None)
    second, state = read(48, batch=6, world=2, state=state)
    third, _ = read(48, batch=12, world=1, state=state)
    assert first + second + third == whole


def test_a_state_of_other_data_is_refused() -> None:
    state = RowLoader(count(500), length=4, batch=2).state_dict()
    with pytest.raises(ValueError, match="seed 0 where this run has 1"):
        RowLoader(count(500), length=4, batch=2, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="rows"):
        RowLoader(count(400), length=4, batch=2).load_state_dict(state)


def test_targets_are_what_follows() -> None:
    batch = next(RowLoader(count(500, 3), length=6, batch=4))
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert batch.tokens.dtype == torch.int64
    assert batch.documents is None


@pytest.mark.parametrize("stride", [None, 1, 3, 7])
def test_each_token_is_a_target_once(stride: int | None) -> None:
    """Also of rows that overlap, and then with at least what they share before it."""
    rows = [row for batch in in_order(count(50), 7, 2, stride=stride) for row in batch.targets]
    asked = [row[row != IGNORED] for row in rows]
    assert torch.cat(asked).tolist() == list(range(1, 50))
    assert all((row[: 7 - (stride or 7)] == IGNORED).all() for row in rows[1:])


def test_documents_end_with_eos_and_ask_nothing_across() -> None:
    batch = next_token_batch(np.array([[5, 9, 6, 7, 9, 9, 8, 4]], np.uint16), eos=9)
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    assert batch.targets.tolist() == [[9, IGNORED, 7, 9, IGNORED, IGNORED, 4]]


def test_tokenize_ends_every_document() -> None:
    tokens = tokenize(["ab", "c", "", "é"], ByteTokenizer(), at_once=2)
    assert tokens.read(0, len(tokens)).tolist() == [97, 98, 256, 99, 256, 256, 0xC3, 0xA9, 256]
    assert tokens.text_bytes == 5


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="too short: 5 tokens make no row of 5"):
        RowLoader(count(5), length=5, batch=1)
    with pytest.raises(ValueError, match=r"rank should lie in 0\.\.1"):
        RowLoader(count(50), length=5, batch=1, rank=2, world=2)
    with pytest.raises(ValueError, match="at least 1 row"):
        RowLoader(count(50), length=5, batch=0)
    with pytest.raises(ValueError, match="held-out text is too short"):
        next(in_order(count(5), length=5, batch=1))
