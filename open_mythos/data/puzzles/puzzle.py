"""What every puzzle shares: words, examples, batches, and a loader that needs no data on disk.

A puzzle is a config that can `sample(rng, difficulty)`: it names its `vocabulary` (words in a fixed order,
padding first), the difficulties to `train` on, and those to `test` on, which training never sees. Only
answers are targets:

    tokens   a r1 r2 = x       targets  .  .  .  x  .        (. = -100)

Law: the answer in the text is the one that a solver gets from the text alone (tests/unit/data/puzzles).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from open_mythos.data.batch import IGNORED, Batch
from open_mythos.data.rows import check_same, check_share

PAD = "."  # after the end of an example
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Example:
    """Words, which of them are the answer, and the answer's last word after 1, 2, ..

    steps of reasoning (or none).
    """

    question: tuple[str, ...]
    answer: tuple[str, ...]
    steps: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        return self.question + self.answer

    @property
    def mask(self) -> tuple[bool, ...]:
        """True at the words of the answer."""
        return (False,) * len(self.question) + (True,) * len(self.answer)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@runtime_checkable
class Puzzles(Protocol):
    """The interface of a puzzle. Its config fields `train` and `test` are difficulties."""

    @property
    def train(self) -> tuple[int, ...]: ...

    @property
    def test(self) -> tuple[int, ...]: ...

    def vocabulary(self) -> tuple[str, ...]: ...

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example: ...


@lru_cache(maxsize=64)
def numbers_of(vocabulary: tuple[str, ...]) -> dict[str, int]:
    """Word to id."""
    assert vocabulary[0] == PAD
    assert len(set(vocabulary)) == len(vocabulary), "a word appears twice"
    return {word: i for i, word in enumerate(vocabulary)}


def encode(puzzle: Puzzles, words: Sequence[str]) -> list[int]:
    """The ids of some words. Raises `ValueError` for a word that the puzzle does not know."""
    numbers = numbers_of(puzzle.vocabulary())
    if unknown := [word for word in words if word not in numbers]:
        raise ValueError(f"{type(puzzle).__name__} has no word {unknown[0]!r} among its {len(numbers)} words")
    return [numbers[word] for word in words]


def decode(puzzle: Puzzles, ids: Sequence[int]) -> str:
    """The text of some ids, padding left out."""
    vocabulary = puzzle.vocabulary()
    return " ".join(vocabulary[i] for i in ids if i != 0)


def vocab_size(puzzle: Puzzles) -> int:
    """How many ids the model needs."""
    return len(puzzle.vocabulary())


def batch_of(puzzle: Puzzles, examples: Sequence[Example], length: int | None = None) -> Batch:
    """Examples as one batch, padded on the right to `length` tokens (or the longest); targets only on
    answers.

    Raises `ValueError` if an example is longer than `length`.
    """
    longest = max(len(example.words) for example in examples)
    width = (longest - 1 if length is None else length) + 1
    if longest > width:
        raise ValueError(
            f"an example has {longest} words, which do not fit a length of {length} (+1 to predict)"
        )
    ids = np.zeros((len(examples), width), np.int64)
    asked = np.zeros((len(examples), width), bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.words)] = encode(puzzle, example.words)
        asked[row, : len(example.words)] = example.mask
    targets = np.where(asked, ids, IGNORED)[:, 1:]
    return Batch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets.copy()))


def step_targets(puzzle: Puzzles, examples: Sequence[Example]) -> Int[Tensor, "B N"]:
    """Ids of the intermediate answer after each reasoning step (-100 past the last), for stepwise
    supervision.

    The last word of `steps` is the answer. Raises `ValueError` for puzzles without intermediate answers.
    """
    if not all(example.steps for example in examples):
        raise ValueError(f"{type(puzzle).__name__} has no intermediate answers; supervise its final answer")
    found = np.full((len(examples), max(len(example.steps) for example in examples)), IGNORED, np.int64)
    for row, example in enumerate(examples):
        found[row, : len(example.steps)] = encode(puzzle, example.steps)
    return torch.from_numpy(found)


class PuzzleLoader:
    """Batches of fresh examples without end; difficulties are drawn evenly from the split's.

    Example number i follows from (seed, split, i) alone, so the state is how many examples all ranks have
    seen, and the number of ranks may change. `length` pads every batch alike (one shape for a compiled step).
    """

    def __init__(
        self,
        puzzle: Puzzles,
        *,
        batch: int,
        length: int | None = None,
        split: Split = "train",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        check_share(batch, rank, world)
        self.puzzle, self.batch, self.length, self.seed = puzzle, batch, length, seed
        self.split: Split = split
        self.rank, self.world = rank, world
        self.difficulties = puzzle.train if split == "train" else puzzle.test
        self.seen = 0

    def __iter__(self) -> "PuzzleLoader":
        return self

    def __next__(self) -> Batch:
        return batch_of(self.puzzle, self.examples(), self.length)

    def examples(self) -> list[Example]:
        """The next batch as examples."""
        first = self.seen + self.rank * self.batch
        self.seen += self.batch * self.world
        return [self.example(number) for number in range(first, first + self.batch)]

    def example(self, number: int) -> Example:
        rng = rng_for(self.seed, 0 if self.split == "train" else 1, number)
        return self.puzzle.sample(rng, int(rng.choice(self.difficulties)))

    def state_dict(self) -> dict[str, object]:
        return {"seen": self.seen} | self._identity()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on after `state`. Raises `ValueError` if it is of another puzzle, split or seed."""
        check_same(self._identity(), state)
        self.seen = int(str(state["seen"]))

    def _identity(self) -> dict[str, object]:
        return {"puzzle": repr(self.puzzle), "split": self.split, "seed": self.seed}


def examples_of(puzzle: Puzzles, difficulty: int, count: int, seed: int = 0) -> list[Example]:
    """`count` examples of one difficulty, for tests and tables: the same ones for the same seed."""
    return [
        puzzle.sample(rng_for(seed, 2, max(0, difficulty), number), difficulty) for number in range(count)
    ]


def rng_for(*words: int) -> np.random.Generator:
    """An independent generator for some numbers, as in (seed, example number)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def check_difficulty(name: str, difficulty: int, most: int | None = None, least: int = 1) -> None:
    """Raises `ValueError` for a difficulty that the puzzle, as configured, cannot have."""
    if difficulty < least or (most is not None and difficulty > most):
        above = "" if most is None else f" and at most {most}"
        raise ValueError(f"the difficulty of {name} should be at least {least}{above}, got {difficulty}")
