"""Arithmetic with exact answers.

- `Addition`: n numbers of d digits (Saunshi et al. 2025, sec. 3); difficulty is n.
- `Modular`: a chain of +, - and * modulo a prime, from left to right; difficulty is the number of operations.
- `Assignments`: i-GSM-like (Ye et al. 2024, symbolic as in Saunshi et al. 2025): equations modulo 7 in any
  order; difficulty is the length of the longest chain of equations that the asked variable depends on.
"""

import numpy as np

from open_mythos.config import Config
from open_mythos.data.puzzles.khop import letters
from open_mythos.data.puzzles.puzzle import PAD, Example, check_difficulty

DIGITS = tuple("0123456789")
END = ";"
SIGNS = "+-*"


class Addition(Config):
    """`1 2 3 + 0 4 5 = 1 6 8 ;`, the end mark being part of the answer.

    `reverse` writes the sum last digit first.
    """

    digits: int = 3
    reverse: bool = False
    train: tuple[int, ...] = (2, 4, 8, 16)
    test: tuple[int, ...] = (24, 32)

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ValueError(f"Addition needs numbers of at least 1 digit, got {self.digits}")

    def vocabulary(self) -> tuple[str, ...]:
        return (PAD, "=", "+", END, *DIGITS)

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        check_difficulty("Addition", difficulty, least=2)
        digits = rng.integers(10, size=(difficulty, self.digits)).tolist()
        numbers = ["".join(map(str, number)) for number in digits]
        total = str(sum(map(int, numbers)))
        question = " + ".join(" ".join(number) for number in numbers).split()
        return Example((*question, "="), (*(reversed(total) if self.reverse else total), END))


class Modular(Config):
    """`3 * 5 + 6 - 2 = 5`, each operation applied to what came so far, modulo `modulus`."""

    modulus: int = 7
    train: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    test: tuple[int, ...] = (8, 10, 12, 16)

    def __post_init__(self) -> None:
        if self.modulus < 2:
            raise ValueError(f"Modular.modulus should be at least 2, got {self.modulus}")

    def vocabulary(self) -> tuple[str, ...]:
        return (PAD, "=", "+", "-", "*", *map(str, range(self.modulus)))

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        check_difficulty("Modular", difficulty)
        value, *operands = rng.integers(self.modulus, size=difficulty + 1).tolist()
        words, steps = [str(value)], []
        for drawn in operands:
            sign = SIGNS[int(rng.integers(3))]
            # a factor of 0 would forget all that came before
            operand = int(rng.integers(1, self.modulus)) if sign == "*" else drawn
            value = _apply(sign, value, operand, self.modulus)
            words += [sign, str(operand)]
            steps.append(str(value))
        return Example((*words, "="), (str(value),), tuple(steps))


class Assignments(Config):
    """`c = a + b ; a = 3 ; b = a * a ; c ? 5`: the equations in any order, then the variable asked for.

    `variables` equations, among them distractors that the answer does not need. `shuffled=False` defines
    before use.
    """

    variables: int = 12
    modulus: int = 7
    shuffled: bool = True
    train: tuple[int, ...] = (1, 2, 3, 4)
    test: tuple[int, ...] = (5, 6, 8)

    def __post_init__(self) -> None:
        if not 2 <= self.variables <= 26 or self.modulus < 2:
            raise ValueError(
                f"Assignments needs 2..26 variables and a modulus of 2 or more, got {self.variables}, "
                f"{self.modulus}"
            )

    def vocabulary(self) -> tuple[str, ...]:
        return (PAD, "=", "+", "-", "*", END, "?", *map(str, range(self.modulus)), *letters(self.variables))

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        check_difficulty("Assignments", difficulty, most=self.variables - 1)
        names = [letters(self.variables)[i] for i in rng.permutation(self.variables)]
        levels = _levels(rng, difficulty, self.variables)
        values: list[int] = []
        equations = []
        for place, level in enumerate(levels):
            words, value = self._equation(rng, level, levels[:place], names, values)
            equations.append((names[place], "=", *words, END))
            values.append(value)
        asked = int(rng.choice([place for place, level in enumerate(levels) if level == difficulty]))
        order = rng.permutation(self.variables) if self.shuffled else range(self.variables)
        told = tuple(word for place in order for word in equations[place])
        return Example((*told, names[asked], "?"), (str(values[asked]),))

    def _equation(
        self, rng: np.random.Generator, level: int, below: list[int], names: list[str], values: list[int]
    ) -> tuple[tuple[str, ...], int]:
        """The right-hand side of a variable of this level, over variables defined before it."""
        if level == 0:
            value = int(rng.integers(self.modulus))
            return (str(value),), value
        near = int(rng.choice([place for place, other in enumerate(below) if other == level - 1]))
        other = int(rng.choice([place for place, lower in enumerate(below) if lower < level]))
        one, two = (near, other) if rng.random() < 0.5 else (other, near)
        sign = SIGNS[int(rng.integers(3))]
        return (names[one], sign, names[two]), _apply(sign, values[one], values[two], self.modulus)


def _apply(sign: str, left: int, right: int, modulus: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[sign] % modulus


def _levels(rng: np.random.Generator, deepest: int, variables: int) -> list[int]:
    """How deep each variable is, in an order in which each can be defined: 0..deepest, and others between."""
    extra = rng.integers(deepest + 1, size=variables - deepest - 1).tolist()
    return sorted([*range(deepest + 1), *extra])
