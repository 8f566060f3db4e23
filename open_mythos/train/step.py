"""One update of the weights, from batches to numbers.

Losses are sums over valid targets, divided by the count of valid targets of the whole update, so that
neither padding nor the number of micro-batches changes what is learned. A loss or gradient that is not
finite is no update: it is counted and skipped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor, nn

from open_mythos.data.batch import IGNORED, Batch, Loader
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Where
from open_mythos.train.optim import Optimizer
from open_mythos.train.precision import arithmetic, resolve, scaler
from open_mythos.train.recipe import Recipe

Loads = dict[Where, Tensor]


@dataclass
class TrainState:
    """What a checkpoint holds: all of it, and nothing else."""

    model: LoopedLM
    optimizer: Optimizer
    loader: Loader
    rng: Generator  # draws depths and start states
    scaler: torch.amp.GradScaler
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # updates in a row that were not finite

    @classmethod
    def begin(cls, recipe: Recipe, loader: Loader, device: torch.device) -> "TrainState":
        """A fresh run: weights drawn from the recipe's seed."""
        torch.manual_seed(recipe.seed)
        model = recipe.model.build().to(device)
        if model.loop is not None:
            model.loop.remat = recipe.remat
        rng = torch.Generator().manual_seed(recipe.seed)
        return cls(
            model.train(),
            recipe.optimiser.build(model),
            loader,
            rng,
            scaler(resolve(recipe.precision, device), device),
        )

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device


@dataclass
class _Sums:
    """What the micro-batches of one update add up to."""

    loss: Tensor | float = 0.0
    depths: list[float] = field(default_factory=list)
    loads: Loads = field(default_factory=dict)


def train_step(state: TrainState, recipe: Recipe, batches: Sequence[Batch]) -> dict[str, float]:
    """Draw depths, accumulate gradients over `batches`, clip, update; returns metrics.

    The step counts even if it was skipped, so that a run always ends.
    """
    progress = recipe.progress(state.step, state.seconds)
    rate = recipe.rate(state.step, progress)
    state.optimizer.scale_lr(rate)
    valid = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    sums = _Sums()
    for batch in batches:
        _accumulate(state, recipe, batch, max(valid, 1), progress, sums)
    norm = _update(state, recipe, sums)
    state.step += 1
    state.tokens += sum(batch.tokens.numel() for batch in batches)
    return _metrics(state, sums, norm, rate)


def _accumulate(
    state: TrainState, recipe: Recipe, batch: Batch, valid: int, progress: float, sums: _Sums
) -> None:
    loop = recipe.model.loop
    rows = len(batch.tokens)
    plan = loop.schedule.draw(state.rng, rows, progress) if loop is not None else Plan(1)
    batch = batch.to(state.device)
    ctx = replace(Context.counting(batch.tokens), documents=batch.documents)
    with arithmetic(resolve(recipe.precision, state.device), state.device):
        scored = recipe.objective.score(state.model, [batch.targets], plan, ctx, state.rng)
    sums.loss = sums.loss + scored.loss.tokens.sum() / valid
    sums.depths.append(plan.mean if loop is not None else 0.0)
    for where, load in scored.tally.total_loads().items():
        sums.loads[where] = sums.loads[where] + load if where in sums.loads else load
    state.scaler.scale(scored.total / valid).backward()


def _update(state: TrainState, recipe: Recipe, sums: _Sums) -> float:
    """Clip and step, unless something is not finite. Returns the norm of the gradient."""
    for part in state.optimizer.parts:
        state.scaler.unscale_(part)
    norm = float(nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip))
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


def _metrics(state: TrainState, sums: _Sums, norm: float, rate: float) -> dict[str, float]:
    metrics = {
        "step": state.step,
        "loss": float(sums.loss),
        "tokens": state.tokens,
        "loops": sum(sums.depths) / len(sums.depths),
        "lr": rate,
        "grad_norm": norm,
    }
    if sums.loads:
        fullest = [float(load.max() / load.float().mean()) for load in sums.loads.values()]
        metrics["expert_balance"] = max(fullest)
    radius = state.model.spectral_radius()
    return metrics if radius is None else metrics | {"rho": radius}
