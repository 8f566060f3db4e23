"""The verbs for one row of one token on a CPU, with the modules taken apart.

A token of a small model is a thousand small operations, and nearly half of its time goes to what is known
before the first of them: which parts a module has, how wide its heads are, which kernel suits a weight, that
there is no gradient and no padding. Here every part is asked once, and answers with a function of one vector
that holds its weights and does the arithmetic. Nothing is compiled and no weight is copied, so there is
nothing to wait for.

A part that has no such function here, or that somebody listens to by a hook, is called as it is; and where a
call is not of this kind (more rows or tokens, padding, another cache, the first time a step is taken) the
plain verb does it. Oracle: the plain verbs (tests/unit/infer/test_alone.py).
"""

import math
from collections.abc import Callable
from typing import TypeGuard, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as modules

from open_mythos.loop.adapt import LowRankAdaptation, NoAdaptation
from open_mythos.loop.core import LoopCore, Take
from open_mythos.loop.halt import AdaptiveHalting
from open_mythos.loop.inject import AddInjection, NoInjection, NormedAddInjection
from open_mythos.loop.mark import NoMark, SinusoidMark
from open_mythos.loop.recall import NoRecall
from open_mythos.loop.route import NoRouting
from open_mythos.loop.state import State
from open_mythos.loop.update import LTIUpdate, ReplaceUpdate
from open_mythos.model import LoopedLM
from open_mythos.nn.attend import attend_latents
from open_mythos.nn.attention import GroupedAttention, LatentAttention
from open_mythos.nn.block import PreNormBlock
from open_mythos.nn.cache import KVCache, Slots
from open_mythos.nn.context import Context, Sight
from open_mythos.nn.experts import swiglu
from open_mythos.nn.ffn import GatedFeedForward
from open_mythos.nn.linear import Projection
from open_mythos.nn.moe import MixtureOfExperts
from open_mythos.nn.norm import RootMeanSquareNorm, normed_alone
from open_mythos.nn.precision import outside_autocast
from open_mythos.nn.product import linear_alone
from open_mythos.nn.rope import Rope, turned
from open_mythos.shapes import Features, Hidden, PerSequence, Steps, Tokens

Vector = Float[Tensor, "D"]
Heads = Float[Tensor, "... K"]
Map = Callable[[Vector], Vector]
Layer = Callable[[Vector, Context], Vector]
Where = tuple[str, int]  # stage and layer
Kind = TypeVar("Kind", bound=nn.Module)


def apart(model: LoopedLM) -> "AloneVerbs | LoopedLM":
    """The verbs for one row; the model itself where they would not suit its weights."""
    fits = all(type(p) is nn.Parameter and p.is_cpu and p.dtype == torch.float32 for p in model.parameters())
    return AloneVerbs(model) if fits and not modules._has_any_global_hook() else model


@final
class AloneVerbs:
    """`encode`, `step` and `decode` as `LoopedLM` has them in eval mode, without gradient; in float32 under
    autocast too, since to lower the weights would cost one row more than it saves.

    Made for one generation: hooks that are added and numbers worked out from weights that are changed later
    are not noticed.
    """

    @torch.no_grad()
    def __init__(self, model: LoopedLM) -> None:
        self.model = model
        self._prelude = [_block(block, ("prelude", i)) for i, block in enumerate(model.prelude)]
        self._coda = [_block(block, ("coda", i)) for i, block in enumerate(model.coda)]
        self._enter, self._readout, self._norm = map(_map, (model.enter, model.readout, model.norm))
        self._take = None if model.loop is None else _take(model.loop)

    def encode(self, tokens: Tokens, ctx: Context, *, start: Hidden | None = None) -> State:
        seen = self._seeing(ctx)
        if seen is None or self.model.ngrams is not None:
            return self.model.encode(tokens, ctx, start=start)
        x = (self.model.embed(tokens) * self.model.config.embed_scale).view(-1)
        with outside_autocast(x):
            for block in self._prelude:
                x = block(x, seen)
            x = _row(self._enter(x))
        if start is not None or self.model.loop is None:
            return State.begin(x, x if start is None else start.to(x))
        return self.model.loop.begin(x)

    def step(self, state: State, ctx: Context, step: Steps, last: PerSequence) -> State:
        number = ctx.place.step
        seen = self._seeing(ctx, number) if isinstance(number, int) else None
        if seen is None or self._take is None:
            return self.model.step(state, ctx, step, last)
        with outside_autocast(state.h):
            return self._take(state, seen, step, last)

    def decode(self, state: State, ctx: Context) -> Features:
        seen = self._seeing(ctx)
        if seen is None:
            return self.model.decode(state, ctx)
        x = self.model.between(state.answer).view(-1).float()
        with outside_autocast(x):
            x = self._readout(x)
            for block in self._coda:
                x = block(x, seen)
            return _row(self._norm(x))

    def _seeing(self, ctx: Context, step: int | None = None) -> Context | None:
        """`ctx` with the buffers of one step as its cache, where it is of one row, in step and unpadded."""
        if not isinstance(ctx.cache, KVCache) or not _is_simple(ctx) or self.model.training:
            return None
        slots = ctx.cache.slots(ctx.span, step)
        return None if slots is None else ctx.but(cache=slots)


