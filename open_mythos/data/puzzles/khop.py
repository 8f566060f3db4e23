"""Composition of memorised facts, and following pointers in the text.

- `KHop` (Kohli et al. 2026, arXiv 2604.07822): start at an entity, follow k relations, name the entity
  reached. Each relation is a fixed random permutation of the entities; the facts are never in the text, they
  must be learnt.
- `PHop` (Saunshi et al. 2025, arXiv 2502.17416): from the last symbol, p times: find its previous occurrence,
  step to the symbol after it. Everything needed is in the text; nothing is memorised.
"""

from functools import lru_cache
from typing import Literal

import numpy as np

from open_mythos.config import Config
from open_mythos.data.puzzles.puzzle import PAD, Example, check_difficulty, rng_for

TRIES = 1000


class KHop(Config):
    """`e7 r2 r0 = e31`; difficulty is the number of hops, of which one is a bare fact.

    The facts follow from `facts`. A fraction `isolated` of them never appears inside a composition of two
    hops or more (Wang et al. 2024, "systematicity"): with `compose="isolated"` the same world is asked for
    compositions of those alone.
    """

    entities: int = 200
    relations: int = 10
    facts: int = 0
    isolated: float = 0.0
    compose: Literal["seen", "isolated"] = "seen"
    train: tuple[int, ...] = (1, 2, 3, 4, 5)
    test: tuple[int, ...] = (6, 7, 8, 9, 10)

    def __post_init__(self) -> None:
        if self.entities < 2 or self.relations < 1:
            raise ValueError(
                f"KHop needs 2 entities and 1 relation, got {self.entities} and {self.relations}"
            )
        if not 0 <= self.isolated < 1 or (self.compose == "isolated" and not self.isolated):
            raise ValueError(
                f"KHop.isolated should lie in [0, 1), above 0 to compose isolated facts; got {self.isolated}"
            )

    def vocabulary(self) -> tuple[str, ...]:
        entities, relations = (
            (f"e{i}" for i in range(self.entities)),
            (f"r{i}" for i in range(self.relations)),
        )
        return (PAD, "=", *entities, *relations)

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        check_difficulty("KHop", difficulty)
        table, apart = world_of(self.entities, self.relations, self.facts, self.isolated)
        for _ in range(TRIES):
            path, relations = self._walk(rng, table, difficulty)
            wanted = apart[relations, path[:-1]] == (self.compose == "isolated")
            if difficulty == 1 or wanted.all():
                question = (f"e{path[0]}", *(f"r{r}" for r in relations), "=")
                return Example(question, (f"e{path[-1]}",), tuple(f"e{e}" for e in path[1:]))
        raise ValueError(
            f"no {difficulty}-hop composition of {self.compose} facts found; change KHop.isolated"
        )

    def _walk(self, rng: np.random.Generator, table: np.ndarray, hops: int) -> tuple[list[int], np.ndarray]:
        relations = rng.integers(self.relations, size=hops)
        path = [int(rng.integers(self.entities))]
        for relation in relations:
            path.append(int(table[relation, path[-1]]))
        return path, relations


@lru_cache(maxsize=8)
def world_of(entities: int, relations: int, facts: int, isolated: float) -> tuple[np.ndarray, np.ndarray]:
    """Where each relation leads from each entity, and which facts are isolated: (relations, entities)."""
    rng = rng_for(facts)
    table = np.stack([rng.permutation(entities) for _ in range(relations)])
    return table, rng.random(table.shape) < isolated


class PHop(Config):
    """`hops 3 : a b d a .. c = d`; difficulty is the number of hops.

    Symbols are drawn evenly, so chance is 1 in `alphabet`. `length` symbols must hold all the hops: each goes
    back about `alphabet` places.
    """

    alphabet: int = 4
    length: int = 256
    train: tuple[int, ...] = (1, 2, 4, 8, 16)
    test: tuple[int, ...] = (24, 32)

    def __post_init__(self) -> None:
        if not 2 <= self.alphabet <= 26 or self.length < 2:
            raise ValueError(
                f"PHop needs 2..26 symbols and a length of 2, got {self.alphabet} and {self.length}"
            )

    def vocabulary(self) -> tuple[str, ...]:
        return (PAD, "=", ":", "hops", *"0123456789", *letters(self.alphabet))

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        check_difficulty("PHop", difficulty)
        for _ in range(TRIES):
            symbols = rng.integers(self.alphabet, size=self.length)
            visited = follow(symbols.tolist(), difficulty)
            if len(visited) == difficulty:
                names = letters(self.alphabet)
                question = ("hops", *str(difficulty), ":", *(names[s] for s in symbols), "=")
                steps = tuple(names[symbols[place]] for place in visited)
                return Example(question, steps[-1:], steps)
        raise ValueError(f"{difficulty} hops do not fit in {self.length} symbols; make PHop.length larger")


def follow(symbols: list[int], hops: int) -> list[int]:
    """The places reached, one per hop, ending early where a symbol did not occur before."""
    previous: dict[int, int] = {}
    back = []
    for place, symbol in enumerate(symbols):
        back.append(previous.get(symbol, -1))
        previous[symbol] = place
    place = len(symbols) - 1
    visited: list[int] = []
    while len(visited) < hops and back[place] >= 0:
        place = back[place] + 1
        visited.append(place)
    return visited


def letters(count: int) -> str:
    """The first `count` letters of the alphabet."""
    return "abcdefghijklmnopqrstuvwxyz"[:count]
