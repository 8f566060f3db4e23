"""The answer of every puzzle, found a second time from the printed text alone."""

import itertools
from collections.abc import Callable

import pytest

from open_mythos.data.puzzles import PUZZLES, Example, Puzzle, examples_of, puzzle_named
from open_mythos.data.puzzles.family import relation
from open_mythos.data.puzzles.khop import KHop
from open_mythos.data.puzzles.reachability import Reachability


def solve_phop(text: str) -> str:
    hops, symbols = text.removeprefix("hops ").removesuffix(" =").split(" : ")
    line, place = symbols.split(), len(symbols.split()) - 1
    for _ in range(int(hops.replace(" ", ""))):
        place = max(earlier for earlier in range(place) if line[earlier] == line[place]) + 1
    return line[place]


def solve_addition(text: str) -> str:
    numbers = text.removesuffix(" =").replace(" ", "").split("+")
    return " ".join(str(sum(int(number) for number in numbers))) + " ;"


def solve_modular(text: str) -> str:
    words = text.removesuffix(" =").split()
    bracketed = "(" * (len(words) // 2) + words[0]
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        bracketed += f" {sign} {number})"
    return str(eval(bracketed) % 7)


def solve_assignments(text: str) -> str:
    *equations, question = text.split(" ; ")
    sides = dict(equation.split(" = ") for equation in equations)

    def value(name: str) -> int:
        return int(name) if name.isdigit() else eval(" ".join(wrap(word) for word in sides[name].split()))

    def wrap(word: str) -> str:
        return word if word in "+-*" else f"({value(word)})"

    return str(value(question.split()[0]) % 7)


def solve_boolean(text: str) -> str:
    python = {"T": "True", "F": "False", "&": "and", "|": "or", "!": "not"}
    return "FT"[eval(" ".join(python.get(word, word) for word in text.removesuffix(" =").split()))]


def paths(text: str) -> tuple[set[tuple[str, str]], str, str]:
    *told, question = text.removesuffix(" =").split(" ; ")
    source, target = question.split(" ? ")
    return {tuple(edge.split(" > ")) for edge in told}, source, target  # type: ignore[misc]


def solve_reachability(text: str) -> str:
    edges, source, target = paths(text)
    reached = {source}
    for _ in range(26):
        reached |= {two for one, two in edges if one in reached}
    return "yes" if target in reached else "no"


def solve_family(text: str) -> str:
    told, asked = text.removesuffix(" =").split(" ; query : ")
    up: dict[tuple[str, str], int] = {}
    for fact in told.split(" ; "):
        one, how, other = fact.replace(" is ", " ").replace(" of ", " ").split()
        step = {"parent": 1, "child": -1, "sibling": 0}[how]
        up |= {(other, one): step, (one, other): -step}
    one, how, other = asked.replace(" is ", " ").replace(" of ", " ").split()
    height, waiting = {other: 0}, [other]
    while waiting:
        here = waiting.pop()
        for (start, end), step in up.items():
            if start == here and end not in height:
                height[end] = height[here] + step
                waiting.append(end)
    return "yes" if one in height and relation(height[one]) == how else "no"


def solve_states(text: str) -> str:
    things = list("123")
    for move in text.removesuffix(" =").split():
        things = [things[int(place) - 1] for place in move[1:]]
    return "p" + "".join(things)


SOLVERS: dict[str, Callable[[str], str]] = {
    "phop": solve_phop,
    "addition": solve_addition,
    "modular": solve_modular,
    "assignments": solve_assignments,
    "boolean": solve_boolean,
    "reachability": solve_reachability,
    "family": solve_family,
    "parity": lambda text: str(text.count("1") % 2),
    "states": solve_states,
    "copy": lambda text: text.replace("=", ";"),
}


def some(puzzle: Puzzle, count: int = 12) -> list[Example]:
    return [example for hard in (*puzzle.train, *puzzle.test) for example in examples_of(puzzle, hard, count)]


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_the_text_alone_gives_the_answer(name: str) -> None:
    examples = some(puzzle_named(name))
    for example in examples:
        assert SOLVERS[name](" ".join(example.question)) == " ".join(example.answer), example.text
    assert len({example.answer for example in examples}) > 1


def test_every_puzzle_is_solved_here() -> None:
    assert {*SOLVERS, "khop"} == {*PUZZLES}  # khop's facts are not in its text


def test_variants_are_solved_too() -> None:
    for example in some(puzzle_named("copy").override("reverse=true")):
        assert example.answer == (*reversed(example.question[:-1]), ";")
    for example in some(puzzle_named("addition").override("reverse=true")):
        assert solve_addition(" ".join(example.question)).split()[:-1] == list(example.answer[-2::-1])
    for name in ("reachability", "family"):
        for example in some(puzzle_named(name).override("negatives=paper")):
            assert SOLVERS[name](" ".join(example.question)) == example.answer[0], example.text
    assert {len(e.answer[0]) for e in some(puzzle_named("states").override("things=5"))} == {6}


def test_khop_is_composed_of_its_one_hop_facts() -> None:
    puzzle = KHop(entities=7, relations=3)
    facts = {e.question[:2]: e.answer[0] for e in examples_of(puzzle, 1, 500)}
    assert len(facts) == 21
    for relation_ in {r for _, r in facts}:  # each relation is a permutation
        assert len({end for (_, r), end in facts.items() if r == relation_}) == 7
    for example in some(puzzle):
        here, *relations = example.question[:-1]
        for hop, name in enumerate(relations):
            here = facts[here, name]
            assert example.steps[hop] == here
        assert example.answer == (here,)
    assert facts != {
        e.question[:2]: e.answer[0] for e in examples_of(KHop(entities=7, relations=3, facts=1), 1, 500)
    }


def test_isolated_facts_stay_out_of_compositions() -> None:
    seen = KHop(entities=10, relations=4, isolated=0.3)
    unseen = seen.replace(compose="isolated")

    def composed(puzzle: KHop) -> set[tuple[str, str]]:
        return {
            (start, name)
            for e in examples_of(puzzle, 2, 200)
            for start, name in zip((e.question[0], *e.steps), e.question[1:-1], strict=False)
        }

    assert composed(seen)
    assert composed(unseen)
    assert not composed(seen) & composed(unseen)
    assert len({e.question for e in examples_of(seen, 1, 400)}) == 40  # all are learnt as bare facts


@pytest.mark.parametrize("negatives", ["matched", "paper"])
def test_a_yes_of_reachability_is_as_far_as_asked(negatives: str) -> None:
    puzzle = Reachability().override(f"negatives={negatives}")
    for hops, one in [(far, example) for far in (1, 3, 6) for example in examples_of(puzzle, far, 12)]:
        edges, source, target = paths(" ".join(one.question))
        reached, far = {source}, 0
        while one.answer == ("yes",) and target not in reached:
            reached |= {two for start, two in edges if start in reached}
            far += 1
        assert far == (hops if one.answer == ("yes",) else 0)


def test_assignments_need_as_many_equations_as_asked() -> None:
    for depth in (1, 3, 6):
        for example in examples_of(puzzle_named("assignments"), depth, 20):
            *equations, question = " ".join(example.question).split(" ; ")
            sides = dict(equation.split(" = ") for equation in equations)

            def height(name: str, sides: dict[str, str] = sides) -> int:
                below = [word for word in sides[name].split() if word in sides]
                return 1 + max(map(height, below)) if below else 0

            assert height(question.split()[0]) == depth


def test_booleans_nest_as_deep_as_asked() -> None:
    for depth in (0, 1, 4, 9):
        for example in examples_of(puzzle_named("boolean"), depth, 20):
            nesting = itertools.accumulate({"(": 1, ")": -1}.get(word, 0) for word in example.question)
            assert max(nesting) == depth
