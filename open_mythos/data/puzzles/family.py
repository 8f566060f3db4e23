"""`Family`: composing family relations (Chen 2026, arXiv 2603.21676); difficulty is the number of links.

A chain of people goes some generations up, then some down; relations are named by the generations between the
two ends (`sibling` for none), and the question proposes one.

`negatives="paper"` is the generator of the paper's code: a false relation is 2 or 4 generations off, which
may lie beyond what the chain can span; and since the true one is the number of parents minus that of
children, counting words answers most questions without following the chain (`shortcut.py` measures how well).

`negatives="matched"`, the default, tells two chains with different outcomes and asks about an end of either
with the outcome of either: every count of words is the same for a true and a false question.
"""

import itertools
from typing import Literal

import numpy as np

from open_mythos.config import Config
from open_mythos.data.puzzles.puzzle import PAD, Example, check_difficulty

# fmt: off
PEOPLE = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kai", "Lea", "Max",
    "Nora", "Otto", "Pia", "Quin", "Rosa", "Sam", "Tess", "Uma", "Vera", "Will", "Xena", "Yuri",
    "Zoe", "Abel", "Bea", "Carl", "Dora", "Emil", "Faye", "Gail", "Hugo", "Ines", "Jack",
)
# fmt: on
SPAN = 12
Fact = tuple[str, str, str]


def relation(generations: int) -> str:
    """The name for someone so many generations above (below zero: below): great-grandparent is 3."""
    if generations == 0:
        return "sibling"
    kind, far = ("parent" if generations > 0 else "child"), abs(generations)
    return "great-" * (far - 2) + ("grand" if far > 1 else "") + kind


class Family(Config):
    """`Ada is parent of Ben ; .. ; query : Ada is grandparent of Cleo = yes`."""

    negatives: Literal["matched", "paper"] = "matched"
    train: tuple[int, ...] = (1, 2, 3, 4)
    test: tuple[int, ...] = (5, 6, 7, 8)

    def vocabulary(self) -> tuple[str, ...]:
        relations = (relation(generations) for generations in range(-SPAN, SPAN + 1))
        return (PAD, "=", "is", "of", ";", "query", ":", "yes", "no", *relations, *PEOPLE)

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        check_difficulty("Family", difficulty, most=8)
        people = rng.permutation(list(PEOPLE)).tolist()
        make = _matched if self.negatives == "matched" else _paper
        facts, asked, true = make(rng, difficulty, people)
        told = [word for i in rng.permutation(len(facts)) for word in (*_say(facts[i]), ";")]
        return Example((*told, "query", ":", *_say(asked), "="), ("yes" if true else "no",))


def _say(fact: Fact) -> tuple[str, ...]:
    one, how, other = fact
    return (one, "is", how, "of", other)


def _chain(people: list[str], up: int) -> list[Fact]:
    """The first `up` links lead to a parent, the rest to a child."""
    links = itertools.pairwise(people)
    return [(next_, "parent" if place < up else "child", here) for place, (here, next_) in enumerate(links)]


def _matched(rng: np.random.Generator, links: int, people: list[str]) -> tuple[list[Fact], Fact, bool]:
    ups = rng.permutation(links + 1)[:2].tolist()
    chains = [people[: links + 1], people[links + 1 : 2 * links + 2]]
    facts = [fact for chain, up in zip(chains, ups, strict=True) for fact in _chain(chain, up)]
    asked, proposed = (int(i) for i in rng.integers(2, size=2))
    chain = chains[asked]
    return facts, (chain[-1], relation(2 * ups[proposed] - links), chain[0]), asked == proposed


def _paper(rng: np.random.Generator, links: int, people: list[str]) -> tuple[list[Fact], Fact, bool]:
    up = int(rng.integers(links + 1))
    generations, true = 2 * up - links, bool(rng.integers(2))
    proposed = generations if true else generations + int(rng.choice([-4, -2, 2, 4]))
    facts = _chain(people[: links + 1], up)
    others = iter(people[links + 1 :])
    for _ in range(int(rng.integers(2, 5))):
        facts.append((next(others), relation(int(rng.integers(-1, 2))), next(others)))
    return facts, (people[links], relation(proposed), people[0]), true
