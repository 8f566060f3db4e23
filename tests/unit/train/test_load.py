"""A run's folder is a place to load a model from, like any other."""

from pathlib import Path

import pytest
import torch

import open_mythos
from open_mythos.cli import main as cli
from open_mythos.hub import load as hub
from open_mythos.train.load import load_run
from tests.system import toy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    toy.train(toy.recipe(place, steps=2), place / "run")
    return place / "run"


def test_from_pretrained_reads_a_run(run: Path) -> None:
    expected = load_run(run)[0].state_dict()
    for name in (run, str(run)):
        lm = open_mythos.from_pretrained(name)
        assert not lm.training
        assert all(torch.equal(tensor, expected[key]) for key, tensor in lm.state_dict().items())
    assert open_mythos.from_pretrained(run, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="is a run, whose model is in its recipe; leave settings="):
        open_mythos.from_pretrained(run, settings={"n_loop": 2})


def test_from_pretrained_reads_what_is_no_run(run: Path, tmp_path: Path) -> None:
    lm = open_mythos.from_pretrained(run)
    open_mythos.save_pretrained(lm, tmp_path / "mine")
    assert open_mythos.from_pretrained(tmp_path / "mine").config == lm.config
    with pytest.raises(ValueError, match=r"a training run; open_mythos\.from_pretrained"):
        hub.from_pretrained(run)


def test_a_checkpoint_of_a_run_names_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = run / "checkpoints" / "step-00000002"
    with pytest.raises(ValueError, match=f"is a checkpoint of the run {run}; .*step=2"):
        open_mythos.from_pretrained(step)
    assert cli.main(["generate", str(step), "--prompt", "a"]) == 2
    assert "or --step 2" in capsys.readouterr().err
