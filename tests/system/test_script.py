"""The training script of the seed README, run as its users run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from open_mythos.train.load import load_recipe, load_run
from open_mythos.train.metrics import read_rows

ROOT = Path(__file__).parents[2]
SHALLOW = "model.loop.schedule.mean=3"


def smoke(out: Path, *overrides: str) -> str:
    script = [sys.executable, str(ROOT / "training" / "3b_fine_web_edu.py"), "--smoke"]
    done = subprocess.run(
        [*script, "--out", str(out), "--device", "cpu", *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_smoke_run_trains_evaluates_samples_and_saves(tmp_path: Path) -> None:
    smoke(tmp_path, SHALLOW)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 < row["loss"] < 7 for row in rows)
    assert rows[-1]["eval_bits_per_byte"] > 0
    assert rows[-1]["sample"]
    assert rows[0]["lr"] == 1 / 2000  # the warmup's first step is not 0
    model, tokenizer = load_run(tmp_path)
    assert tokenizer.vocab_size <= model.config.vocab
    recipe = load_recipe(tmp_path)
    assert (recipe.remat, recipe.micro) == (True, 4)


@pytest.mark.slow
def test_the_smoke_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    for steps in (3, 5):
        smoke(tmp_path, SHALLOW, f"steps={steps}")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
