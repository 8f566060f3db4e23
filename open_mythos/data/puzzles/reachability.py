"""`Reachability`: is there a path from one node to another (Chen 2026, arXiv 2603.21676)? Difficulty is its
length.

`negatives="paper"` is the generator of the paper's code: a negative is an unrelated random graph with a pair
that no path joins. Such a graph is often sparser, its source often has no way out and its target no way in,
so the answer can be guessed without walking (`shortcut.py` measures how well).

`negatives="matched"`, the default, takes that away. Each graph has two paths of exactly the asked length,
from s to d and from r to t, and distractor edges that shorten neither nor join them. The positive asks s ->
d, the negative s -> t, about the very same graph: nothing but walking tells them apart.
"""

from collections import deque
from typing import Literal

import numpy as np

from open_mythos.config import Config
from open_mythos.data.puzzles.puzzle import PAD, Example, check_difficulty

NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Edges = set[tuple[int, int]]


class Reachability(Config):
    """`A > C ; C > F ; B > D ; A ? F = yes`, at most `nodes` nodes."""

    negatives: Literal["matched", "paper"] = "matched"
    nodes: int = 20
    train: tuple[int, ...] = (1, 2, 3, 4)
    test: tuple[int, ...] = (5, 6, 8)

    def __post_init__(self) -> None:
        if not 4 <= self.nodes <= len(NAMES):
            raise ValueError(f"Reachability.nodes should lie in 4..{len(NAMES)}, got {self.nodes}")

    def vocabulary(self) -> tuple[str, ...]:
        return (PAD, "=", ">", ";", "?", "yes", "no", *NAMES)

    def sample(self, rng: np.random.Generator, difficulty: int) -> Example:
        """Raises `ValueError` where the paths do not fit among `nodes`:

        2 * (hops + 1) if matched, else hops + 1.
        """
        paths = 2 if self.negatives == "matched" else 1
        check_difficulty("Reachability", difficulty, most=self.nodes // paths - 1)
        reachable = bool(rng.integers(2))
        if paths == 2:
            edges, source, target = _matched(rng, difficulty, self.nodes, reachable)
        elif reachable:
            edges, source, target = _paper_positive(rng, difficulty, self.nodes)
        else:
            edges, source, target = _paper_negative(rng, self.nodes)
        names = rng.permutation(list(NAMES)).tolist()
        told = rng.permutation(sorted(edges)).tolist() if edges else []
        words = [word for one, two in told for word in (names[one], ">", names[two], ";")]
        return Example((*words, names[source], "?", names[target], "="), ("yes" if reachable else "no",))


def hops_from(edges: Edges, source: int) -> dict[int, int]:
    """Edges on the shortest path to every node that can be reached."""
    ways: dict[int, list[int]] = {}
    for one, two in edges:
        ways.setdefault(one, []).append(two)
    reached, waiting = {source: 0}, deque([source])
    while waiting:
        here = waiting.popleft()
        for near in ways.get(here, ()):
            if near not in reached:
                reached[near] = reached[here] + 1
                waiting.append(near)
    return reached


def _matched(rng: np.random.Generator, hops: int, most: int, reachable: bool) -> tuple[Edges, int, int]:
    needed = 2 * (hops + 1)
    count = int(rng.integers(needed, min(needed + 6, most) + 1))
    one, two = range(hops + 1), range(hops + 1, needed)
    edges = {(a, a + 1) for path in (one, two) for a in path[:-1]}
    for edge in _random_edges(rng, count):
        with_it = edges | {edge}
        if _leads_only(with_it, one, two[-1]) and _leads_only(with_it, two, one[-1]):
            edges = with_it
    source, decoy = (one, two) if rng.random() < 0.5 else (two, one)
    return edges, source[0], (source if reachable else decoy)[-1]


def _leads_only(edges: Edges, path: range, elsewhere: int) -> bool:
    """Whether the shortest way along `path` is still all of it, and none leads to the end of the other."""
    reached = hops_from(edges, path[0])
    return reached[path[-1]] == len(path) - 1 and elsewhere not in reached


def _paper_positive(rng: np.random.Generator, hops: int, most: int) -> tuple[Edges, int, int]:
    least = min(max(hops + 2, 8), most)
    count = int(rng.integers(least, max(least, min(hops + 6, most)) + 1))
    edges = {(a, a + 1) for a in range(hops)}
    for edge in _random_edges(rng, count):
        if hops_from(edges | {edge}, 0)[hops] == hops:
            edges.add(edge)
    return edges, 0, hops


def _paper_negative(rng: np.random.Generator, most: int) -> tuple[Edges, int, int]:
    count = int(rng.integers(min(8, most), min(16, most) + 1))
    edges = set(_random_edges(rng, count))
    reached = [hops_from(edges, a) for a in range(count)]
    pairs = [(a, b) for a in range(count) for b in range(count) if b not in reached[a]]
    if not pairs:  # as the paper: two halves without an edge between them
        half = count // 2
        edges = {(a, b) for a, b in edges if (a < half) == (b < half)}
        pairs = [(a, b) for a in range(half) for b in range(half, count)]
    source, target = pairs[int(rng.integers(len(pairs)))]
    return edges, source, target


def _random_edges(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Between half and twice as many edges as nodes."""
    ends = rng.integers(count, size=(int(rng.integers(count // 2, 2 * count + 1)), 2)).tolist()
    return [(one, two) for one, two in ends if one != two]
