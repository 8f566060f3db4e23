"""What makes a training step cheaper: rows that leave the loop, recomputing, bfloat16.

    python bench/step.py [--dim 256] [--threads 2] [--only shrink remat precision]

    shrink      every sequence draws its depth (Poisson, mean 8, gradient through the last 4 steps): rows that
                are done leave, against `where`, in which all rows go as deep as the deepest and those that
                are done keep what they have; losses and gradients are checked equal first
    remat       each loop recomputed in the backward pass: memory at the peak and the time it costs, at 8 and
                16 loops with gradient through all
    precision   bfloat16 against float32

A step is the whole update of our default recipe on random tokens. Times are taken in turn, A B A B; every
pair gives a ratio, the table shows their median, smallest and largest. Above one, the second is faster. Takes
about ten minutes on two cores; goes to bench/results/step-cpu.json.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Literal, get_args

import memory
import torch
import tyro
from clock import Clock, Run, Timer
from machine import machine

from open_mythos.data.batch import Batch
from open_mythos.loop.core import LoopCore
from open_mythos.loop.schedule import Fixed, Plan, Poisson, Schedule
from open_mythos.loop.state import State
from open_mythos.nn.context import Context
from open_mythos.train.recipe import Recipe
from open_mythos.train.recipes import for_model, small_mythos
from open_mythos.train.step import TrainState, train_step

Part = Literal["shrink", "remat", "precision"]
CPU = torch.device("cpu")
MEAN, GRAD = 8, 4
HEADER = f"{'':44}{'first':>12}{'second':>12}{'ratio':>8}{'min':>7}{'max':>7}{'pairs':>7}"


@dataclass(frozen=True)
class Options:
    only: tuple[Part, ...] = get_args(Part)
    dim: int = 256
    length: int = 128
    batches: tuple[int, ...] = (8, 32)  # of `shrink`
    batch: int = 8  # of the others
    loops: tuple[int, ...] = (8, 16)  # of `remat`
    draws: int = 4  # plans that a time of `shrink` is the mean of; the same for both ways
    vocab: int = 2048
    threads: int = 2
    clock: Clock = "wall"  # "cpu" with --threads 1 where the machine is not ours alone
    budget: float = 60.0  # seconds per comparison
    out: Path = Path(__file__).parent / "results"


class Bench:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.timer = Timer(CPU, options.clock, options.budget, least=3, most=15)
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        print(HEADER)
        for part in self.options.only:
            getattr(self, part)()
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / "step-cpu.json"
        about = machine() | {"clock": self.options.clock, "dim": self.options.dim}
        path.write_text(
            json.dumps(about | {"length": self.options.length, "rows": self.rows}, indent=1) + "\n"
        )
        print(f"\n{path}")

    def shrink(self) -> None:
        schedule = Poisson(mean=MEAN, grad=GRAD, per="sequence", most=2 * MEAN)
        for batch in self.options.batches:
            recipe = _recipe(self.options, schedule, batch)
            _check_equal(recipe)
            runs = [
                _updates(state, recipe, self.options.draws)
                for state in (_deepest(_begin(recipe)), _begin(recipe))
            ]
            self._compare(f"where -> shrink, {batch} rows", *runs, count=self.options.draws)

    def remat(self) -> None:
        for loops in self.options.loops:
            recipe = _recipe(self.options, Fixed(steps=loops), self.options.batch)
            kept, again = (recipe.replace(remat=remat) for remat in (False, True))
            peaks = [_peak(one) for one in (kept, again)]
            name = f"keep -> recompute, {loops} loops"
            print(
                f"{name + ', peak MiB':44}{peaks[0]:12,.0f}{peaks[1]:12,.0f}{peaks[0] / peaks[1]:8.2f}",
                flush=True,
            )
            self.rows.append({"what": f"{name}, peak MiB", "first": peaks[0], "second": peaks[1]})
            self._compare(name, *(_updates(_begin(one), one) for one in (kept, again)))

    def precision(self) -> None:
        schedule = Poisson(mean=4, grad=2, per="sequence", most=8)
        recipe = _recipe(self.options, schedule, self.options.batch)
        names: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
        recipes = [recipe.replace(precision=name) for name in names]
        runs = [_updates(_begin(one), one, self.options.draws) for one in recipes]
        self._compare("float32 -> bfloat16", *runs, count=self.options.draws)

    def _compare(self, what: str, first: Run, second: Run, count: int = 1) -> None:
        """`count` is how many updates a run makes."""
        timing = self.timer.compare(first, second)
        times = [timing.theirs / count, timing.ours / count]
        cells = f"{times[0] * 1e3:9.0f} ms{times[1] * 1e3:9.0f} ms"
        print(
            f"{what:44}{cells}{timing.ratio:8.2f}{timing.low:7.2f}{timing.high:7.2f}{timing.pairs:7d}",
            flush=True,
        )
        spread = {"ratio": timing.ratio, "low": timing.low, "high": timing.high, "pairs": timing.pairs}
        self.rows.append({"what": what, "first": times[0], "second": times[1]} | spread)


def _recipe(options: Options, schedule: Schedule, batch: int) -> Recipe:
    model = small_mythos(options.dim, max(1, options.dim // 64), options.vocab)
    assert model.loop is not None
    model = model.replace(loop=model.loop.replace(schedule=schedule))
    return for_model(model).replace(length=options.length, batch=batch, steps=1_000_000)


def _begin(recipe: Recipe) -> TrainState:
    return TrainState.begin(recipe, None, CPU)  # type: ignore[arg-type] (batches are handed in)


def _updates(state: TrainState, recipe: Recipe, draws: int = 1) -> Run:
    """The same plans and tokens in every run."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(recipe.model.vocab, (draws, recipe.batch, recipe.length + 1), generator=rng)
    batches = [Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in rows]

    def run() -> list[dict[str, float]]:
        state.rng.manual_seed(0)
        return [train_step(state, recipe, [batch]) for batch in batches]

    return run


