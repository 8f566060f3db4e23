"""Trackers get every number under the run's one name, and cannot harm the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from open_mythos.train import track
from open_mythos.train.track import Sink, Tracker

RECIPE = {"is": "Recipe", "steps": 5, "lr": {"is": "Constant"}}


def test_tensorboard_has_the_numbers_and_drops_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `track` is not installed")
    with Tracker("tensorboard", tmp_path, RECIPE) as tracker:
        for step in range(1, 6):
            tracker.log({"step": step, "loss": 1 / step, "sample": "words"})
    with Tracker("tensorboard", tmp_path, RECIPE, step=3) as tracker:
        tracker.log({"step": 4, "loss": 9.0})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "step"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 9.0),
    ]  # fmt: skip


READS = """
import json, sys, trackio
from pathlib import Path
from open_mythos.train.track import Tracker
folder = Path(sys.argv[1])
for step in (0, 2):
    with Tracker("auto", folder, {"steps": 5}, step) as tracker:
        for n in (1, 2):
            tracker.log({"step": step + n, "loss": 1 / (step + n)})
(run,) = trackio.Api().runs("open_mythos")
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("open_mythos", run.name)
print(json.dumps([tracker.kind, run.name, [[row["step"], row["loss"]] for row in rows]]))
"""


def test_trackio_is_used_where_it_is_installed(tmp_path: Path) -> None:
    """In a process of its own, since trackio reads where to write when it is imported."""
    pytest.importorskip("trackio", reason="the extra `track` is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READS, str(tmp_path)],
        env=os.environ
        | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kind, name, rows = json.loads(done.stdout)
    assert kind == "trackio"
    assert name.startswith(tmp_path.name)
    assert rows == [[1, 1.0], [2, 0.5], [3, pytest.approx(1 / 3)], [4, 0.25]]


def test_a_library_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb").mkdir()  # what wandb leaves behind is not wandb
    if track.find_spec("wandb") is None or track.find_spec("wandb").origin is None:
        with pytest.raises(ValueError, match="pip install wandb"):
            Tracker("wandb", tmp_path, RECIPE)
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        Tracker("tensorboard", tmp_path, RECIPE)
    assert Tracker("auto", tmp_path, RECIPE).kind == "none"


@pytest.mark.parametrize("broken", ["open", "log", "close"])
def test_a_tracker_that_fails_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    seen: list[float] = []

    def fail(*_: object) -> None:
        raise RuntimeError("no network")

    def opened(run: track.Described) -> Sink:
        if broken == "open":
            fail()
        return Sink(fail if broken == "log" else lambda x, step: seen.append(x["loss"]), fail)

    monkeypatch.setitem(track.TRACKERS, "tensorboard", opened)
    monkeypatch.setattr(track, "_installed", lambda name: True)
    with pytest.warns(UserWarning, match="does not track this run any more: no network"):
        _track_two_steps(tmp_path)
    assert seen == ([2.0, 1.0] if broken == "close" else [])


def _track_two_steps(folder: Path) -> None:
    with Tracker("tensorboard", folder, RECIPE) as tracker:
        tracker.log({"step": 1, "loss": 2.0})
        tracker.log({"step": 2, "loss": 1.0})
