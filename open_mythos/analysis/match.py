"""The model that a comparison should be made with: equal in what is said to be equal, counted and not
recited.

    cost(model)  =  stored parameters, FLOPs per token of inference and of training, cache bytes per token
    match        :  layers L, feed-forward width w and, where layers have experts, their number E, such that
                    the costs asked for agree

All costs are affine in w and in E for every kind of layer, so a few models of each kind, made on the meta
device, say what every other one would cost, and the one chosen is made and counted to be sure. A looped model
is matched by a fixed-depth one of the layers that it stores: its prelude and coda, and as many of its loop's
layers as there are to be, in their order; a fixed-depth one by a looped one. Not everything can be equal at
once. Without a loop a parameter works on a token once at most, and in a loop as often as it turns, so equal
parameters and equal FLOPs meet only where experts rest; otherwise the answer is an error that says how far
off the nearest is, and why.
"""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import cycle, islice
from typing import Literal, NamedTuple, get_args

from open_mythos.analysis.compute import cache_bytes, flops, parameters
from open_mythos.loop.adapt import NormedStep
from open_mythos.loop.core import Loop
from open_mythos.loop.inject import Diagonal
from open_mythos.loop.schedule import Fixed
from open_mythos.loop.start import Zeros
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import Block
from open_mythos.nn.cache import PerLoop
from open_mythos.nn.ffn import MLP, SwiGLU
from open_mythos.nn.linear import Plain
from open_mythos.nn.moe import MoE
from open_mythos.nn.norm import RMSNorm

What = Literal["params", "flops", "training", "memory"]
TOLERANCE = 0.02
UNITS = {"flops": "FLOPs", "training": "FLOPs of training", "memory": "bytes of cache"}
LENGTH = 1024  # tokens that the one whose FLOPs are counted looks back on


ROUNDS = 3  # of finding the width for a number of experts, and the number of experts for a width
MOST_WIDE, MOST_EXPERTS = 16, 64  # times what the layers have


class Cost(NamedTuple):
    """`flops` and `training` are per token, `memory` is bytes of a 2-byte cache per token."""

    params: float
    flops: float
    training: float
    memory: float

    def off(self, other: "Cost", on: Sequence[str]) -> float:
        """The largest relative difference in what is asked for."""
        return max(abs(getattr(self, what) / getattr(other, what) - 1) for what in on)


class Sizes(NamedTuple):
    """What is free in a match; `experts` is none where no layer has any."""

    layers: int
    width: int
    experts: int | None


class Match(NamedTuple):
    model: Model
    cost: Cost
    wanted: Cost
    layers: int
    width: int
    experts: int | None = None


@lru_cache(maxsize=256)
def cost(model: Model) -> Cost:
    """Counted from the model on the meta device. It takes the mean steps of its schedule; where tokens are
    routed, those that a token takes on average."""
    steps = model.loop.schedule.mean_steps if model.loop is not None else 0
    grad = min(getattr(model.loop.schedule, "grad", None) or steps, steps) if model.loop is not None else 0
    counted, back = flops(model), min(LENGTH, model.context)
    turns = model.loop.route.turns if model.loop is not None else float
    forward = counted.token(turns(steps), back)
    learned = counted.token(turns(steps) - turns(steps - grad), back)
    return Cost(
        params=parameters(model).total,
        flops=forward,
        training=forward + 2 * learned,  # a backward pass costs two forward ones
        memory=cache_bytes(model, PerLoop()),
    )


class NoMatchError(ValueError):
    """No model of these layers is equal in all that was asked for."""


def match(model: Model, on: Sequence[str], *, loops: int = 4, tolerance: float = TOLERANCE) -> Match:
    """The other model, equal to `model` in all of `on`; of several, the one that is closest in the number of
    its experts, then in width, then in cost.

    Raises `NoMatchError` if there is none, saying how far off the nearest is and why, and `ValueError` if
    `on` is not understood.
    """
    unknown = set(on) - set(get_args(What))
    if unknown or not on:
        raise ValueError(
            f"models can be equal in {', '.join(get_args(What))}; got {', '.join(on) or 'nothing'}"
        )
    wanted, nearest = cost(model), []
    for make in _makers(model, loops):
        found = _search(make, model, wanted, on, tolerance)
        if isinstance(found, Match):
            return found
        nearest.append(found)
    best = min(nearest, key=lambda c: c.off(wanted, on))
    raise NoMatchError(_miss(best, wanted, on, tolerance, loops if model.loop is None else None))


def _makers(model: Model, loops: int) -> Iterator["_Fixed | _Looped"]:
    """A loop comes with one layer before and after, or as many more as its turns cannot make up for, or,
    where there are too few layers for that, with one or none."""
    if model.loop is not None:
        yield _Fixed(model)
    else:
        yield from (_Looped(model, loops, ends) for ends in (*range(2, 2 + loops), 1, 0))


