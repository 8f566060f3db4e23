"""Keeps a run's checkpoints: saves in the background, and holds on to the last few and the best few."""

from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from open_mythos.config import Config
from open_mythos.train import checkpoint
from open_mythos.train.nested import flatten, unflatten


class Keep(Config):
    """How many checkpoints stay: the newest `last`, and the `best` by score (lower is better)."""

    last: int = 3
    best: int = 1
    background: bool = True

    def build(self, run: Path, tidy: bool = True) -> "Keeper":
        """`tidy` clears up after a killed process: for one keeper of a folder only."""
        return Keeper(self, run, tidy)


class Keeper:
    """One writer for the checkpoints of a run, `run/step-00000001` and so on.

    Raises `ValueError` if it would keep none.
    """

    def __init__(self, config: Keep, run: Path, tidy: bool = True) -> None:
        if config.last < 1 or config.best < 0:
            raise ValueError(
                f"keep at least the last checkpoint, got last={config.last} and best={config.best}"
            )
        self.config, self.run = config, run
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        run.mkdir(parents=True, exist_ok=True)
        if tidy:
            checkpoint.recover(run)

    def save(self, step: int, state: Mapping[str, Any], *, score: float | None = None) -> None:
        """Save nested state. In the background only the copy to the CPU is waited for.

        Raises the error of the previous save if that failed, then its own.
        """
        self.wait()
        tensors, meta = flatten(dict(state))
        if not self.config.background:
            self._write(step, tensors, {"step": step, "state": meta}, score)
            return
        arguments = (step, _snapshot(tensors), {"step": step, "state": meta}, score)
        # not a daemon: an interpreter that exits waits for the save to end
        self._thread = Thread(target=self._write_quietly, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written. Raises what went wrong in the background, once."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def load(self, folder: Path | None = None, passing: int = 0) -> dict[str, Any]:
        """The state saved in `folder`, or else in the newest checkpoint that is intact.

        `passing` goes by that many of the newest ones, as far as there are older.

        Raises `ValueError` if there is none, and says why each candidate was refused.
        """
        if folder is not None:
            return read_state(folder)
        refused: list[str] = []
        candidates = list(reversed(checkpoint.steps_in(self.run).values()))
        for candidate in candidates[max(0, min(passing, len(candidates) - 1)) :]:
            try:
                return read_state(candidate)
            except ValueError as error:
                refused.append(str(error))
        raise ValueError(
            f"{self.run} has no intact checkpoint" + "".join(f"; {reason}" for reason in refused)
        )

    def discard_after(self, step: int) -> None:
        """Drop checkpoints beyond `step`: a run that went back to it is about to write them anew."""
        self.wait()
        for later, folder in checkpoint.steps_in(self.run).items():
            if later > step:
                checkpoint.remove(folder)

    def best(self) -> Path | None:
        """The checkpoint with the lowest score, if any was scored."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def _write_quietly(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            self._error = error

    def _write(
        self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], score: float | None
    ) -> None:
        checkpoint.save(checkpoint.step_folder(self.run, step), tensors, meta, score=score)
        self._prune()

    def _prune(self) -> None:
        steps = list(checkpoint.steps_in(self.run).values())
        kept = {*steps[-self.config.last :], *self._ranked()[: self.config.best]}
        for folder in steps:
            if folder not in kept:
                checkpoint.remove(folder)

    def _ranked(self) -> list[Path]:
        folders = checkpoint.steps_in(self.run).values()
        scores = {folder: checkpoint.read_manifest(folder)["score"] for folder in folders}
        return sorted((folder for folder in folders if scores[folder] is not None), key=lambda f: scores[f])


def read_state(folder: Path) -> dict[str, Any]:
    """The nested state of one checkpoint. Raises `ValueError` if it is damaged or of another kind."""
    tensors, meta = checkpoint.load(folder)
    if "state" not in meta:
        raise ValueError(f"{folder} is a checkpoint, but not of a training run: its meta.json has no 'state'")
    state: dict[str, Any] = unflatten(tensors, meta["state"])
    return state


def _snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; names of one tensor get one copy."""
    kept, aliases = checkpoint.without_repeats(tensors)
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in kept.items()}
    return copies | {alias: copies[name] for alias, name in aliases.items()}
