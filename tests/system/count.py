"""Run by torchrun on two processes: what sharding the whole loop as one unit gives, as JSON on rank 0.

Communication per update at several depths, equal and unequal on the ranks; weights gathered in bfloat16.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Generator
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos.data.batch import Batch
from open_mythos.loop.schedule import Plan
from open_mythos.nn.context import Context
from open_mythos.presets.ouro import Size, ouro
from open_mythos.train.objective import Objective
from open_mythos.train.parallel import World, gathered, join, shard
from open_mythos.train.readout import LearnedExit, TaughtExit
from open_mythos.train.recipes import small_mythos

DEPTHS = {"2": (2, 2), "7": (7, 7), "1 and 6": (1, 6), "rows apart": ((1, 4), (5, 2))}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with join(torch.device("cpu"), 60) as world:
        counts = {}
        for remat in (False, True):
            for name, steps in DEPTHS.items():
                counts[f"{name}{' remat' if remat else ''}"] = count(world, steps[world.rank], remat)
        found = {
            "counts": counts,
            "bfloat16": half_precision(world),
            "sample": same_sample(world),
            "exits": [same_exits(readout, world) for readout in (LearnedExit(), TaughtExit())],
        }
        if world.rank == 0:
            out.write_text(json.dumps(found))


def batch() -> Batch:
    tokens = torch.randint(0, 64, (2, 9), generator=Generator().manual_seed(1))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def count(world: World, steps: int | tuple[int, ...], remat: bool) -> dict[str, int]:
    """Collectives by name, in the second of two updates (the first sets things up)."""
    model = shard(small_mythos(dim=16, heads=2, vocab=64).build(), world, torch.float32)
    assert model.loop is not None
    model.loop.remat = remat
    for _ in range(2):
        with Listening() as heard:
            update(model, steps)
    return dict(heard.counts)


class Listening(TorchDispatchMode):
    """Counts what goes to other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def update(model: torch.nn.Module, steps: int | tuple[int, ...]) -> None:
    tokens, targets, _ = batch()
    scored = Objective().score(model, [targets], Plan(steps), Context.counting(tokens))
    scored.total.backward()


def half_precision(world: World) -> str:
    """Weights gathered in bfloat16 without autocast around them would meet float32 activations."""
    model = shard(small_mythos(dim=16, heads=2, vocab=64).build(), world, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        update(model, 3)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.to_local().isfinite().all() for g in gradients)
    return str({g.dtype for g in gradients})


def same_sample(world: World) -> bool:
    """The verbs by themselves, as generation calls them, on a sharded model and on a whole one."""
    torch.manual_seed(3)
    model = small_mythos(dim=16, heads=2, vocab=64).build().eval()
    tokens = batch().tokens
    expected = model(tokens, 3)
    shard(model, world, torch.float32)
    with torch.no_grad(), gathered(model):
        ctx = Context.counting(tokens)
        state = model.encode(tokens, ctx)
        for n in range(3):
            step = torch.full((len(tokens),), n)
            state = model.step(state, ctx.turn(step, [n] * len(tokens)), step, step == 2)
        found = model.read(state, ctx)
    return bool(torch.allclose(found, expected, atol=1e-5))


def same_exits(readout: LearnedExit | TaughtExit, world: World) -> bool:
    """The gate is asked outside of the loop that it is sharded with, and learns what one process would."""
    torch.manual_seed(3)
    model = ouro(Size(vocab=64, dim=16, width=16, heads=2, layers=1)).build()
    tokens, targets, _ = batch()
    objective = Objective(readout=readout)
    objective.score(model, [targets], Plan(3), Context.counting(tokens)).total.backward()
    expected = model.loop.halt.score.weight.grad.clone()
    model.zero_grad()
    shard(model, world, torch.float32)
    mine = slice(world.rank, world.rank + 1)
    scored = objective.score(model, [targets[mine]], Plan(3), Context.counting(tokens[mine]))
    (world.size * scored.total).backward()
    return bool(torch.allclose(model.loop.halt.score.weight.grad.full_tensor(), expected, atol=1e-5))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