def _search(
    make: "_Fixed | _Looped", model: Model, wanted: Cost, on: Sequence[str], tolerance: float
) -> Match | Cost:
    """The match, or what the nearest costs."""
    old = Sizes(0, _width(_layer(model)), _experts(make.kinds))
    guess = _Plane(make, old)
    tried = [size for n in range(1, _most(model) + 1) for size in guess.sizes(n, wanted, on)]
    off = {size: guess(size).off(wanted, on) for size in tried}
    near = [size for size in tried if off[size] <= tolerance]
    if not near:
        return guess(min(tried, key=lambda size: off[size]))
    for size in sorted(near, key=lambda s: (s.experts != old.experts, abs(s.width - old.width), off[s])):
        other = make(make.spread(size.layers), size.width, size.experts)
        counted = cost(other)
        if counted.off(wanted, on) <= tolerance:  # widths and experts of other layers are rounded
            return Match(other, counted, wanted, *size)
    raise AssertionError("the costs of a model are not what a few others of each kind foretold")


class _Plane:
    """What so many layers of such a width, with so many experts, cost:  c + sum over layers (a + b w + d E +
    f w E),  known from a few models of each kind of layer."""

    def __init__(self, make: "_Fixed | _Looped", old: Sizes) -> None:
        self.make, self.old = make, old
        more = (None,) if old.experts is None else (old.experts, 2 * old.experts)
        self.corners = {
            (kind, n, w, e): cost(make(n * (kind,), w, e))
            for kind in dict.fromkeys(make.kinds)
            for n in (1, 2)
            for w in (old.width, 2 * old.width)
            for e in more
        }

    def __call__(self, size: Sizes) -> Cost:
        layers, width, experts = size
        if experts is None or self.old.experts is None:
            return self._over_width(layers, width, None)
        few, many = (self._over_width(layers, width, e * self.old.experts) for e in (1, 2))
        return _between(few, many, experts / self.old.experts - 1)

    def sizes(self, layers: int, wanted: Cost, on: Sequence[str]) -> list[Sizes]:
        """Those at which this many layers would meet some of what is asked for. A router costs more with more
        experts, so width and experts are found in turns."""
        fresh = [Sizes(layers, self.old.width, self.old.experts)]
        found = dict.fromkeys(fresh)
        for _ in range(1 if self.old.experts is None else ROUNDS):
            more = [size for last in fresh for size in self._meeting(last, wanted, on)]
            fresh = [size for size in dict.fromkeys(more) if size not in found]
            found |= dict.fromkeys(fresh)
        return list(found)

    def _meeting(self, size: Sizes, wanted: Cost, on: Sequence[str]) -> list[Sizes]:
        """`size` with the width, or with the number of experts, that meets one thing of what is asked for."""
        old, step = self.old, 8 if self.old.width >= 256 else 1
        thin, wide = (self(size._replace(width=w * old.width)) for w in (1, 2))
        widths = [round(share * old.width / step) * step for share in _solve(thin, wide, wanted, on)]
        found = [size._replace(width=w) for w in widths if 0 < w <= MOST_WIDE * old.width]
        if old.experts is None:
            return found
        few, many = (self(size._replace(experts=e * old.experts)) for e in (1, 2))
        numbers = [round(share * old.experts) for share in _solve(few, many, wanted, on)]
        fits = [e for e in numbers if _chosen(self.make.kinds) <= e <= MOST_EXPERTS * old.experts]
        return found + [size._replace(experts=e) for e in fits]

    def _over_width(self, layers: int, width: int, experts: int | None) -> Cost:
        thin, wide = (self._line(layers, w * self.old.width, experts) for w in (1, 2))
        return _between(thin, wide, width / self.old.width - 1)

    @cache  # noqa: B019 (a plane lives no longer than its search)
    def _line(self, layers: int, width: int, experts: int | None) -> Cost:
        total = [0.0] * len(Cost._fields)
        kinds = self.make.spread(layers)
        for i, kind in enumerate(kinds):
            one, two = self.corners[kind, 1, width, experts], self.corners[kind, 2, width, experts]
            # What is there but for the layers is counted with the first of them.
            more = [a if i == 0 else b - a for a, b in zip(one, two, strict=True)]
            total = [so_far + part for so_far, part in zip(total, more, strict=True)]
        return Cost(*total)


def _between(one: Cost, two: Cost, share: float) -> Cost:
    return Cost(*(a + share * (b - a) for a, b in zip(one, two, strict=True)))


def _solve(one: Cost, two: Cost, wanted: Cost, on: Sequence[str]) -> list[float]:
    """By how much to multiply what was doubled from `one` to `two`, to meet each of what it changes."""
    slopes = {what: getattr(two, what) - getattr(one, what) for what in on}
    return [
        1 + (getattr(wanted, what) - getattr(one, what)) / slope
        for what, slope in slopes.items()
        if slope > 0
    ]


