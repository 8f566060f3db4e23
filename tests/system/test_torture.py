"""Work is never lost: not by a kill at any moment, not by a signal, not by numbers that are not finite."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from open_mythos.train.checkpoint import steps_in
from open_mythos.train.fit import PATIENCE, Every, Metrics, Run
from open_mythos.train.metrics import read_rows
from open_mythos.train.optim import AdamW
from open_mythos.train.step import TrainState
from tests.system import toy


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(steps_in(folder / "checkpoints").popitem()[1] / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert toy.losses(one) == toy.losses(other)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("step-*")}


def wait_for(happened: object, process: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)


@pytest.mark.parametrize("kind", ["text", "stream", "puzzles"])
def test_a_run_in_two_parts_is_the_run_in_one(kind: str, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, kind, steps=6)
    toy.train(recipe, tmp_path / "whole")
    half = Run(recipe, recipe.data.build(), tmp_path / "parts", toy.CPU)
    with pytest.raises(KeyboardInterrupt):
        half.fit(half.begin(), [interrupt(4)])  # after the third checkpoint, in the middle of the fourth step
    assert max(steps_in(tmp_path / "parts" / "checkpoints")) == 3
    toy.train(recipe, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def interrupt(at: int) -> Every:
    def do(state: TrainState, metrics: Metrics) -> None:
        if state.step == at:
            raise KeyboardInterrupt

    return Every(1, do)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_been(kills: int, tmp_path: Path) -> None:
    steps = 10 * kills  # enough that a busy machine, which looks rarely, does not find the run over
    recipe = toy.recipe(tmp_path, steps=steps)
    began = time.monotonic()
    toy.train(recipe, tmp_path / "calm")
    step = (time.monotonic() - began) / steps
    dice, torn, landed, checkpoints = random.Random(kills), 0, 0, tmp_path / "torn" / "checkpoints"
    for number in range(kills):
        process = toy.training(recipe, tmp_path / "torn")
        newest, more = names(checkpoints), dice.randint(1, 3)
        wait_for(lambda newest=newest, more=more: len(names(checkpoints) - newest) >= more, process)
        if number % 2:
            wait_for(lambda: any(checkpoints.glob(".*.draft")), process)
        else:
            time.sleep(dice.uniform(0, step))
        landed += process.is_alive()
        process.kill()
        process.join()
        torn += any(checkpoints.glob(".*.draft"))
    toy.train(recipe, tmp_path / "torn")
    assert landed > kills / 2, "the run was over before it was killed often enough"
    assert torn > 0, "no kill hit a save"
    assert_same_run(tmp_path / "calm", tmp_path / "torn")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_exits_with_its_own_code(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    recipe = toy.recipe(tmp_path, steps=100_000, save_every=100_000)
    recipe.save(tmp_path / "toy.json")
    folder, said = tmp_path / "run", tmp_path / "said"
    common = ["--out", str(folder), "--device", "cpu", "--no-sweep"]
    process = toy.commanding(["train", str(tmp_path / "toy.json"), *common], said)
    log = folder / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(read_rows(log)) > 2, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status, said.read_text()
    (saved,) = steps_in(folder / "checkpoints")
    assert f"Saved at step {saved}. Go on with: mythos train" in said.read_text()
    assert max(toy.losses(folder)) == saved
    process = toy.commanding(["train", "--resume", "--steps", str(saved + 2), *common], said)
    process.join(60)
    assert process.exitcode == 0, said.read_text()
    assert sorted(toy.losses(folder)) == list(range(1, saved + 3))


def poison(at: int) -> Every:
    """What a failing memory does: one weight becomes infinite after update number `at`."""

    def do(state: TrainState, metrics: Metrics) -> None:
        if state.step == at:
            with torch.no_grad():
                state.model.embed.weight[:, 0] = torch.inf

    return Every(1, do)


@pytest.mark.parametrize("at", [5, 6])
def test_updates_that_are_not_finite_are_skipped_counted_and_undone(at: int, tmp_path: Path) -> None:
    """At 6 the infinite weights are in a checkpoint too, so it must go back further than to the last."""
    recipe = toy.recipe(tmp_path, steps=40, save_every=2)
    state = toy.train(recipe, tmp_path / "run", [poison(at)])
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    skipped = [row.get("skipped", 0) for row in rows]
    assert skipped[at : at + PATIENCE] == list(range(1, PATIENCE + 1))
    assert state.step == 40
    assert skipped[-1] == 0
    assert all(p.isfinite().all() for p in state.model.parameters())
    calm = toy.train(recipe, tmp_path / "calm")
    assert state.loader.state_dict() == calm.loader.state_dict()  # going back, it read no batch twice


def test_what_was_long_ago_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_mythos.train.fit.RECOVERED", 6)
    incidents = [poison(at) for at in (5, 25, 45, 65)]
    assert toy.train(toy.recipe(tmp_path, steps=80, save_every=2), tmp_path / "run", incidents).step == 80


def test_a_run_that_stays_not_finite_stops_and_says_what_to_do(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, steps=200, optimiser=AdamW(lr=1e38))
    recipe.save(tmp_path / "toy.json")
    said = tmp_path / "said"
    options = ["--out", str(tmp_path / "run"), "--device", "cpu", "--no-sweep"]
    process = toy.commanding(["train", str(tmp_path / "toy.json"), *options], said)
    process.join(60)
    assert process.exitcode == 2
    assert "not finite 10 times in a row" in said.read_text()
    assert "lower the learning rate" in said.read_text()
