"""Several puzzles as one: a shared vocabulary, and difficulties that also say which puzzle.

Difficulty n of a mixture is entry n of `pairs()`; training draws evenly from the entries of `train`. It is
itself a puzzle, so loaders, tables and tokenizers take it as they take one.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from open_mythos.config import Config
from open_mythos.data.puzzles import Puzzle
from open_mythos.data.puzzles.puzzle import PAD, Example, numbers_of
from open_mythos.data.tokenizer import CoreTokenizer

Pair = tuple[int, int]  # which puzzle, at what difficulty of its own


class Mixture(Config):
    """Raises `ValueError` for a mixture of nothing."""

    puzzles: tuple[Puzzle, ...]

    def __post_init__(self) -> None:
        if not self.puzzles:
            raise ValueError('a mixture needs at least one puzzle, as in puzzles=[{"is": "KHop"}]')

    @property
    def train(self) -> tuple[int, ...]:
        """Entries of `pairs()` to train on."""
        return tuple(range(sum(len(puzzle.train) for puzzle in self.puzzles)))

    @property
    def test(self) -> tuple[int, ...]:
        """Entries that training never sees."""
        return tuple(range(len(self.train), len(self.pairs())))

    def pairs(self) -> tuple[Pair, ...]:
        """All (puzzle, difficulty): first those of training, then those of the test."""
        train = [(i, n) for i, puzzle in enumerate(self.puzzles) for n in puzzle.train]
        test = [(i, n) for i, puzzle in enumerate(self.puzzles) for n in puzzle.test]
        return (*train, *test)

    def vocabulary(self) -> tuple[str, ...]:
        return _joint(self.puzzles)

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        which, its_own = self.pairs()[difficulty]
        return self.puzzles[which].sample(rng, its_own)


class WordTokenizer(CoreTokenizer):
    """The words of a puzzle as a tokenizer: ids as in its batches, padding ends a text."""

    def __init__(self, vocabulary: tuple[str, ...]) -> None:
        core = tokenizers.Tokenizer(models.WordLevel(dict(numbers_of(vocabulary)), unk_token=PAD))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        super().__init__(core, eos=PAD)


@lru_cache(maxsize=64)
def _joint(puzzles: tuple[Any, ...]) -> tuple[str, ...]:
    """Each word once, in the order of first use; padding is everybody's first word."""
    return tuple(dict.fromkeys(word for puzzle in puzzles for word in puzzle.vocabulary()))