def _check_equal(recipe: Recipe) -> None:
    """Raises `ValueError` unless both ways have the same losses and gradients.

    The router bias is left alone: with `where` it also sees the rows that are done.
    """
    recipe = recipe.replace(precision="float32").override("model.loop.layers.0.ffn.speed=0.0")
    ways = [_updates(state, recipe, 3)() for state in (_deepest(_begin(recipe)), _begin(recipe))]  # type: ignore[misc]
    for one, other in zip(*ways, strict=True):
        for what in ("loss", "grad_norm"):
            if abs(one[what] / other[what] - 1) > 1e-3:
                raise ValueError(f"{what} is {one[what]} with where and {other[what]} with shrinking")


def _deepest(state: TrainState) -> TrainState:
    """Change the loop: nobody leaves."""
    loop = state.model.loop
    assert loop is not None
    loop.forward = MethodType(_forward, loop)  # type: ignore[method-assign]
    return state


def _forward(loop: LoopCore, state: State, ctx: Context, plan: Plan, watch: None, judge: None) -> State:
    """`LoopCore.forward` with a mask in place of a smaller batch."""
    state = state._replace(past=loop.recall.open(state.past))
    frozen, live = plan.split(len(state.h))
    with torch.no_grad():
        moved = _turns(loop, state, ctx, frozen, [0] * len(frozen), live)
    torch.clear_autocast_cache()
    state = _pick([n > 0 for n in frozen], moved, state)
    return _turns(loop, state, ctx, live, frozen, [0] * len(live))


def _turns(
    loop: LoopCore,
    state: State,
    ctx: Context,
    turns: Sequence[int],
    offset: Sequence[int],
    after: Sequence[int],
) -> State:
    for turn in range(max(turns)):
        host = [o + min(turn, max(n - 1, 0)) for o, n in zip(offset, turns, strict=True)]
        last = [n == turn + 1 and not a for n, a in zip(turns, after, strict=True)]
        step = torch.tensor(host)
        moved = loop.step(state, ctx.turn(step, host), step, torch.tensor(last))
        state = _pick([n > turn for n in turns], moved, state)
    return state


def _pick(going: Sequence[bool], new: State, old: State) -> State:
    rows = torch.tensor(going)
    pairs = zip(new[1:], old[1:], strict=True)
    # What was encoded stays the same tensor, also without gradient, or its own would be cut off.
    return State(old.e, *(torch.where(rows.view(-1, *[1] * (b.ndim - 1)), a, b) for a, b in pairs))


def _peak(recipe: Recipe) -> float:
    """MiB of an update on top of the weights and the optimizer's state, in a process of its own."""
    command = [sys.executable, __file__, "--peak", json.dumps(recipe.to_dict()), str(torch.get_num_threads())]
    returned = {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # what is freed goes back at once, so that nothing hides in it
    done = subprocess.run(command, env=os.environ | returned, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"measuring memory failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        torch.set_num_threads(int(sys.argv[3]))
        recipe = Recipe.from_dict(json.loads(sys.argv[2]))
        run = _updates(_begin(recipe), recipe)
        for _ in range(2):  # what torch loads on first use is not the step's
            run()
        print(memory.above(run, CPU))
        return
    try:
        options = tyro.cli(Options, description=__doc__)
        torch.set_num_threads(options.threads)
        Bench(options).run()
    except ValueError as error:
        sys.exit(f"step: {error}")


if __name__ == "__main__":
    main()