def _is_simple(ctx: Context) -> bool:
    """One token behind others, which sees all of them; and nobody wants a gradient."""
    special = ctx.mask, ctx.documents, ctx.columns, ctx.lender, ctx.rows, ctx.tally
    return (
        ctx.positions.shape == (1, 1)
        and bool(ctx.start)
        and all(part is None for part in special)
        and not torch.is_grad_enabled()
    )


def _take(loop: LoopCore) -> Take | None:
    """One step of the loop; none where tokens remember, choose or borrow."""
    if not (_is(loop.recall, NoRecall) and _is(loop.route, NoRouting) and not loop.lent):
        return None
    mark, inject, adapt = _mark(loop.mark), _inject(loop.inject), _adapt(loop.adapt)
    update, halt = _update(loop.update), _halt(loop.halt)
    layers = [_block(block, ("loop", i)) for i, block in enumerate(loop.layers)]

    def take(state: State, ctx: Context, step: Steps, last: PerSequence) -> State:
        h, e = state.h.view(-1).float(), state.e.view(-1).float()
        marked = mark(h, step, ctx)
        y = inject(marked, e)
        for layer in layers:
            y = layer(y, ctx)
        h = update(h, e, adapt(y, step, ctx))
        return halt(state, marked, h, last, ctx)

    return take


def _block(block: nn.Module, where: Where) -> Layer:
    if not _is(block, PreNormBlock) or block.mixer_scale is not None:
        return _called(block, where)
    mixer_norm, ffn_norm = _map(block.mixer_norm), _map(block.ffn_norm)
    mixer, ffn = _mixer(block.mixer, where), _ffn(block.ffn, where)

    def run(x: Vector, ctx: Context) -> Vector:
        x = x + mixer(mixer_norm(x), ctx)
        return x + ffn(ffn_norm(x), ctx)

    return run


def _map(part: nn.Module | None) -> Map:
    """A norm or a product."""
    if part is None:
        return lambda x: x
    if _is(part, RootMeanSquareNorm) and part.weight is not None and part.eps > 0:
        weight, eps = part.weight, part.eps
        return lambda x: normed_alone(x, weight, eps)
    if _is(part, nn.Linear) and type(part) in (Projection, nn.Linear):
        return linear_alone(part.weight, part.bias)
    return lambda x: part(_row(x)).view(-1)


def _mixer(mixer: nn.Module, where: Where) -> Layer:
    if _is(mixer, LatentAttention) and _has_usual_latents(mixer):
        return _latent(mixer, where)
    if _is(mixer, GroupedAttention) and _has_usual_heads(mixer):
        return _grouped(mixer, where)
    return _called(mixer, where)


def _has_usual_latents(mixer: LatentAttention) -> bool:
    c = mixer.config
    aligned = c.nope_dim % 2 == c.kv_rank % 2 == 0  # pairs begin at even places
    return aligned and _are_usual(mixer.q_down, mixer.q_up, mixer.kv_down, mixer.kv_up, mixer.out)


def _has_usual_heads(mixer: GroupedAttention) -> bool:
    extras = mixer.q_bias, mixer.q_norm, mixer.values
    usual = mixer.config.rope is not None and all(part is None for part in extras)
    return usual and _are_usual(mixer.q, mixer.k, mixer.v, mixer.out)


def _are_usual(*maps: nn.Module) -> bool:
    """Not such as differ by step, and not somebody's own."""
    return all(type(part) is Projection for part in maps)