class _Fixed:
    """A fixed-depth model of the layers that a looped one stores."""

    def __init__(self, model: Model) -> None:
        assert model.loop is not None
        self.model, self.kinds = model, (*model.prelude, *model.loop.layers, *model.coda)
        self.old = _width(_layer(model))

    def spread(self, layers: int) -> tuple[Block, ...]:
        """The stored layers as they are unrolled, or some of them where there are to be fewer."""
        assert self.model.loop is not None
        if layers < len(self.kinds):
            return tuple(self.kinds[i * len(self.kinds) // layers] for i in range(layers))
        inner = layers - len(self.model.prelude) - len(self.model.coda)
        looped = islice(cycle(self.model.loop.layers), inner)
        return (*self.model.prelude, *looped, *self.model.coda)

    def __call__(self, layers: Sequence[Block], width: int, experts: int | None) -> Model:
        """`width` is that of the loop's last layer; the others keep their proportion to it."""
        assert self.model.loop is not None
        adapt = self.model.loop.adapt
        norm = self.model.norm or (adapt.norm if isinstance(adapt, NormedStep) else RMSNorm())
        blocks = tuple(
            _wide(layer, max(1, round(width * _width(layer) / self.old)), experts) for layer in layers
        )
        return self.model.replace(prelude=blocks, enter=None, loop=None, leave=None, coda=(), norm=norm)


class _Looped:
    """Layers before and after, `ends` together, and a loop between with the injection of Parcae."""

    def __init__(self, model: Model, loops: int, ends: int = 2) -> None:
        self.model, self.loops, self.ends, self.kinds = model, loops, ends, (_layer(model),)

    def spread(self, layers: int) -> tuple[Block, ...]:
        return layers * self.kinds

    def __call__(self, layers: Sequence[Block], width: int, experts: int | None) -> Model:
        layer = _wide(_layer(self.model), width, experts)
        loop = Loop(
            layers=tuple(_wide(kind, width, experts) for kind in layers),
            start=Zeros(),
            inject=Diagonal(),
            schedule=Fixed(steps=self.loops),
        )
        after = self.ends // 2
        return self.model.replace(prelude=(self.ends - after) * (layer,), loop=loop, coda=after * (layer,))


def _most(model: Model) -> int:
    """No match has more layers than the unrolled model, but for its attention."""
    if model.loop is None:
        return len(model.prelude)
    return len(model.prelude) + len(model.loop.layers) * model.loop.schedule.mean_steps + len(model.coda)


def _layer(model: Model) -> Block:
    blocks = model.loop.layers if model.loop is not None else model.prelude
    if not blocks:
        raise ValueError("a model without layers cannot be matched")
    return blocks[-1]


def _width(layer: Block) -> int:
    return layer.ffn.width


def _experts(layers: Sequence[Block]) -> int | None:
    return max((layer.ffn.experts for layer in layers if isinstance(layer.ffn, MoE)), default=None)


def _chosen(layers: Sequence[Block]) -> int:
    return max((layer.ffn.chosen for layer in layers if isinstance(layer.ffn, MoE)), default=1)


def _wide(layer: Block, width: int, experts: int | None) -> Block:
    """The layer with another feed-forward, and without what only a loop understands."""
    ffn, mixer = layer.ffn.replace(width=width), layer.mixer
    if isinstance(ffn, MoE) and experts is not None:
        ffn = ffn.replace(experts=experts)
    if isinstance(ffn, SwiGLU | MLP):
        ffn = ffn.replace(linear=Plain())
    mixer = mixer.replace(linear=Plain())
    if isinstance(mixer, GQA) and mixer.head_norm is not None:
        mixer = mixer.replace(head_norm=mixer.head_norm.replace(steps=None))
    return layer.replace(ffn=ffn, mixer=mixer)


def _miss(cost: Cost, wanted: Cost, on: Sequence[str], tolerance: float, loops: int | None) -> str:
    """How far off the nearest is, and why; `loops` are those of the answer, if it was to have any."""
    off = ", ".join(f"{getattr(cost, what) / getattr(wanted, what) - 1:+.0%} in {what}" for what in on)
    per = [
        f"{getattr(cost, what) / cost.params:.3g} {UNITS[what]} per parameter instead of "
        f"{getattr(wanted, what) / wanted.params:.3g}"
        for what in on
        if what in UNITS and "params" in on
    ]
    cause = (
        "without a loop a layer works, and remembers, once"
        if loops is None
        else f"a loop of {loops} uses its layers {loops} times; try fewer"
    )
    return (
        f"no model of these layers is within {tolerance:.0%} in {' and '.join(on)}; the nearest is {off}"
        f"{' (' + ', '.join(per) + ')' if per else ''}: {cause}, or ask for fewer things to be equal"
    )
