"""The training loop, and how a run begins, is saved and goes on.

    while not done:  batches -> train_step -> log -> whatever is due (hooks)

A run leaves a folder: `config.json` (the recipe, valid as input again), `tokenizer/`, `metrics.jsonl`,
`checkpoints/`. SIGINT and SIGTERM let the current update finish, save, and say how to go on.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from open_mythos.data.corpus import Corpus
from open_mythos.train.checkpoint import Tell, require_same, steps_in
from open_mythos.train.keeper import Keeper
from open_mythos.train.load import begin_with
from open_mythos.train.metrics import MetricsLog
from open_mythos.train.parallel import ALONE, World, load_weights
from open_mythos.train.pieces import like
from open_mythos.train.randomness import random_state, restore_random_state
from open_mythos.train.recipe import CADENCE, Recipe
from open_mythos.train.step import TrainState, train_step

PATIENCE = 10  # updates in a row that may fail before the run goes back to its last checkpoint
RETURNS = 3  # times that it goes back before it gives up
RECOVERED = 1000  # good updates in a row after which what went wrong before does not count
COUNTS = ("step", "tokens", "seconds", "skipped")
# What a run may be resumed with another value of: its length, its cadence, and how the work is laid out.
LENGTH = ("steps", "seconds", "keep", *CADENCE)
MAY_DIFFER = (*LENGTH, "remat", "compile", "expert_parallel")

Metrics = dict[str, Any]


class Every(NamedTuple):
    """Do something every so many steps, and at the end. It may add to the step's metrics."""

    steps: int
    do: Callable[[TrainState, Metrics], None]


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A signal ended the run after its state was saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Run:
    """One training run: its recipe, its text, its folder."""

    def __init__(
        self, recipe: Recipe, corpus: Corpus, folder: Path, device: torch.device, world: World = ALONE
    ) -> None:
        """`world` is the processes that train together; each makes its own `Run` of the same folder."""
        self.recipe, self.corpus, self.folder, self.device = recipe, corpus, folder, device
        self.world = world
        self.reading = recipe.reading(world.rank, world.size)
        self.keeper: Keeper = recipe.keep.build(folder / "checkpoints", world)
        self.returns, self.good = 0, 0

    def begin(self, over: bool = False) -> TrainState:
        """A fresh state; `over` that of an earlier run, whose checkpoints are then deleted. Once all is there
        that it needs, writes the recipe and the tokenizer into the folder.

        Raises `ValueError` if it should begin with weights that do not fit.
        """
        state = self._blank()
        if self.recipe.weights is not None:
            begin_with(state.model, Path(self.recipe.weights))
        if over:
            self.world.each(None)  # by now all have read what they begin with
            self.world.first(self.keeper.clear)
        self._introduce()
        return state

    def _blank(self) -> TrainState:
        return TrainState.begin(self.recipe, self.corpus.loader(self.reading), self.device, self.world)

    def _introduce(self) -> None:
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.recipe.save(self.folder / "config.json")
            self.corpus.tokenizer.save(self.folder / "tokenizer")

    def resume(self, tell: Tell = lambda said: None) -> TrainState:
        """The state of the newest intact checkpoint. `tell` hears of a newer one that is damaged.

        Raises `ValueError` if there is none or it is from another recipe (its length and cadence may differ).
        """
        blank = self._blank()
        state = self._restore(blank, self._load(blank, tell=tell))
        self._introduce()  # the recipe may have another length and cadence now
        return state

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Write a checkpoint; of many ranks each writes its shards."""
        self.keeper.save(state.step, self._pack(state), score=score)

    def fit(self, state: TrainState, hooks: Sequence[Every] = ()) -> TrainState:
        """Train until the recipe's end. Raises `Stopped` after a signal, when everything is saved."""
        recipe = self.recipe
        with self._log(state.step) as log, _signals() as caught:
            while recipe.progress(state.step, state.seconds) < 1:
                metrics = self._step(state)
                done = recipe.progress(state.step, state.seconds) >= 1
                for hook in hooks:
                    if state.step % hook.steps == 0 or done:
                        hook.do(state, metrics)
                if log is not None:
                    log.append(metrics)
                failing = state.skipped > 0  # what is wrong may be in the weights: not to be kept
                state = self._heed(state)
                stop = int(*self.world.most(caught[0] if caught else 0))  # a signal may reach one rank first
                if done or stop or (state.step % recipe.save_every == 0 and not failing):
                    self.save(state, _score(metrics))
                if stop and not done:
                    self.keeper.wait()
                    raise Stopped(stop)
        self.keeper.wait()
        return state

    def _log(self, step: int) -> AbstractContextManager[MetricsLog | None]:
        return MetricsLog(self.folder / "metrics.jsonl", keep=step) if self.world.rank == 0 else nullcontext()

    def _step(self, state: TrainState) -> Metrics:
        began = time.monotonic()
        recipe, world = self.recipe, self.world
        turns = recipe.batch // (self.reading.batch * world.size)
        batches = [next(state.loader) for _ in range(turns)]
        metrics: Metrics = dict(train_step(state, recipe, batches, world))
        (spent,) = world.most(time.monotonic() - began)
        state.seconds += spent
        tokens = world.size * sum(batch.tokens.numel() for batch in batches)
        return metrics | {"time": state.seconds, "tokens_per_second": tokens / spent}

    def _heed(self, state: TrainState) -> TrainState:
        """Go back to the last good checkpoint when updates keep failing; give up when that does not help.

        Each time it goes back one checkpoint further. Raises `ValueError` when it gives up.
        """
        self.good = 0 if state.skipped else self.good + 1
        if self.good >= RECOVERED:
            self.returns = 0
        if state.skipped < PATIENCE:
            return state
        self.returns += 1
        self.keeper.wait()
        steps = self.world.first(lambda: list(steps_in(self.keeper.run)))
        if self.returns > RETURNS or not steps:
            tried = f", also after going back {self.returns - 1} times" if self.returns > 1 else ""
            raise ValueError(
                f"the loss or its gradient was not finite {PATIENCE} times in a row{tried}; "
                "lower the learning rate, look at the data, or train in float32"
            )
        seen, now = state.loader.state_dict(), (state.step, state.tokens, state.seconds)
        state = self._restore(state, self._load(state, passing=self.returns - 1))
        state.loader.load_state_dict(seen)  # not the same batches again
        state.step, state.tokens, state.seconds = now
        state.skipped = 0
        return state

    def _load(self, state: TrainState, passing: int = 0, tell: Tell = lambda said: None) -> dict[str, Any]:
        """The newest intact checkpoint: all ranks verify a share of it, and read what they are to hold."""
        return self.keeper.load(passing=passing, empty=like(state.model), tell=tell)

    def _pack(self, state: TrainState) -> dict[str, Any]:
        mine = {"loader": state.loader.state_dict(), "random": random_state(depth=state.rng)}
        weights = state.model.state_dict(keep_vars=True)  # so that what is tied is seen to be
        parts = {"model": weights, "optimizer": state.optimizer.state_dict()}
        return {
            "config": self.recipe.to_dict(),
            **parts,
            "ranks": self.world.each(mine),
            "scaler": state.scaler.state_dict(),
            "counts": {name: getattr(state, name) for name in COUNTS},
        }

    def _restore(self, state: TrainState, saved: dict[str, Any]) -> TrainState:
        # By way of `Recipe`, which knows the defaults of fields that are younger than the checkpoint. Older
        # ones may hold relative paths.
        ours, theirs = (
            recipe.anchored().to_dict() for recipe in (self.recipe, Recipe.from_dict(saved["config"]))
        )
        for name in MAY_DIFFER:
            theirs[name] = ours[name]
        require_same(theirs, ours, "recipe")
        load_weights(state.model, saved["model"])
        state.optimizer.load_state_dict(saved["optimizer"])
        self._restore_rank(state, saved["ranks"])
        if saved["scaler"]:
            state.scaler.load_state_dict(saved["scaler"])
        for name in COUNTS:
            setattr(state, name, saved["counts"][name])
        return state

    def _restore_rank(self, state: TrainState, saved: list[dict[str, Any]]) -> None:
        """What each rank has of its own. With more ranks than were saved, the new ones draw dropout anew."""
        rank = self.world.rank
        mine = saved[rank] if rank < len(saved) else saved[0]
        state.loader.load_state_dict(mine["loader"])
        restore_random_state(mine["random"], depth=state.rng)
        if rank >= len(saved):
            torch.manual_seed(torch.initial_seed() + rank)


def _score(metrics: Metrics) -> float | None:
    """What the best checkpoint is the lowest in; none where it was not measured or is not finite."""
    score: float | None = metrics.get("eval_bits_per_byte", metrics.get("eval_error"))
    return score if score is not None and math.isfinite(score) else None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; a second one interrupts at once."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