def _grouped(mixer: GroupedAttention, where: Where) -> Layer:
    heads, groups, width, rope = mixer.config.heads, mixer.kv_heads, mixer.width, mixer.config.rope
    assert rope is not None
    to_q, to_k, to_v, out = map(_map, (mixer.q, mixer.k, mixer.v, mixer.out))
    # The scale of the scores comes with the turn of the queries.
    turn_q, turn_k = _turn(rope, width, width**-0.5), _turn(rope, width)

    def mix(x: Vector, ctx: Context) -> Vector:
        q = turn_q(to_q(x).view(heads, width), ctx).view(groups, -1, width)
        k = turn_k(to_k(x).view(groups, width), ctx)
        keys, values = _held(ctx, where, k, 0), _held(ctx, where, to_v(x).view(groups, width), 1)  # G S K
        weights = torch.bmm(q, keys.mT).softmax(-1)
        return out(torch.bmm(weights, values).view(-1))

    return mix


def _latent(mixer: LatentAttention, where: Where) -> Layer:
    c = mixer.config
    q_down, q_norm, q_up = map(_map, (mixer.q_down, mixer.q_norm, mixer.q_up))
    kv_down, kv_norm, out = map(_map, (mixer.kv_down, mixer.kv_norm, mixer.out))
    up = mixer.kv_up.weight.view(c.heads, -1, c.kv_rank)
    to_key, to_value = up[:, : c.nope_dim], up[:, c.nope_dim :].mT  # H nope R, H R value
    turn, everything, halves = _turn(c.rope, c.rope_dim), Sight(), (c.nope_dim, c.rope_dim)

    def mix(x: Vector, ctx: Context) -> Vector:
        q_nope, q_rope = q_up(q_norm(q_down(x))).view(c.heads, -1).split_with_sizes(halves, 1)
        latent, k_rope = kv_down(x).split_with_sizes((c.kv_rank, c.rope_dim))
        held = _held(ctx, where, torch.cat([kv_norm(latent), turn(k_rope, ctx)]), 0)  # S W
        query = torch.bmm(q_nope[:, None], to_key)  # H 1 R
        query = torch.cat([query, turn(q_rope, ctx)[:, None]], dim=-1)  # H 1 W
        mixed = attend_latents(query[None], held[None, None], c.kv_rank, everything, mixer.scale)
        return out(torch.bmm(mixed[0], to_value).view(-1))

    return mix


def _turn(rope: Rope, width: int, scale: float = 1.0) -> Callable[[Heads, Context], Heads]:
    """Rotary embedding of heads at the token's position, and a factor of their length."""
    key = "alone", rope.base, rope.scaling, width, scale

    def turns(ctx: Context) -> Tensor:
        return ctx.once(key, lambda: torch.complex(*rope.turns(width, ctx)).flatten() * scale)

    def turn_halves(x: Heads, ctx: Context) -> Heads:
        z = torch.complex(*x.chunk(2, -1)) * turns(ctx)
        return torch.cat([z.real, z.imag], dim=-1)

    return turn_halves if rope.pairs == "halves" else lambda x, ctx: turned(x, turns(ctx))


def _held(ctx: Context, where: Where, new: Float[Tensor, "... W"], part: int) -> Float[Tensor, "... S W"]:
    """Remember what is new of this token and return all that is held there."""
    assert isinstance(ctx.cache, Slots)
    assert ctx.start is not None
    held = ctx.cache.held[(*where, part)][0]
    held.select(-2, ctx.start).copy_(new)
    return held.narrow(-2, 0, ctx.end).to(new.dtype)  # it may have been filled under autocast


def _ffn(ffn: nn.Module, where: Where) -> Layer:
    if _is(ffn, GatedFeedForward) and _are_usual(ffn.gate_up, ffn.down):
        gated = _gated(_map(ffn.gate_up), _map(ffn.down))
        return lambda x, ctx: gated(x)
    if _is(ffn, MixtureOfExperts) and ffn.spread is None:
        return _experts(ffn)
    return _called(ffn, where)


def _gated(gate_up: Map, down: Map) -> Map:
    return lambda x: down(swiglu(gate_up(x)))


