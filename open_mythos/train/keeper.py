"""Keeps a run's checkpoints: saves in the background, and holds on to the last few and the best few.

Of many ranks each has a keeper of the same folder, and all save and load together: each writes its shards,
the first everything else.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from open_mythos.config import Config
from open_mythos.train import checkpoint, pieces
from open_mythos.train.nested import flatten, unflatten
from open_mythos.train.parallel import ALONE, World


class Keep(Config):
    """How many checkpoints stay: the newest `last`, and the `best` by score (lower is better)."""

    last: int = 3
    best: int = 1
    background: bool = True

    def build(self, run: Path, world: World = ALONE) -> "Keeper":
        return Keeper(self, run, world)


class Keeper:
    """One writer for the checkpoints of a run, `run/step-00000001` and so on.

    Raises `ValueError` if it would keep none.
    """

    def __init__(self, config: Keep, run: Path, world: World = ALONE) -> None:
        if config.last < 1 or config.best < 0:
            raise ValueError(
                f"keep at least the last checkpoint, got last={config.last} and best={config.best}"
            )
        self.config, self.run, self.world = config, run, world
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        if world.rank == 0 and run.is_dir():
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
        arguments = (step, self._snapshot(tensors), {"step": step, "state": meta}, score)
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

    def load(
        self,
        folder: Path | None = None,
        passing: int = 0,
        empty: pieces.Empty | None = None,
        tell: checkpoint.Tell = lambda said: None,
    ) -> dict[str, Any]:
        """The state saved in `folder`, or else in the newest checkpoint that all ranks find intact.

        `passing` goes by that many of the newest ones, as far as there are older. What was saved in shards
        is read into what `empty` makes. `tell` hears of a newer one that is damaged.

        Raises `ValueError` if there is none, and says why each candidate was refused.
        """
        if folder is not None:
            return read_state(folder, empty)
        refused: dict[Path, str] = {}
        share = (self.world.rank, self.world.size)
        candidates = self.world.first(lambda: list(reversed(checkpoint.steps_in(self.run).values())))
        for candidate in candidates[max(0, min(passing, len(candidates) - 1)) :]:
            state, trouble = _try_to_read(candidate, empty, share)
            troubles = [said for said in self.world.each(trouble) if said is not None]
            if state is not None and not troubles:
                if said := checkpoint.passed_over(refused | checkpoint.broken_in(self.run), candidate):
                    tell(said)
                return state
            refused[candidate] = troubles[0]
        raise ValueError(
            f"{self.run} has no intact checkpoint" + "".join(f"; {reason}" for reason in refused.values())
        )

    def discard_after(self, step: int) -> None:
        """Drop checkpoints beyond `step`: a run that went back to it is about to write them anew."""
        self.wait()
        for later, folder in checkpoint.steps_in(self.run).items():
            if later > step:
                checkpoint.remove(folder)

    def clear(self) -> None:
        """Drop every checkpoint, whole or not."""
        self.wait()
        if self.run.is_dir():
            shutil.rmtree(self.run)

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
        self.run.mkdir(parents=True, exist_ok=True)
        folder = checkpoint.step_folder(self.run, step)
        if self.world.size > 1:
            self._write_together(folder, tensors, meta, score)
        else:
            checkpoint.save(folder, tensors, meta, score=score)
        if self.world.rank == 0:
            self._prune()

    def _write_together(
        self, folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], score: float | None
    ) -> None:
        """As each rank takes part in it. Returns when the checkpoint is there."""
        mine, rest, aliases = pieces.split(tensors)
        together = pieces.Together(self.world)

        def beside(draft: Path) -> pieces.Fingerprints:
            return pieces.write(draft, mine, together, checkpoint.fingerprint)

        def part() -> None:
            if self.world.rank == 0:
                checkpoint.save(folder, rest, meta, score=score, beside=beside, aliases=aliases)
            else:
                beside(checkpoint.draft_of(folder))

        together.do(part)

    def _snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU of what this rank writes; names of one tensor get one copy."""
        mine, rest, aliases = pieces.split(tensors)
        copies = pieces.copied(mine) if mine else {}
        copies |= {alias: copies[name] for alias, name in aliases.items()}
        return copies | (_snapshot(rest) if self.world.rank == 0 else {})

    def _prune(self) -> None:
        steps = list(checkpoint.steps_in(self.run).values())
        kept = {*steps[-self.config.last :], *self._ranked()[: self.config.best]}
        for folder in steps:
            if folder not in kept:
                checkpoint.remove(folder)

    def _ranked(self) -> list[Path]:
        folders = checkpoint.steps_in(self.run).values()
        scores: dict[Path, Any] = {
            folder: checkpoint.read_manifest(folder).get("score") for folder in folders
        }
        scored = (folder for folder in folders if isinstance(scores[folder], int | float))
        return sorted(scored, key=lambda folder: scores[folder])


def read_state(
    folder: Path, empty: pieces.Empty | None = None, share: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """The nested state of one checkpoint. Raises `ValueError` if it is damaged or of another kind."""
    tensors, meta = checkpoint.load(folder, empty=empty, share=share)
    if "state" not in meta:
        raise ValueError(f"{folder} is a checkpoint, but not of a training run: its meta.json has no 'state'")
    state: dict[str, Any] = unflatten(tensors, meta["state"])
    return state


def _try_to_read(
    folder: Path, empty: pieces.Empty | None, share: tuple[int, int]
) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return read_state(folder, empty, share), None
    except ValueError as error:
        return None, str(error)


def _snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; names of one tensor get one copy."""
    kept, aliases = checkpoint.without_repeats(tensors)
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in kept.items()}
    return copies | {alias: copies[name] for alias, name in aliases.items()}
