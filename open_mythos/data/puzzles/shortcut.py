"""How far can one get without reasoning? A measure of shortcuts in a puzzle with few answers.

A guesser sees one cheap feature of the question, remembers the commonest answer for each value of it on half
of the examples, and answers the other half. At chance the feature gives nothing away.

- `graph_size`: how many edges, whether the source has a way out and the target a way in (for `Reachability`).
- `word_counts`: how often each relation was told, and which is proposed (for `Family`).
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from open_mythos.data.puzzles.puzzle import Example, Puzzles, examples_of

Feature = Callable[[tuple[str, ...]], Hashable]


def shortcut(puzzle: Puzzles, feature: Feature, difficulty: int, count: int = 2000, seed: int = 0) -> float:
    """The accuracy in [0, 1] of guessing answers of this difficulty from `feature` alone."""
    examples = examples_of(puzzle, difficulty, count, seed)
    learnt, asked = examples[: count // 2], examples[count // 2 :]
    answers: dict[Hashable, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for example in learnt:
        answers[feature(example.question)][_answer(example)] += 1
        overall[_answer(example)] += 1
    return sum(_guess(answers.get(feature(e.question), overall)) == _answer(e) for e in asked) / len(asked)


def graph_size(question: Sequence[str]) -> Hashable:
    """(edges by fours, ways out of the source up to 2, ways into the target up to 2)."""
    source, target = question[-4], question[-2]
    out = sum(one == source and mark == ">" for one, mark in itertools.pairwise(question))
    into = sum(two == target and mark == ">" for mark, two in itertools.pairwise(question))
    return question.count(">") // 4, min(out, 2), min(into, 2)


def word_counts(question: Sequence[str]) -> Hashable:
    """(parents minus children told, relation proposed): no names, no order."""
    told, asked = question[: question.index("query")], question[question.index("query") :]
    return told.count("parent") - told.count("child"), asked[4]


def _answer(example: Example) -> str:
    return " ".join(example.answer)


def _guess(counted: Counter[str]) -> str:
    return counted.most_common(1)[0][0]
