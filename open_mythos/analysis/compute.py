"""Parameters, FLOPs and bytes of a model: counted from the model itself on the meta device, not recited.

    parameters(model)      how many there are, what they are for, how many a token uses
    flops(model)           of one token: once (prelude, coda, head), and per turn of the loop
    cache_bytes(model, .)  that one token leaves in a cache, under each policy

FLOPs are those of matrix products, two for a multiplication and an addition, as PyTorch's `FlopCounterMode`
counts them; the attention's part, which grows with the context, is told apart by counting two lengths.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM, Model
from open_mythos.nn.cache import Folded, KVCache, PerLoop, Policy
from open_mythos.nn.context import Context
from open_mythos.nn.moe import MixtureOfExperts
from open_mythos.shapes import Tokens

LENGTHS = 32, 64  # any two will do: attention is a parabola without a constant


class Parameters(NamedTuple):
    """`by_part` adds up to `total`. `active` are those that work on one token: of the routed experts only the
    chosen, of the tables one row. `unrolled` counts the active ones once for every time they are applied."""

    total: int
    by_part: dict[str, int]
    tables: int
    matrices: int
    experts: int
    looped: int
    active: int
    unrolled: int


class Flops(NamedTuple):
    """Per token. The two `attention` numbers are for every token of the context that is looked back on."""

    once: float
    per_loop: float
    once_attention: float
    per_loop_attention: float

    def token(self, loops: float, context: int = 0) -> float:
        """FLOPs of one token that takes so many turns, with so many tokens before it."""
        turn = self.per_loop + self.per_loop_attention * context
        return self.once + self.once_attention * context + loops * turn


def on_meta(model: Model) -> LoopedLM:
    """The model without storage: any size is built in a moment."""
    with torch.device("meta"):
        return model.build().eval()


def parameters(model: Model, loops: int | None = None) -> Parameters:
    """Counts; `loops` (the mean of training, if none is said) only matters for `unrolled`."""
    lm = on_meta(model)
    loops = lm.steps if loops is None else loops
    looped = 0 if lm.loop is None else _size(lm.loop)
    idle = _idle(lm)
    idle_looped = 0 if lm.loop is None else _idle(lm.loop)
    total = _size(lm)
    return Parameters(
        total=total,
        by_part=_parts(lm),
        tables=sum(m.weight.numel() for m in lm.modules() if isinstance(m, nn.Embedding)),
        matrices=sum(p.numel() for p in _matrices(lm)),
        experts=sum(p.numel() for m in _experts(lm) for p in (m.gate_up, m.down)),
        looped=looped,
        active=total - idle,
        unrolled=total - idle + (loops - 1) * (looped - idle_looped) if lm.loop is not None else total - idle,
    )


def flops(model: Model) -> Flops:
    """FLOPs of the forward pass, per token."""
    lm = on_meta(model.replace(context=max(model.context, *LENGTHS)))
    one = _line([_count(lm, length, 1) for length in LENGTHS])
    if lm.loop is None:
        return Flops(one[0], 0.0, one[1], 0.0)
    two = _line([_count(lm, length, 2) for length in LENGTHS])
    turn = two[0] - one[0], two[1] - one[1]
    return Flops(one[0] - turn[0], turn[0], one[1] - turn[1], turn[1])


def cache_bytes(
    model: Model, policy: Policy, loops: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes that one token leaves in a cache of `dtype` when it takes all steps of this depth.

    Counted for one step and for two, since all slots but the first are alike.
    """
    lm = on_meta(model).to(dtype)
    loops = lm.steps if loops is None else loops
    if lm.loop is None or isinstance(policy, Folded):
        return _held(lm, policy, loops)
    slots = len({policy.slot(step) for step in range(loops)})
    one, two = (_held(lm, PerLoop(), steps) for steps in (1, 2))
    return one + (slots - 1) * (two - one)


def _held(lm: LoopedLM, policy: Policy, steps: int) -> int:
    """Bytes in a cache after one token."""
    cache = KVCache(rows=1, capacity=1, policy=policy)
    with torch.no_grad():
        lm.features(_tokens(1), None if lm.loop is None else Plan(steps), cache=cache)
    return cache.nbytes // 2  # the other half is the column that padding writes to


def _parts(lm: LoopedLM) -> dict[str, int]:
    """Parameters of each part of the model, in the order in which a token meets them."""
    loop = (
        {} if lm.loop is None else {f"loop.{name}": _size(child) for name, child in lm.loop.named_children()}
    )
    rest = {name: _size(child) for name, child in lm.named_children() if name != "loop"}
    rest["head"] = 0 if lm.config.tied else rest.get("head", 0)
    order = ("embed", "ngrams", "prelude", "enter", *loop, "readout", "coda", "norm", "head")
    return {name: count for name in order if (count := (rest | loop).get(name, 0))}


def _idle(module: nn.Module) -> int:
    """What does not work on a given token: routed experts that it did not choose, rows of other tokens."""
    idle = sum(
        (m.weight.shape[0] - 1) * m.weight.shape[1] for m in module.modules() if isinstance(m, nn.Embedding)
    )
    if isinstance(module, LoopedLM) and module.config.tied:
        idle -= (module.embed.weight.shape[0] - 1) * module.embed.weight.shape[1]  # the head uses every row
    for moe in _experts(module):
        expert = (moe.gate_up.numel() + moe.down.numel()) // moe.config.experts
        idle += (moe.config.experts - moe.config.chosen) * expert
    return idle


def _experts(module: nn.Module) -> list[MixtureOfExperts]:
    return [part for part in module.modules() if isinstance(part, MixtureOfExperts)]


def _matrices(lm: LoopedLM) -> list[nn.Parameter]:
    """What multiplies a token's vector: everything of two axes and more that is not looked up by row."""
    tables = {id(m.weight) for m in lm.modules() if isinstance(m, nn.Embedding)}
    return [p for p in lm.parameters() if p.ndim > 1 and id(p) not in tables]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _tokens(length: int) -> Tokens:
    return torch.zeros(1, length, dtype=torch.long, device="meta")


def _count(lm: LoopedLM, length: int, steps: int) -> int:
    tokens = _tokens(length)
    plan = None if lm.loop is None else Plan(steps)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lm(tokens, plan, ctx=Context.counting(tokens))
    return int(counter.get_total_flops())


def _line(counts: list[int]) -> tuple[float, float]:
    """a, b of counts = a T + b T^2: FLOPs per token, and per pair of tokens."""
    (s, t), (f, g) = LENGTHS, counts
    b = (g / t - f / s) / (t - s)
    return f / s - b * s, b


@register_flop_formula(torch.ops.open_mythos.grouped_swiglu)  # type: ignore[untyped-decorator]
def _grouped_swiglu_flops(
    x: tuple[int, ...], gate_up: tuple[int, ...], down: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """Every row goes through the three matrices of its expert."""
    return 2 * x[0] * (gate_up[1] * gate_up[2] + down[1] * down[2])


@register_flop_formula(torch.ops.open_mythos.grouped_swiglu_backward)  # type: ignore[untyped-decorator]
def _grouped_swiglu_backward_flops(
    grad: tuple[int, ...],
    x: tuple[int, ...],
    gate_up: tuple[int, ...],
    down: tuple[int, ...],
    *_: Any,
    **__: Any,
) -> int:
    """Twice the forward pass: once for the input, once for the weights."""
    return 2 * _grouped_swiglu_flops(x, gate_up, down)