def _experts(moe: MixtureOfExperts) -> Layer:
    router, bias, k = linear_alone(moe.router), moe.bias, moe.config.chosen
    pairs = zip(moe.gate_up.unbind(), moe.down.unbind(), strict=True)
    experts = [_gated(linear_alone(gate_up), linear_alone(down)) for gate_up, down in pairs]
    shared = None
    if moe.shared_gate_up is not None:
        shared = _gated(_map(moe.shared_gate_up), _map(moe.shared_down))

    def run(x: Vector, ctx: Context) -> Vector:
        scores = router(x)
        chosen = (scores + bias).topk(k).indices
        weights = scores.gather(0, chosen).softmax(-1).tolist()
        y = torch.zeros_like(x) if shared is None else shared(x)
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            y.add_(experts[expert](x), alpha=weight)
        return y

    return run


def _mark(mark: nn.Module) -> Callable[[Vector, Steps, Context], Vector]:
    if _is(mark, NoMark):
        return lambda h, step, ctx: h
    if not _is(mark, SinusoidMark) or mark.config.relative:
        return lambda h, step, ctx: mark(_row(h), step, ctx).view(-1)
    signals: dict[int, Tensor] = {}

    def marked(h: Vector, step: Steps, ctx: Context) -> Vector:
        number = _number(ctx)
        if number not in signals:
            signals[number] = mark.signal(step, len(h)).view(-1)
        return h + signals[number]

    return marked


def _inject(inject: nn.Module) -> Callable[[Vector, Vector], Vector]:
    if _is(inject, NoInjection):
        return lambda h, e: h
    if _is(inject, AddInjection):
        return torch.add
    if _is(inject, NormedAddInjection):
        norm = _map(inject.norm)
        return lambda h, e: norm(h + e)
    return lambda h, e: inject(_row(h), _row(e)).view(-1)


def _adapt(adapt: nn.Module) -> Callable[[Vector, Steps, Context], Vector]:
    if _is(adapt, NoAdaptation):
        return lambda y, step, ctx: y
    if _is(adapt, LowRankAdaptation):
        down, up, scales = _map(adapt.down), _map(adapt.up), adapt.scale.unbind()
        return lambda y, step, ctx: y + up(down(y) * scales[min(_number(ctx), len(scales) - 1)])
    return lambda y, step, ctx: adapt(_row(y), step).view(-1)


def _update(update: nn.Module) -> Callable[[Vector, Vector, Vector], Vector]:
    if _is(update, ReplaceUpdate):
        return lambda h, e, y: y
    if _is(update, LTIUpdate):
        decay, b = update.decay(), update.b
        return lambda h, e, y: torch.addcmul(torch.addcmul(y, decay, h), b, e)
    return lambda h, e, y: update(_row(h), _row(e), _row(y)).view(-1)


def _halt(halt: nn.Module) -> Callable[[State, Vector, Vector, PerSequence, Context], State]:
    if _is(halt, AdaptiveHalting) and _is(halt.score, nn.Linear):
        return _adaptive(halt)

    def halted(state: State, marked: Vector, h: Vector, last: PerSequence, ctx: Context) -> State:
        after: State = halt(state, _row(marked), _row(h), last, ctx)
        return after.but(taken=state.taken + (state.left > 0))

    return halted


def _adaptive(halt: AdaptiveHalting) -> Callable[[State, Vector, Vector, PerSequence, Context], State]:
    """The shares of one token are numbers of the host."""
    score, bias = halt.score.weight[0], halt.score.bias.item()
    slack, forced = 1 - halt.config.threshold, not halt.config.as_released

    def halted(state: State, marked: Vector, h: Vector, last: PerSequence, ctx: Context) -> State:
        left, taken = state.left.item(), state.taken
        share = 1 / (1 + math.exp(min(-torch.dot(score, h).item() - bias, 700)))
        ends = left - share <= slack or (forced and last.item())
        weight = left if ends else min(share, left)
        h = _row(h)
        answer = torch.add(state.answer, h, alpha=weight) if taken.item() else h * weight
        rest = torch.full_like(state.left, 0 if ends else left - weight)
        return State(state.e, h, answer, rest, taken + (left > 0), state.past, state.first)

    return halted


def _called(part: nn.Module, where: Where) -> Layer:
    """As it is."""
    return lambda x, ctx: part(_row(x), ctx.at(*where)).view(-1)


def _is(part: nn.Module | None, kind: type[Kind]) -> TypeGuard[Kind]:
    """And nobody listens to it."""
    if not isinstance(part, kind):
        return False
    return not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))


def _number(ctx: Context) -> int:
    assert isinstance(ctx.place.step, int)
    return ctx.place.step


def _row(x: Vector) -> Hidden:
    return x.view(1, 1, -1)
