"""Reasoning tasks made on the fly: exact answers, difficulty as a number, a split of train and test by
difficulty.

`Puzzle` is the union of all of them, and the registry: `puzzle_named("khop")` is `KHop()`.
"""

import difflib
from typing import get_args

from open_mythos.data.puzzles.arithmetic import Addition, Assignments, Modular
from open_mythos.data.puzzles.family import Family
from open_mythos.data.puzzles.khop import KHop, PHop
from open_mythos.data.puzzles.logic import Boolean
from open_mythos.data.puzzles.puzzle import (
    Example,
    PuzzleLoader,
    batch_of,
    decode,
    encode,
    examples_of,
    step_targets,
    vocab_size,
)
from open_mythos.data.puzzles.reachability import Reachability
from open_mythos.data.puzzles.sequence import Copy, Parity, States

Puzzle = (
    KHop | PHop | Addition | Modular | Assignments | Boolean | Reachability | Family | Parity | States | Copy
)
PUZZLES: dict[str, type[Puzzle]] = {kind.__name__.lower(): kind for kind in get_args(Puzzle)}


def puzzle_named(name: str) -> Puzzle:
    """The puzzle of this name with its defaults, as in `khop`. Raises `ValueError` for another name."""
    if name.lower() not in PUZZLES:
        close = difflib.get_close_matches(name.lower(), PUZZLES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PUZZLES)}"
        raise ValueError(f"there is no puzzle {name!r}; {hint}")
    return PUZZLES[name.lower()]()


__all__ = [
    "PUZZLES",
    "Addition",
    "Assignments",
    "Boolean",
    "Copy",
    "Example",
    "Family",
    "KHop",
    "Modular",
    "PHop",
    "Parity",
    "Puzzle",
    "PuzzleLoader",
    "Reachability",
    "States",
    "batch_of",
    "decode",
    "encode",
    "examples_of",
    "puzzle_named",
    "step_targets",
    "vocab_size",
]
