"""`Boolean`: nested formulas (Chen 2026, arXiv 2603.21676, code of the paper); difficulty is the nesting.

Not binds before and, and before or. An atom is a literal (half of them), a negated literal, or an operation
on two literals without brackets, so that precedence matters. A formula of depth d brackets one part of depth
d-1 and one shallower part, in random order, sometimes negated.
"""

import numpy as np

from open_mythos.config import Config
from open_mythos.data.puzzles.puzzle import PAD, Example, check_difficulty

TRIES = 1000


class Boolean(Config):
    """`( T & ! F | F ) = T`.

    `balanced` makes both answers equally likely (the paper's generator does not).
    """

    longest: int = 127
    balanced: bool = True
    train: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    test: tuple[int, ...] = (9, 10, 12, 14)

    def vocabulary(self) -> tuple[str, ...]:
        return (PAD, "=", "T", "F", "&", "|", "!", "(", ")")

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Raises `ValueError` for a depth at which no formula of at most `longest` words is found."""
        check_difficulty("Boolean", difficulty, least=0)
        wanted = bool(rng.integers(2)) if self.balanced else None
        for _ in range(TRIES):
            words = _formula(rng, difficulty)
            value = truth(words)
            if len(words) <= self.longest and wanted in (None, value):
                return Example((*words, "="), ("T" if value else "F",))
        raise ValueError(
            f"no formula of depth {difficulty} has {self.longest} words; make Boolean.longest larger"
        )


def _formula(rng: np.random.Generator, depth: int) -> list[str]:
    if depth == 0:
        return _atom(rng)
    weights = 2.0 ** np.arange(depth - 1, -1, -1)  # shallow partners are likelier
    parts = [_formula(rng, depth - 1), _formula(rng, int(rng.choice(depth, p=weights / weights.sum())))]
    if rng.random() < 0.5:
        parts.reverse()
    words = ["(", *parts[0], "&" if rng.random() < 0.5 else "|", *parts[1], ")"]
    return ["!", *words] if rng.random() < 0.25 else words


def _atom(rng: np.random.Generator) -> list[str]:
    one, two = ("TF"[int(i)] for i in rng.integers(2, size=2))
    kind = rng.random()
    if kind < 0.5:
        return [one]
    return ["!", one] if kind < 0.75 else [one, "&" if rng.random() < 0.5 else "|", two]


def truth(words: list[str]) -> bool:
    """The value of a formula, read by recursive descent."""
    value, end = _any(words, 0)
    assert end == len(words)
    return value


def _any(words: list[str], at: int) -> tuple[bool, int]:
    value, at = _all(words, at)
    while at < len(words) and words[at] == "|":
        right, at = _all(words, at + 1)
        value = value or right
    return value, at


def _all(words: list[str], at: int) -> tuple[bool, int]:
    value, at = _not(words, at)
    while at < len(words) and words[at] == "&":
        right, at = _not(words, at + 1)
        value = value and right
    return value, at


def _not(words: list[str], at: int) -> tuple[bool, int]:
    if words[at] == "!":
        value, at = _not(words, at + 1)
        return not value, at
    if words[at] == "(":
        value, at = _any(words, at + 1)
        return value, at + 1
    return words[at] == "T", at + 1
