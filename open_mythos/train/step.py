"""One update of the weights, from batches to numbers.

Losses are sums over valid targets, divided by the count of valid targets of the whole update, so that
neither padding nor the number of micro-batches changes what is learned. A loss or gradient that is not
finite is no update: it is counted and skipped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from open_mythos.data.batch import IGNORED, Batch, Loader
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Where
from open_mythos.train.optim import Optimizer
from open_mythos.train.parallel import ALONE, World, by_mesh, norm_over_ranks, shard
from open_mythos.train.precision import arithmetic, resolve, scaler
from open_mythos.train.recipe import Recipe

Loads = dict[Where, Tensor]


@dataclass
class TrainState:
    """What a checkpoint holds: all of it, and nothing else."""

    model: LoopedLM
    optimizer: Optimizer
    loader: Loader
    rng: Generator  # draws depths
    scaler: torch.amp.GradScaler
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # updates in a row that were not finite

    @classmethod
    def begin(
        cls, recipe: Recipe, loader: Loader, device: torch.device, world: World = ALONE
    ) -> "TrainState":
        """A fresh run: weights drawn from the recipe's seed, the same on any number of ranks.

        Raises `ValueError` if the ranks of `world` cannot share out the experts as the recipe says.
        """
        world.require(recipe.expert_parallel)
        torch.manual_seed(recipe.seed)
        model = recipe.model.build()
        dtype = resolve(recipe.precision, device)
        # Sharding moves one unit after the other to the device, so that no device ever holds them all.
        model = model.to(device) if world.mesh is None else shard(model, world, dtype)
        if world.rank:
            torch.manual_seed(recipe.seed + world.rank)  # dropout
        if model.loop is not None:
            model.loop.remat = recipe.remat
            if recipe.compile:
                model.loop.step = torch.compile(model.loop.step)  # type: ignore[method-assign]
        rng = torch.Generator().manual_seed(recipe.seed)
        return cls(model.train(), recipe.optimiser.build(model), loader, rng, scaler(dtype, device))

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device


@dataclass
class _Sums:
    """What the micro-batches of one update add up to."""

    loss: Tensor | float = 0.0
    exit_step: Tensor | float = 0.0  # where a learned gate leaves; zero where there is none
    depths: list[tuple[float, float]] = field(default_factory=list)  # mean turns, and those with gradient
    loads: Loads = field(default_factory=dict)


def train_step(
    state: TrainState, recipe: Recipe, batches: Sequence[Batch], world: World = ALONE
) -> dict[str, float]:
    """Draw depths, accumulate gradients over this rank's `batches`, clip, update; returns metrics.

    The step counts even if it was skipped, so that a run always ends.
    """
    progress = recipe.progress(state.step, state.seconds)
    rate = recipe.rate(state.step, progress)
    state.optimizer.scale_lr(rate)
    valid = int(world.sum(torch.tensor(sum(int((batch.targets != IGNORED).sum()) for batch in batches))))
    sums = _Sums()
    for number, batch in enumerate(batches):
        _accumulate(state, recipe, batch, max(valid, 1), _Turn(progress, number, world), sums)
    _meet(sums, world)
    norm = _update(state, recipe, sums)
    state.step += 1
    state.tokens += world.size * sum(batch.tokens.numel() for batch in batches)
    return _metrics(state, sums, norm, rate)


class _Turn(NamedTuple):
    """Which micro-batch of an update it is, and on which rank."""

    progress: float
    number: int
    world: World


def _accumulate(
    state: TrainState, recipe: Recipe, batch: Batch, valid: int, turn: _Turn, sums: _Sums
) -> None:
    plan = _draw(state, recipe, len(batch.tokens), turn)
    batch = batch.to(state.device)
    done = torch.tensor(turn.progress)  # as a tensor, or a compiled step would be made anew as it grows
    ctx = replace(Context.counting(batch.tokens), documents=batch.documents, progress=done)
    with arithmetic(resolve(recipe.precision, state.device), state.device):
        scored = recipe.objective.score(
            state.model, [batch.targets], plan, ctx, _start_noise(state, recipe, len(batch.tokens), turn)
        )
    sums.loss = sums.loss + scored.loss.tokens.sum() / valid
    if scored.exit_step is not None:
        sums.exit_step = sums.exit_step + scored.exit_step / valid
    sums.depths.append(_depths(plan, len(batch.tokens)) if recipe.model.loop is not None else (0.0, 0.0))
    for where, load in scored.tally.total_loads().items():
        sums.loads[where] = sums.loads[where] + load if where in sums.loads else load
    state.scaler.scale(scored.total / (valid / turn.world.size)).backward()


def _draw(state: TrainState, recipe: Recipe, rows: int, turn: _Turn) -> Plan:
    """This rank's rows of the depths that all ranks draw alike; those who share out experts have the same."""
    loop = recipe.model.loop
    if loop is None:
        return Plan(1)
    return turn.world.of_plan(loop.schedule.draw(state.rng, rows * turn.world.plans, turn.progress))


