"""What depth does: held-out loss at every number of loops, from one pass through the loop.

    for n = 1 .. N:   h_n = step(h_{n-1});   read out what would be answered if the loop ended here

The state after step n of a deep run is the state at the end of a run of n steps, so every depth is read
from the same N steps: the loop costs what its deepest run costs, and only coda and head run once per depth.
Law: each number is that of a run of its own (tests/unit/analysis/test_sweep.py).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from open_mythos.data.batch import Batch
from open_mythos.data.rows import Tokens, in_order
from open_mythos.loop.halt import finish
from open_mythos.loop.schedule import Plan
from open_mythos.loop.state import State
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.nn.mode import evaluating
from open_mythos.nn.tally import Tally
from open_mythos.train.loss import next_token_loss
from open_mythos.train.precision import Precision, arithmetic, resolve
from open_mythos.whole import write_whole

FURTHER = 4  # by default a sweep goes to this many times the trained depth


class Sweep(NamedTuple):
    """What `sweep.json` holds. Lists are by loop: the two losses at the depths in `loops`, the others at 1 to
    N. `expert_load` is the share of tokens per expert, the experts of all looped layers side by side."""

    loops: list[int]
    bits_per_byte: list[float]
    nats_per_token: list[float]
    trained_loops: int
    relative_step: list[float]  # mean over tokens of |h_n - h_{n-1}| / |h_n|
    state_norm: list[float]  # mean over tokens of |h_n|
    expert_load: list[list[float]]


def sweep(
    model: LoopedLM,
    held_out: Tokens,
    length: int,
    *,
    loops: Sequence[int] | None = None,
    rows: int = 64,
    batch: int = 16,
    precision: Precision = "auto",
) -> Sweep:
    """Measure the first `rows` rows of `length` tokens, by default at 1 to four times the trained depth.

    Bytes are counted by the text's average per token. Raises `ValueError` for a model without a loop, depths
    below one, rows that exceed the model's context, and text too short for one row.
    """
    wanted = sorted(set(loops or range(1, FURTHER * model.steps + 1)))
    _check(model, wanted, length)
    device = model.embed.weight.device
    totals = _Totals(wanted)
    with evaluating(model):
        for part in in_order(held_out, length, min(batch, rows), -(-rows // min(batch, rows))):
            with torch.inference_mode(), arithmetic(resolve(precision, device), device):
                _measure(model, part.to(device), totals)
    return totals.sweep(model.steps, len(held_out) / held_out.text_bytes)


def write_sweep(folder: Path, result: Sweep) -> Path:
    """Write `sweep.json` into the folder of a run, whole or not at all; the report reads it."""
    path = folder / "sweep.json"
    write_whole(path, json.dumps({k: v for k, v in result._asdict().items() if v != []}, indent=1) + "\n")
    return path


def _measure(model: LoopedLM, batch: Batch, totals: "_Totals") -> None:
    assert model.loop is not None
    ctx = Context.counting(batch.tokens)
    tally, start = Tally(), model.encode(batch.tokens, ctx)
    states = [start.h]

    def watch(n: int, state: State) -> None:
        totals.motion(n, states.pop(), state.h)
        states.append(state.h)
        if n + 1 in totals.nats:
            features = model.decode(finish(model.loop.halt, state), ctx)  # type: ignore[union-attr]
            totals.nats[n + 1] += next_token_loss(features, model.head.weight, batch.targets).tokens.sum()

    model.loop(start, ctx.with_tally(tally), Plan(totals.deepest), watch)
    totals.tokens += batch.targets.numel()
    totals.add_loads(tally)


class _Totals:
    """Sums over batches, kept on the device until the end."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self.deepest = max(wanted)
        self.nats: dict[int, Any] = dict.fromkeys(wanted, 0.0)
        self.steps: list[Any] = [0.0] * self.deepest
        self.norms: list[Any] = [0.0] * self.deepest
        self.loads: list[list[Any]] = []  # one list per looped layer with experts
        self.tokens = 0

    def motion(self, n: int, before: Tensor, after: Tensor) -> None:
        norm = torch.linalg.vector_norm(after, dim=-1, dtype=torch.float32)
        moved = torch.linalg.vector_norm(after - before, dim=-1, dtype=torch.float32)
        self.steps[n] += (moved / norm.clamp_min(torch.finfo(torch.float32).tiny)).sum()
        self.norms[n] += norm.sum()

    def add_loads(self, tally: Tally) -> None:
        layers = [visits for (stage, _), visits in sorted(tally.loads.items()) if stage == "loop"]
        old = self.loads or [[0] * self.deepest for _ in layers]
        self.loads = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(old, layers, strict=True)]

    def sweep(self, trained: int, tokens_per_byte: float) -> Sweep:
        nats = [float(total) / self.tokens for total in self.nats.values()]
        return Sweep(
            loops=list(self.nats),
            bits_per_byte=[n / math.log(2) * tokens_per_byte for n in nats],
            nats_per_token=nats,
            trained_loops=trained,
            relative_step=[float(total) / self.tokens for total in self.steps],
            state_norm=[float(total) / self.tokens for total in self.norms],
            expert_load=[_shares(loads) for loads in zip(*self.loads, strict=True)],
        )


def _shares(loads: Sequence[Float[Tensor, "E"]] | Sequence[Tensor]) -> list[float]:
    """The share of its layer's choices that each expert had."""
    return [float(share) for load in loads for share in load.double() / load.sum()]


def _check(model: LoopedLM, wanted: Sequence[int], length: int) -> None:
    if model.loop is None:
        raise ValueError("the model has no loop, so there is no depth to sweep")
    if min(wanted) < 1:
        raise ValueError(f"a loop takes at least one step, got {min(wanted)}")
    if length > model.config.context:
        raise ValueError(f"rows of {length} tokens do not fit the model's context of {model.config.context}")
