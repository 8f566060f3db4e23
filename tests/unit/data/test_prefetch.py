"""Threads change when batches are made, never which, nor the state."""

import json

import numpy as np
import pytest
import torch

from open_mythos.data.batch import Batch, Loader
from open_mythos.data.prefetch import InTurn, Prefetch
from open_mythos.data.rows import RowLoader, Tokens


def rows(rank: int = 0, world: int = 1) -> RowLoader:
    return RowLoader(Tokens([np.arange(300, dtype=np.uint16)], 0), length=3, batch=2, rank=rank, world=world)


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.tokens, b.tokens) for a, b in zip(ours, theirs, strict=True)
    )


def take(loader: Loader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def test_the_state_is_that_of_what_was_consumed() -> None:
    plain, threaded = rows(), Prefetch(rows(), ahead=8)
    for _ in range(20):
        assert same(take(plain, 1), take(threaded, 1))
        assert threaded.state_dict() == plain.state_dict()
    threaded.close()


def test_going_on_is_exact() -> None:
    threaded = Prefetch(rows(), ahead=8)
    take(threaded, 7)
    state = json.loads(json.dumps(threaded.state_dict()))
    expected = take(threaded, 5)
    threaded.load_state_dict(state)  # rewinds a loader that has run ahead
    assert same(take(threaded, 5), expected)
    fresh = Prefetch(rows())
    fresh.load_state_dict(state)
    assert same(take(fresh, 5), expected)
    threaded.close()
    fresh.close()


def test_an_error_in_the_thread_is_raised_where_batches_are_taken() -> None:
    class Failing(RowLoader):
        def __next__(self) -> Batch:
            if self.seen >= 6:
                raise ValueError("row 6 is broken")
            return super().__next__()

    threaded = Prefetch(Failing(Tokens([np.arange(300, dtype=np.uint16)], 0), length=3, batch=2))
    take(threaded, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="row 6 is broken"):
            next(threaded)
    threaded.close()


def test_loaders_in_turn() -> None:
    def workers() -> InTurn:
        return InTurn([Prefetch(rows(worker, 2)) for worker in range(2)])

    loader = workers()
    assert same(take(loader, 10), take(rows(), 10))  # two workers as two ranks read what one reads
    take(loader, 3)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = take(loader, 6)
    again = workers()
    again.load_state_dict(state)
    assert same(take(again, 6), expected)
    with pytest.raises(ValueError, match="not of 1 workers"):
        InTurn([rows()]).load_state_dict(state)
    for worker in (*loader.loaders, *again.loaders):
        assert isinstance(worker, Prefetch)
        worker.close()
