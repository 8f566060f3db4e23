"""Run by torchrun on two processes: what sharding the whole loop as one unit gives, as JSON on rank 0.

Communication per update at several depths, equal and unequal on the ranks; weights gathered in bfloat16; the
same with the experts shared out, on as many processes as there are.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos.data.batch import Batch
from open_mythos.loop.halt import ACT
from open_mythos.loop.schedule import Plan
from open_mythos.nn.context import Context
from open_mythos.presets.ouro import Size, ouro
from open_mythos.train.objective import Objective
from open_mythos.train.parallel import World, expert_mesh, gathered, join, shard, whole
from open_mythos.train.readout import LearnedExit, TaughtExit
from open_mythos.train.recipes import small_mythos

# For two rows on each rank; those who share out experts have the same, others may go deeper.
PLANS = (Plan(3), Plan(3, grad=1), Plan((1, 3, 5, 2), (1, 2, 2, 2)), Plan((1, 1, 1, 3), (1, 1, 1, 1)))
DEPTHS = {"2": (2, 2), "7": (7, 7), "1 and 6": (1, 6), "rows apart": ((1, 4), (5, 2))}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with join(torch.device("cpu"), 60) as world:
        found = whole_loop(world) if world.size == 2 else {}
        apart = replace(world, expert_parallel=2, apart=expert_mesh("cpu", world.size, 2))
        found["apart"] = {
            "stacks": experts_at_work(apart),
            "gradients": [same_gradients(apart, plan, remat) for plan in PLANS for remat in (False, True)],
            "bfloat16": half_precision(apart),
            "sample": same_sample(apart),
            "halting": same_halting(apart),
        }
        if world.rank == 0:
            out.write_text(json.dumps(found))


def whole_loop(world: World) -> dict[str, Any]:
    counts = {}
    for remat in (False, True):
        for name, steps in DEPTHS.items():
            counts[f"{name}{' remat' if remat else ''}"] = count(world, steps[world.rank], remat)
    return {
        "counts": counts,
        "bfloat16": half_precision(world),
        "sample": same_sample(world),
        "exits": [same_exits(readout, world) for readout in (LearnedExit(), TaughtExit())],
    }


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


def experts_at_work(world: World) -> list[int]:
    """How many experts this rank computes with at a time, of eight."""
    model = shard(small_mythos(dim=16, heads=2, vocab=64).build(), world, torch.float32)
    with Stacks() as seen:
        update(model, 3)
    return sorted(seen.sizes)


class Stacks(TorchDispatchMode):
    """Which stacks of experts are multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "open_mythos":
            self.sizes |= {len(arg) for arg in args if isinstance(arg, torch.Tensor) and arg.ndim == 3}
        return func(*args, **(kwargs or {}))


def same_gradients(world: World, plan: Plan, remat: bool) -> float:
    """The most by which the gradient differs from that of one process with the rows of all ranks."""
    torch.manual_seed(3)
    model = small_mythos(dim=16, heads=2, vocab=64).build()
    assert model.loop is not None
    model.loop.remat = remat
    rng = Generator().manual_seed(1)
    tokens, targets = torch.randint(0, 64, (2, 2 * world.size, 8), generator=rng)
    mine = world.of_plan(Plan(*(n[: 2 * world.plans] if isinstance(n, tuple) else n for n in plan)))
    split = [each.split(2) for each in world.each(mine)]
    frozen, live = (sum(part, ()) for part in zip(*split, strict=True))
    everyones = Plan(tuple(f + n for f, n in zip(frozen, live, strict=True)), live)
    Objective().score(model, [targets], everyones, Context.counting(tokens)).total.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    shard(model, world, torch.float32)
    rows = slice(2 * world.rank, 2 * world.rank + 2)
    scored = Objective().score(model, [targets[rows]], mine, Context.counting(tokens[rows]))
    (world.size * scored.total).backward()
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, gradient in expected.items() if gradient is not None}
    return max(float((gradient - expected[name]).abs().max()) for name, gradient in found.items())


def same_halting(world: World) -> dict[str, Any]:
    """Tokens that a rule lets leave early on one rank stay, as long as another rank's are on their way."""
    torch.manual_seed(3)
    model = small_mythos(dim=16, heads=2, vocab=64)
    assert model.loop is not None
    model = model.replace(loop=model.loop.replace(halt=ACT())).build().eval()
    model.loop.halt.score.bias.data.fill_(-1.0)
    model.loop.halt.score.weight.data.mul_(10)
    turns: list[int] = []
    model.loop.layers[0].register_forward_hook(lambda *_: turns.append(1))
    tokens = torch.randint(0, 64, (world.size, 3), generator=Generator().manual_seed(1))[[world.rank]]
    with torch.no_grad():
        expected, alone = model(tokens, 9), len(turns)
        found = shard(model, world, torch.float32)(tokens, 9)
    same = bool(torch.allclose(found, expected, atol=1e-5))
    return {"alone": world.each(alone), "together": world.each(len(turns) - alone), "same": world.each(same)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
