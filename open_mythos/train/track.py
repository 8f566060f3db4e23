"""Where a run can be watched besides its own metrics.jsonl, which is always written.

    trackio      a database for all runs of this machine, no account; look with `trackio show`
    wandb        Weights & Biases, which asks for an account unless WANDB_MODE=offline
    tensorboard  event files in the run's folder; look with `tensorboard --logdir runs`

A tracker is a guest of the run: what goes wrong in it is said once, and the run goes on without it.
"""

import contextlib
import io
import json
import secrets
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from open_mythos.whole import write_whole

Kind = Literal["auto", "none", "trackio", "wandb", "tensorboard"]  # auto: trackio where it is installed

PROJECT = "open_mythos"


class Described(NamedTuple):
    """What a tracker is told of the run. `step` is where it goes on, zero where it begins."""

    folder: Path
    name: str
    recipe: dict[str, Any]
    step: int


class Sink(NamedTuple):
    log: Callable[[dict[str, float], int], object]
    close: Callable[[], object]


class Tracker:
    """Hands the numbers of each step to a library, if there is one.

    Raises `ValueError` if a library was named and is not installed.
    """

    def __init__(self, kind: Kind, folder: Path, recipe: dict[str, Any], step: int = 0) -> None:
        require(kind)
        self.kind = kind if kind != "auto" else "trackio" if _installed("trackio") else "none"
        self._sink: Sink | None = None
        if self.kind != "none":
            self._safely(lambda: self._open(Described(folder, _name(folder, step), recipe, step)))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """The numbers among `metrics`, which name their `step`."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        if self._sink is not None:
            sink = self._sink
            self._safely(lambda: sink.log(numbers, int(metrics["step"])))

    def close(self) -> None:
        if self._sink is not None:
            self._safely(self._sink.close)
        self._sink = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, run: Described) -> None:
        self._sink = TRACKERS[self.kind](run)

    def _safely(self, do: Callable[[], object]) -> None:
        """Do it without a word on standard output; after an error never again."""
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                do()
        except Exception as error:
            self._sink = None
            warnings.warn(f"{self.kind} does not track this run any more: {error}", stacklevel=3)


def require(kind: Kind) -> None:
    """Raise `ValueError` if the library is not installed."""
    if kind not in ("auto", "none") and not _installed(kind):
        raise ValueError(f"tracking with {kind} needs its package, which is not here: pip install {kind}")


def _trackio(run: Described) -> Sink:
    import trackio

    tracked = trackio.init(project=PROJECT, name=run.name, config=run.recipe, resume="allow", embed=False)
    return Sink(tracked.log, trackio.finish)


def _wandb(run: Described) -> Sink:
    import wandb

    tracked = wandb.init(
        project=PROJECT, id=run.name, name=run.name, config=run.recipe, resume="allow", dir=run.folder
    )
    return Sink(lambda numbers, step: tracked.log(numbers, step=step), tracked.finish)


def _tensorboard(run: Described) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    purge = run.step + 1 if run.step else None
    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
    if not run.step:
        writer.add_text("recipe", f"```\n{json.dumps(run.recipe, indent=1)}\n```")

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Sink(log, writer.close)


def _name(folder: Path, step: int) -> str:
    """One name for a run, however often it is resumed, and another for what replaces it in its folder."""
    path = folder / "track.json"
    if step and path.is_file():
        return str(json.loads(path.read_text())["name"])
    name = f"{folder.resolve().name}-{secrets.token_hex(3)}"
    write_whole(path, json.dumps({"name": name}) + "\n")
    return name


def _installed(package: str) -> bool:
    """A folder of that name, as wandb leaves behind, is not a package."""
    found = find_spec(package)
    return found is not None and found.origin is not None


TRACKERS: dict[str, Callable[[Described], Sink]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
