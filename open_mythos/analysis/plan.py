"""What training a model on a cluster takes: memory per GPU, tokens per second, days, money.

Counted from the model on the meta device, for the way `train/parallel.py` works:

    kept       float32 weights, gradients and optimizer state, cut over all N GPUs
    gathered   bfloat16 weights of the root and of the loop, which is one unit, and the loop's gradient
               before it is cut (bfloat16, and float32 to be added up)
    live       what the backward pass needs of one micro-batch, with or without recomputing each turn
    speed      utilisation * peak * N / FLOPs of a token:  3 forward passes where gradient flows, 1 where not,
               and one more of the loop where turns are recomputed

A mesh A x B is A groups of B GPUs that share out the routed experts and never gather each other's (expert
parallelism; `expert_parallel=B` of a recipe).
Law: halving memory by doubling GPUs, and every count against a model that is really built
(tests/unit/analysis/test_plan.py).
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from open_mythos.analysis.compute import Flops, flops, on_meta, parameters
from open_mythos.loop.schedule import Plan as Depth
from open_mythos.loop.schedule import Ramp
from open_mythos.model import LoopedLM, Model
from open_mythos.nn.context import Context
from open_mythos.train.loss import CHUNK_BYTES, CHUNK_ROWS
from open_mythos.train.optim import AdamW, Optimiser
from open_mythos.train.parallel import check_expert_parallel, expert_counts
from open_mythos.train.roles import roles

LENGTHS = 32, 64  # sequences on which activations are counted
USABLE = 0.9  # of a GPU's memory


class Gpu(NamedTuple):
    """Dense bfloat16 FLOPs per second and bytes, by the makers' data sheets; what an hour costs is a guess at
    a typical rent and should be given anew."""

    peak: float
    memory: float
    hourly: float


GPUS = {
    "a100": Gpu(312e12, 80e9, 1.8),
    "h100": Gpu(989e12, 80e9, 2.8),
    "h200": Gpu(989e12, 141e9, 3.5),
    "b200": Gpu(2250e12, 180e9, 5.5),
    "mi300x": Gpu(1307e12, 192e9, 3.0),
    "l40s": Gpu(362e12, 48e9, 1.0),
    "rtx4090": Gpu(165e12, 24e9, 0.5),
}


class Mesh(NamedTuple):
    """`data` x `expert` GPUs, of which each `expert` ones share out the routed experts."""

    data: int
    expert: int = 1

    @property
    def gpus(self) -> int:
        return self.data * self.expert

    @classmethod
    def spoken(cls, text: str) -> "Mesh":
        """`512` or `8x64`. Raises `ValueError` for anything else."""
        parts = text.lower().split("x")
        if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"a mesh is a number of GPUs or data x expert, as in 512 or 8x64; got {text!r}")
        return cls(*map(int, parts))


class Memory(NamedTuple):
    """Bytes on each GPU."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return sum(self)


class Work(NamedTuple):
    """How a model is trained: `rows` sequences of `length` tokens on each GPU at a time."""

    length: int
    rows: int = 1
    remat: bool = True
    optimiser: Optimiser = AdamW()


# Parts that belong to no unit of their own.
ROOT = "embed", "ngrams", "head", "enter", "norm", "readout"


def memory(model: Model, mesh: Mesh, work: Work) -> Memory:
    """What one GPU holds at the worst moment, the loop's backward pass, without fragmentation.

    Raises `ValueError` if the routed experts cannot be shared out as the mesh says.
    """
    check_expert_parallel(model, mesh.expert)
    counted = parameters(model)
    per_gpu = counted.total / mesh.gpus
    root = sum(counted.by_part.get(name, 0) for name in ROOT)
    looped_experts = _looped_experts(model)
    loop = counted.looped - looped_experts + looped_experts / mesh.expert
    # Experts that are shared out stay gathered for a whole call, also those outside of the loop.
    others = (counted.experts - looped_experts) / mesh.expert if mesh.expert > 1 else 0
    return Memory(
        weights=4 * per_gpu,
        gradients=4 * per_gpu,
        optimizer=4 * optimizer_numbers(model, work.optimiser) / mesh.gpus,
        gathered=2 * (root + loop + others) + (2 + 4) * loop if mesh.gpus > 1 else 0.0,
        activations=work.rows * work.length * activation_bytes(model, work.remat),
        loss=2 * max(CHUNK_BYTES, 4 * CHUNK_ROWS * model.vocab) + 4 * model.vocab * model.dim,
    )