def _depths(plan: Plan, rows: int) -> tuple[float, float]:
    _, live = plan.split(rows)
    return float(plan.mean), sum(live) / rows


def _start_noise(state: TrainState, recipe: Recipe, rows: int, turn: _Turn) -> Generator:
    """Where start states are drawn from, one seed per row: past the seeds of the ranks before this one."""
    words = np.random.SeedSequence((recipe.seed, state.step, turn.number))
    rng = torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))
    torch.randint(2**62, (rows * turn.world.rank,), generator=rng)
    return rng


def _meet(sums: _Sums, world: World) -> None:
    """Make the sums those of all ranks."""
    if world.size == 1:
        return
    sums.loss = world.sum(torch.as_tensor(sums.loss))
    if isinstance(sums.exit_step, Tensor):
        sums.exit_step = world.sum(sums.exit_step)
    sums.loads = {where: world.sum(load) for where, load in sums.loads.items()}
    sums.depths = [pair for depths in world.each(sums.depths) for pair in depths]


def _update(state: TrainState, recipe: Recipe, sums: _Sums) -> float:
    """Clip and step, unless something is not finite. Returns the norm of the gradient."""
    for part in state.optimizer.parts:
        state.scaler.unscale_(part)
    norm = _clip(state.model, recipe.clip)
    if math.isfinite(norm) and math.isfinite(float(sums.loss)):
        state.optimizer.step()
        state.model.rebalance(sums.loads)
        state.skipped = 0
    else:
        state.skipped += 1
    if state.scaler.is_enabled():
        state.scaler.update(None if math.isfinite(norm) else state.scaler.get_scale() / 2)
    state.optimizer.zero_grad()
    return norm


def _clip(model: nn.Module, most: float) -> float:
    """Shorten the gradient, all shards of it alike, to a norm of at most `most`. Returns what it was."""
    parts = by_mesh(p for p in model.parameters() if p.grad is not None)
    norms = [norm_over_ranks([p.grad for p in part if p.grad is not None]) for part in parts]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for part in parts:
        nn.utils.clip_grads_with_norm_(part, most, norm)
    return float(norm)


def _metrics(state: TrainState, sums: _Sums, norm: float, rate: float) -> dict[str, float]:
    loops, live = (sum(each) / len(sums.depths) for each in zip(*sums.depths, strict=True))
    metrics = {
        "step": state.step,
        "loss": float(sums.loss),
        "tokens": state.tokens,
        "loops": loops,
        "lr": rate,
        "grad_norm": norm,
    }
    if live < loops:
        metrics["grad_loops"] = live
    if state.skipped:
        metrics["skipped"] = state.skipped
    if sums.loads:
        fullest = [float(load.max() / load.float().mean()) for load in sums.loads.values()]
        metrics["expert_balance"] = max(fullest)
    if isinstance(sums.exit_step, Tensor):
        metrics["exit_step"] = float(sums.exit_step)
    radius = state.model.spectral_radius()
    return metrics if radius is None else metrics | {"rho": radius}
