"""The training loop, and how a run begins, is saved and goes on.

    while not done:  batches -> train_step -> log -> whatever is due (hooks)

A run leaves a folder: `config.json` (the recipe, valid as input again), `tokenizer/`, `metrics.jsonl`,
`checkpoints/`. SIGINT and SIGTERM let the current update finish, save, and say how to go on.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from open_mythos.data.corpus import Corpus
from open_mythos.data.rows import RowLoader
from open_mythos.train.checkpoint import require_same
from open_mythos.train.keeper import Keeper
from open_mythos.train.metrics import MetricsLog
from open_mythos.train.randomness import random_state, restore_random_state
from open_mythos.train.recipe import Recipe
from open_mythos.train.step import TrainState, train_step

PATIENCE = 10  # updates in a row that may fail before the run goes back to its last checkpoint
RETURNS = 3  # times that it goes back before it gives up

Metrics = dict[str, Any]


class Every(NamedTuple):
    """Do something every so many steps, and at the end. It may add to the step's metrics."""

    steps: int
    do: Callable[[TrainState, Metrics], None]


class Stopped(Exception):
    """A signal ended the run after its state was saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Run:
    """One training run: its recipe, its text, its folder."""

    def __init__(self, recipe: Recipe, corpus: Corpus, folder: Path, device: torch.device) -> None:
        self.recipe, self.corpus, self.folder, self.device = recipe, corpus, folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self.keeper: Keeper = recipe.keep.build(folder / "checkpoints")
        self.returns = 0

    def begin(self) -> TrainState:
        """A fresh state. Writes the recipe and the tokenizer into the folder."""
        loader = RowLoader(
            self.corpus.training,
            length=self.recipe.length,
            batch=self.recipe.rows,
            seed=self.recipe.seed,
            documents=self.recipe.documents,
        )
        self.recipe.save(self.folder / "config.json")
        self.corpus.tokenizer.save(self.folder / "tokenizer")
        return TrainState.begin(self.recipe, loader, self.device)

    def resume(self) -> TrainState:
        """The state of the newest intact checkpoint.

        Raises `ValueError` if there is none or it is from another recipe (its length and cadence may differ).
        """
        state = self.begin()
        return self._restore(state, self.keeper.load())

    def save(self, state: TrainState, score: float | None = None) -> None:
        self.keeper.save(state.step, self._pack(state), score=score)

    def fit(self, state: TrainState, hooks: Sequence[Every] = ()) -> TrainState:
        """Train until the recipe's end. Raises `Stopped` after a signal, when everything is saved."""
        recipe = self.recipe
        with MetricsLog(self.folder / "metrics.jsonl", keep=state.step) as log, _signals() as stop:
            while recipe.progress(state.step, state.seconds) < 1 and not stop:
                metrics = self._step(state)
                done = recipe.progress(state.step, state.seconds) >= 1
                for hook in hooks:
                    if state.step % hook.steps == 0 or done:
                        hook.do(state, metrics)
                log.append(metrics)
                state = self._heed(state, log)
                if state.step % recipe.save_every == 0 or done or stop:
                    self.save(state, metrics.get("eval_bits_per_byte"))
            if stop:
                self.save(state)
                self.keeper.wait()
                raise Stopped(stop[0])
        self.keeper.wait()
        return state

    def _step(self, state: TrainState) -> Metrics:
        began = time.monotonic()
        recipe = self.recipe
        batches = [next(state.loader) for _ in range(recipe.batch // recipe.rows)]
        metrics: Metrics = dict(train_step(state, recipe, batches))
        spent = time.monotonic() - began
        state.seconds += spent
        return metrics | {
            "time": state.seconds,
            "tokens_per_second": sum(batch.tokens.numel() for batch in batches) / spent,
        }

    def _heed(self, state: TrainState, log: MetricsLog) -> TrainState:
        """Go back to the last good checkpoint when updates keep failing; give up when that does not help.

        Raises `ValueError` then.
        """
        if state.skipped < PATIENCE:
            return state
        self.returns += 1
        if self.returns > RETURNS:
            raise ValueError(
                f"the loss was not finite {PATIENCE} times in a row, also after going back {RETURNS} times; "
                "lower the learning rate, or train in float32"
            )
        self.keeper.wait()
        seen, steps = state.loader.state_dict(), state.step
        state = self._restore(state, self.keeper.load())
        state.loader.load_state_dict(seen)  # not the same batches again
        state.step, state.skipped = steps, 0
        return state

    def _pack(self, state: TrainState) -> dict[str, Any]:
        return {
            "config": self.recipe.to_dict(),
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "loader": state.loader.state_dict(),
            "random": random_state(depth=state.rng),
            "scaler": state.scaler.state_dict(),
            "counts": {"step": state.step, "tokens": state.tokens, "seconds": state.seconds, "skipped": state.skipped},
        }

    def _restore(self, state: TrainState, saved: dict[str, Any]) -> TrainState:
        ours, theirs = self.recipe.to_dict(), dict(saved["config"])
        for name in ("steps", "seconds", "keep", "eval_every", "eval_rows", "sample_every", "save_every"):
            theirs[name] = ours[name]
        require_same(theirs, ours, "recipe")
        state.model.load_state_dict(saved["model"])
        state.optimizer.load_state_dict(saved["optimizer"])
        state.loader.load_state_dict(saved["loader"])
        restore_random_state(saved["random"], depth=state.rng)
        if saved["scaler"]:
            state.scaler.load_state_dict(saved["scaler"])
        for name, value in saved["counts"].items():
            setattr(state, name, value)
        return state


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
