"""State carried along a sequence.

- `Parity`: is the number of ones odd; difficulty is the length.
- `States`: composing permutations of a few things (the word problem of a symmetric group; with 5 things it is
  complete for NC1, out of reach of a fixed depth: Merrill et al. 2024); difficulty is how many are composed.
- `Copy`: say a sequence again, or backwards; difficulty is the length.
"""

import itertools

import numpy as np

from open_mythos.config import Config
from open_mythos.data.puzzles.khop import letters
from open_mythos.data.puzzles.puzzle import PAD, Example, check_difficulty


class Parity(Config):
    """`1 0 1 1 = 1`."""

    train: tuple[int, ...] = tuple(range(1, 17))
    test: tuple[int, ...] = (20, 24, 32)

    def vocabulary(self) -> tuple[str, ...]:
        return (PAD, "=", "0", "1")

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        check_difficulty("Parity", difficulty)
        bits = rng.integers(2, size=difficulty)
        steps = tuple(str(int(bit)) for bit in bits.cumsum() % 2)
        return Example((*(str(int(bit)) for bit in bits), "="), steps[-1:], steps)


class States(Config):
    """`p132 p213 = p312`: do the first, then the second, and name the outcome.

    `p312` puts the third thing first, the first second, the second third.
    """

    things: int = 3
    train: tuple[int, ...] = tuple(range(1, 9))
    test: tuple[int, ...] = (12, 16, 24)

    def __post_init__(self) -> None:
        if not 2 <= self.things <= 5:
            raise ValueError(f"States.things should lie in 2..5 (5 have 120 arrangements), got {self.things}")

    def vocabulary(self) -> tuple[str, ...]:
        return (PAD, "=", *(_name(order) for order in itertools.permutations(range(self.things))))

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        check_difficulty("States", difficulty)
        moves = [rng.permutation(self.things) for _ in range(difficulty)]
        state, steps = np.arange(self.things), []
        for move in moves:
            state = state[move]
            steps.append(_name(state))
        return Example((*map(_name, moves), "="), tuple(steps[-1:]), tuple(steps))


class Copy(Config):
    """`a c b = a c b ;`, with `reverse` `a c b = b c a ;`."""

    alphabet: int = 8
    reverse: bool = False
    train: tuple[int, ...] = tuple(range(1, 17))
    test: tuple[int, ...] = (20, 24, 32)

    def __post_init__(self) -> None:
        if not 1 <= self.alphabet <= 26:
            raise ValueError(f"Copy.alphabet should lie in 1..26, got {self.alphabet}")

    def vocabulary(self) -> tuple[str, ...]:
        return (PAD, "=", ";", *letters(self.alphabet))

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        check_difficulty("Copy", difficulty)
        words = tuple(letters(self.alphabet)[i] for i in rng.integers(self.alphabet, size=difficulty))
        return Example((*words, "="), (*(reversed(words) if self.reverse else words), ";"))


def _name(order: np.ndarray | tuple[int, ...]) -> str:
    return "p" + "".join(str(int(i) + 1) for i in order)
