import json
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from open_mythos.train import checkpoint
from open_mythos.train.keeper import Keep
from open_mythos.train.optim import MuonAdamW
from open_mythos.train.randomness import random_state
from tests.unit.train.test_roles import Model


def names(run: Path) -> list[int]:
    assert sorted(os.listdir(run)) == [f"step-{step:08d}" for step in checkpoint.steps_in(run)]
    return list(checkpoint.steps_in(run))


@pytest.mark.parametrize("background", [True, False])
def test_a_whole_training_state_comes_back(tmp_path: Path, background: bool) -> None:
    model = Model(tied=True)
    optimizer = MuonAdamW().build(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state()}
    keeper = Keep(background=background).build(tmp_path)
    keeper.save(1, {**state, "data": {"seen": 12, "files": ("a", "b")}})
    keeper.wait()

    back = keeper.load()
    other = Model(tied=True)
    other.load_state_dict(back["model"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert back["model"]["head.weight"] is back["model"]["embed.weight"]
    assert back["data"] == {"seen": 12, "files": ("a", "b")}
    MuonAdamW().build(other).load_state_dict(back["optimizer"])
    assert torch.equal(back["random"]["torch"], state["random"]["torch"])


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    keeper = Keep(last=2, best=1, background=False).build(tmp_path)
    for step, score in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 4.0), (6, None)):
        keeper.save(step, {"x": step}, score=score)
    assert names(tmp_path) == [2, 5, 6]
    assert keeper.best() == checkpoint.step_folder(tmp_path, 2)
    Keep(last=1, best=1, background=False).build(tmp_path).save(7, {"x": 7}, score=0.5)  # scores survive
    assert names(tmp_path) == [7]


def test_background_saves_see_the_state_of_their_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, write = threading.Event(), checkpoint.save

    def held(*arguments: object, **options: object) -> None:
        begin.wait()
        write(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save", held)
    weight = nn.Parameter(torch.ones(4))
    keeper = Keep().build(tmp_path)
    keeper.save(1, {"model": {"w": weight, "tied": weight.detach()}})
    with torch.no_grad():
        weight.fill_(9.0)
    assert names(tmp_path) == []
    begin.set()
    keeper.wait()
    back = keeper.load()["model"]
    assert torch.equal(back["w"], torch.ones(4))
    assert back["w"] is back["tied"]


def test_an_error_in_the_background_surfaces_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keep().build(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        keeper.save(1, {"x": torch.ones(2)})
        with pytest.raises(OSError, match="No space"):
            keeper.wait()
    keeper.wait()
    assert names(tmp_path) == []
    keeper.save(2, {"x": torch.ones(2)})
    keeper.wait()
    assert names(tmp_path) == [2]


def test_loading_passes_over_a_corrupt_newest_one(tmp_path: Path) -> None:
    keeper = Keep(background=False).build(tmp_path)
    for step in (1, 2):
        keeper.save(step, {"x": torch.full((4,), float(step))})
    damaged = checkpoint.step_folder(tmp_path, 2) / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    assert torch.equal(keeper.load()["x"], torch.ones(4))
    with pytest.raises(ValueError, match="SHA-256"):
        keeper.load(checkpoint.step_folder(tmp_path, 2))


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no intact checkpoint"):
        Keep().build(tmp_path).load()
    checkpoint.save(tmp_path / "weights", {"model/w": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="not of a training run"):
        Keep().build(tmp_path).load(tmp_path / "weights")


def test_going_back_discards_the_abandoned_branch(tmp_path: Path) -> None:
    keeper = Keep(last=5).build(tmp_path)
    for step in (1, 2, 3):
        keeper.save(step, {"x": step})
    keeper.discard_after(1)
    assert names(tmp_path) == [1]


def test_a_manifest_without_a_score_is_of_an_unscored_checkpoint(tmp_path: Path) -> None:
    keeper = Keep(last=1, best=1, background=False).build(tmp_path)
    keeper.save(1, {"x": 1}, score=1.0)
    path = checkpoint.step_folder(tmp_path, 1) / "manifest.json"
    for score in ({}, {"score": "good"}):
        manifest = json.loads(path.read_text())
        manifest.pop("score", None)
        path.write_text(json.dumps(manifest | score))
        assert keeper.best() is None


@pytest.mark.parametrize("config", [Keep(last=0), Keep(best=-1)])
def test_keeping_nothing_is_refused(tmp_path: Path, config: Keep) -> None:
    with pytest.raises(ValueError, match="at least the last"):
        config.build(tmp_path)