@cache
def optimizer_numbers(model: Model, optimiser: Optimiser) -> int:
    """Numbers that the optimizer remembers: two for each weight under AdamW, one under Muon."""
    lm = on_meta(model)
    kinds = roles(lm)
    sizes = {name: parameter.numel() for name, parameter in lm.named_parameters()}
    alone = not isinstance(optimiser, AdamW)
    return sum(size * (1 if alone and kinds[name].kind == "matrix" else 2) for name, size in sizes.items())


@cache
def activation_bytes(model: Model, remat: bool, depth: int | None = None) -> float:
    """Bytes per token that the backward pass needs, in bfloat16, at the mean depth of training.

    Counted on short sequences, less what grows with their square, which fused attention does not keep. With
    `remat` a turn keeps the state it began with, and the turn being recomputed all of its own.
    """
    lm = on_meta(model).train().to(torch.bfloat16)
    one = _per_token([_saved(lm, length, 1) for length in LENGTHS])
    if lm.loop is None:
        return one
    turn = _per_token([_saved(lm, length, 2) for length in LENGTHS]) - one
    turns = _with_gradient(model, lm.steps if depth is None else depth)
    state = 2 * 2 * model.dim  # h and the answer so far
    return one - turn + (turns * state + turn if remat else turns * turn)


@cache
def training_flops(model: Model, work: Work) -> float:
    """FLOPs of one token, forward and backward, at the mean depth; causal attention looks back half way."""
    counted: Flops = flops(model)
    context = work.length / 2
    once = counted.once + counted.once_attention * context
    turn = counted.per_loop + counted.per_loop_attention * context
    steps = on_meta(model).steps
    live = _with_gradient(model, steps)
    return 3 * once + (4 if work.remat else 3) * live * turn + (steps - live) * turn


class Forecast(NamedTuple):
    """`fits` leaves a tenth of the GPU to the allocator and the driver."""

    memory: Memory
    fits: bool
    flops_per_token: float
    tokens_per_second: float
    days: float
    cost: float


def forecast(model: Model, mesh: Mesh, work: Work, gpu: Gpu, tokens: float, utilisation: float) -> Forecast:
    """Raises `ValueError` for a utilisation outside (0, 1] and for no tokens."""
    if not 0 < utilisation <= 1:
        raise ValueError(f"a GPU is used from 0 to 1 of its peak, got {utilisation}")
    if not tokens > 0:
        raise ValueError(f"training needs some tokens, got {tokens:g}")
    per_token = training_flops(model, work)
    speed = utilisation * gpu.peak * mesh.gpus / per_token
    held = memory(model, mesh, work)
    hours = tokens / speed / 3600
    fits = held.total <= USABLE * gpu.memory
    return Forecast(held, fits, per_token, speed, hours / 24, hours * mesh.gpus * gpu.hourly)


def mesh_that_fits(model: Model, mesh: Mesh, work: Work, gpu: Gpu) -> Mesh | None:
    """The least expert parallelism on as many GPUs with which the model fits, if any does."""
    counts = expert_counts(model) or {1}
    for groups in (2**n for n in range(int(math.log2(mesh.gpus)) + 1)):
        there = Mesh(mesh.gpus // groups, groups)
        if (
            mesh.gpus % groups == 0
            and not any(count % groups for count in counts)
            and memory(model, there, work).total <= 0.9 * gpu.memory
        ):
            return there
    return None


def _with_gradient(model: Model, steps: int) -> int:
    if model.loop is None:
        return 0
    schedule = model.loop.schedule
    within = schedule.of if isinstance(schedule, Ramp) else schedule
    return min(steps, within.grad or steps)


@cache
def _looped_experts(model: Model) -> int:
    inside = parameters(model).experts
    outside = parameters(model.replace(loop=None)).experts
    return inside - outside


def _per_token(saved: list[int]) -> float:
    """a of a T + b T^2, for T = LENGTHS."""
    (s, t), (f, g) = LENGTHS, saved
    return f / s - (g / t - f / s) / (t - s) * s


def _saved(lm: LoopedLM, length: int, steps: int) -> int:
    """Bytes kept for the backward pass of one sequence, each tensor once, the weights not counted."""
    ours = {p.untyped_storage()._cdata for p in lm.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = lm.features(tokens, None if lm.loop is None else Depth(steps), Context.counting(tokens))
        assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in ours)
