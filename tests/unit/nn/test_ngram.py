"""N-gram embeddings against tuples looked up by hand, and what they must not reach over."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from open_mythos.nn.context import Context
from open_mythos.nn.ngram import NONE, SPREAD, TURN, HashedNGrams, NGrams, hashed, previous
from tests.zoo import close, words

ROWS, DIM = 13, 6


def by_hand(gram: tuple[int, ...]) -> int:
    mixed = 0
    for token in gram:
        mixed = ((mixed + token - NONE) * SPREAD + TURN) % 2**64
    return (mixed >> 32) % 2**31 % ROWS


def layer(*orders: int) -> HashedNGrams:
    made = NGrams(rows=ROWS, orders=orders).build(DIM)
    for table in made.tables:
        nn.init.normal_(table.weight)
    return made


def looked_up(made: HashedNGrams, line: list[int]) -> Tensor:
    """One token and one order at a time."""
    out = []
    for t in range(len(line)):
        total = torch.zeros(DIM)
        for order, table in zip(made.config.orders, made.tables, strict=True):
            gram = tuple(line[t - lag] if t >= lag else NONE for lag in range(order))
            total = total + table.weight[by_hand(gram)]
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("orders", [(2,), (3,), (2, 4)])
def test_adds_the_rows_of_its_n_grams(orders: tuple[int, ...]) -> None:
    made, tokens = layer(*orders), words(3)
    x = torch.randn(3, 7, DIM)
    expected = x + torch.stack([looked_up(made, row.tolist()) for row in tokens])
    close(made(x, tokens, Context.counting(tokens)), expected)


def test_begins_as_if_there_were_none() -> None:
    tokens, x = words(2), torch.randn(2, 7, DIM)
    assert torch.equal(NGrams(rows=ROWS).build(DIM)(x, tokens, Context.counting(tokens)), x)


def test_does_not_reach_over_a_document() -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])
    ctx = replace(Context.counting(tokens), documents=torch.tensor([[0, 0, 1, 1]]))
    assert [b.tolist() for b in previous(tokens, ctx, 2)] == [[[NONE, 5, NONE, 7]], [[NONE] * 4]]


def test_does_not_reach_into_padding() -> None:
    tokens = torch.tensor([[0, 0, 7, 8], [4, 5, 6, 0]])
    ctx = Context.padded(tokens, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
    one, two = previous(tokens, ctx, 2)
    assert one[0, 2:].tolist() == [NONE, 7]
    assert one[1, :3].tolist() == [NONE, 4, 5]
    assert two[0, 2:].tolist() == [NONE, NONE]
    assert two[1, :3].tolist() == [NONE, NONE, 4]


def test_the_hash_spreads_what_stands_in_other_places() -> None:
    pairs = torch.cartesian_prod(torch.arange(40), torch.arange(40)).T[:, None]
    counts = hashed(pairs, 64).flatten().bincount(minlength=64)
    assert counts.min() > 5  # 25 on the average
    assert counts.max() < 60


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rows": 0}, "at least one row, got rows=0"),
        ({"orders": ()}, "different numbers from 2 on"),
        ({"orders": (1, 2)}, "different numbers from 2 on"),
        ({"orders": (2, 2)}, "different numbers from 2 on"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        NGrams(**options)
