"""What holds for every puzzle: its words, its batches, its loader, its split;

and no shortcut past the reasoning.
"""

import json

import pytest
import torch

from open_mythos.config import Config
from open_mythos.data.batch import IGNORED
from open_mythos.data.puzzles import (
    PUZZLES,
    Family,
    KHop,
    PuzzleLoader,
    Reachability,
    batch_of,
    decode,
    encode,
    examples_of,
    puzzle_named,
    step_targets,
    vocab_size,
)
from open_mythos.data.puzzles.shortcut import graph_size, shortcut, word_counts

EACH = pytest.mark.parametrize("name", sorted(PUZZLES))


@EACH
def test_words_config_and_split(name: str) -> None:
    puzzle = puzzle_named(name)
    assert isinstance(puzzle, Config)
    assert puzzle.from_dict(json.loads(json.dumps(puzzle.to_dict()))) == puzzle
    assert max(puzzle.train) < min(puzzle.test)
    assert len({*puzzle.vocabulary()}) == vocab_size(puzzle)
    example = examples_of(puzzle, puzzle.train[-1], 1)[0]
    assert decode(puzzle, encode(puzzle, example.words)) == example.text
    assert example == examples_of(puzzle, puzzle.train[-1], 1)[0]


@EACH
def test_batches_ask_for_answers_alone(name: str) -> None:
    puzzle = puzzle_named(name)
    examples = [examples_of(puzzle, hard, 1)[0] for hard in (*puzzle.train, *puzzle.test)]
    batch = batch_of(puzzle, examples, length=300)
    assert batch.tokens.shape == batch.targets.shape == (len(examples), 300)
    for example, tokens, targets in zip(examples, batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        asked = [i for i in targets if i != IGNORED]
        assert decode(puzzle, asked).split() == list(example.answer)
        first = len(example.question) - 1
        assert targets[first : first + len(asked)] == asked
        assert decode(puzzle, tokens).split() == list(example.words[: len(example.words)])
    longest = max(len(example.words) for example in examples)
    assert batch_of(puzzle, examples).tokens.shape[1] == longest - 1
    with pytest.raises(ValueError, match=f"an example has {longest} words"):
        batch_of(puzzle, examples, length=longest - 2)


@EACH
def test_impossible_difficulties_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the difficulty of"):
        examples_of(puzzle_named(name), -1, 1)


def test_a_loader_goes_on_exactly_with_another_number_of_ranks() -> None:
    def read(count: int, batch: int, world: int, state: dict[str, object] | None) -> tuple[list[str], dict]:
        loaders = [PuzzleLoader(KHop(), batch=batch, rank=rank, world=world) for rank in range(world)]
        for loader in loaders:
            if state:
                loader.load_state_dict(json.loads(json.dumps(state)))
        got: list[str] = []
        while len(got) < count:
            got += [example.text for loader in loaders for example in loader.examples()]
        return got, loaders[0].state_dict()

    whole, _ = read(48, 12, 1, None)
    first, state = read(24, 3, 4, None)
    second, _ = read(24, 6, 2, state)
    assert first + second == whole
    assert len({*whole}) > 40
    with pytest.raises(ValueError, match="seed"):
        PuzzleLoader(KHop(), batch=1, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="puzzle"):
        PuzzleLoader(KHop(entities=9), batch=1).load_state_dict(state)


def test_splits_differ_by_difficulty() -> None:
    puzzle = puzzle_named("parity")
    for split, wanted in (("train", puzzle.train), ("test", puzzle.test)):
        loader = PuzzleLoader(puzzle, batch=200, split=split)  # type: ignore[arg-type]
        assert {len(example.question) - 1 for example in loader.examples()} == {*wanted}
    batch = next(PuzzleLoader(puzzle, batch=4, length=20))
    assert batch.tokens.shape == (4, 20)


@pytest.mark.parametrize("name", ["khop", "phop", "modular", "parity", "states"])
def test_steps_end_in_the_answer(name: str) -> None:
    puzzle = puzzle_named(name)
    examples = [examples_of(puzzle, hard, 1)[0] for hard in puzzle.train]
    targets = step_targets(puzzle, examples)
    for example, hard, row in zip(examples, puzzle.train, targets, strict=True):
        assert int((row != IGNORED).sum()) == hard
        assert torch.equal(row[hard - 1 : hard], torch.tensor(encode(puzzle, example.answer)))


def test_puzzles_without_steps_say_so() -> None:
    with pytest.raises(ValueError, match="Copy has no intermediate answers"):
        step_targets(puzzle_named("copy"), examples_of(puzzle_named("copy"), 2, 1))


@pytest.mark.parametrize(("puzzle", "feature"), [(Reachability(), graph_size), (Family(), word_counts)])
def test_matched_negatives_leave_no_shortcut(puzzle: Reachability | Family, feature) -> None:
    """Guessing without walking gets far in the paper's generators and nowhere in ours (0.06 is 2.4 sigma)."""
    assert shortcut(puzzle.replace(negatives="paper"), feature, 3, 800) > 0.7
    assert abs(shortcut(puzzle, feature, 3, 800) - 0.5) < 0.06


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="did you mean khop"):
        puzzle_named("kkhop")
    with pytest.raises(ValueError, match="there are khop, phop"):
        puzzle_named("zzz")
    with pytest.raises(ValueError, match="has no word 'e99'"):
        encode(KHop(entities=9), ["e99"])
