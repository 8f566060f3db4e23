"""The model that a comparison should be made with: equal in what is said to be equal, counted and not
recited.

    cost(model)  =  stored parameters, FLOPs per token of inference and of training, cache bytes per token
    match        :  layers L and feed-forward width w of the other model, such that the costs asked for agree

All costs are affine in w for every kind of layer, so four models of each kind, made on the meta device, say
what every other one would cost, and the one chosen is made and counted to be sure. A looped model is matched
by a fixed-depth one of the layers that it stores, in their order, stretched over as many as there are to be;
a fixed-depth one by a looped one. Not everything can be equal at once: a loop
spends more FLOPs on every parameter than any dense model without one, and then the answer is an error that
says how far off the nearest is.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
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
from open_mythos.nn.norm import RMSNorm

What = Literal["params", "flops", "training", "memory"]
TOLERANCE = 0.02
LENGTH = 1024  # tokens that the one whose FLOPs are counted looks back on


class Cost(NamedTuple):
    """`flops` and `training` are per token, `memory` is bytes of a 2-byte cache per token."""

    params: float
    flops: float
    training: float
    memory: float

    def off(self, other: "Cost", on: Sequence[str]) -> float:
        """The largest relative difference in what is asked for."""
        return max(abs(getattr(self, what) / getattr(other, what) - 1) for what in on)


class Match(NamedTuple):
    model: Model
    cost: Cost
    wanted: Cost
    layers: int
    width: int


@lru_cache(maxsize=256)
def cost(model: Model) -> Cost:
    """Counted from the model on the meta device. It takes the mean steps of its schedule."""
    steps = model.loop.schedule.mean_steps if model.loop is not None else 0
    grad = min(getattr(model.loop.schedule, "grad", None) or steps, steps) if model.loop is not None else 0
    counted, back = flops(model), min(LENGTH, model.context)
    forward, learned = counted.token(steps, back), counted.token(grad, back)
    return Cost(
        params=parameters(model).total,
        flops=forward,
        training=forward + 2 * learned,  # a backward pass costs two forward ones
        memory=cache_bytes(model, PerLoop()),
    )


def match(model: Model, on: Sequence[str], *, loops: int = 4, tolerance: float = TOLERANCE) -> Match:
    """The other model, equal to `model` in all of `on`; of several, the one whose width is closest.

    Raises `ValueError` if there is none, saying how far off the nearest is, or if `on` is not understood.
    """
    unknown = set(on) - set(get_args(What))
    if unknown or not on:
        raise ValueError(
            f"models can be equal in {', '.join(get_args(What))}; got {', '.join(on) or 'nothing'}"
        )
    nearest = ""
    for make in _makers(model, loops):
        found = _search(make, model, on, tolerance)
        if isinstance(found, Match):
            return found
        nearest = nearest or found
    raise ValueError(nearest)


def _makers(model: Model, loops: int) -> Iterator["_Fixed | _Looped"]:
    """A loop comes with one layer before and after, or as many more as its turns cannot make up for."""
    if model.loop is not None:
        yield _Fixed(model)
    else:
        yield from (_Looped(model, loops, ends) for ends in range(2, 2 + loops))


def _search(make: "_Fixed | _Looped", model: Model, on: Sequence[str], tolerance: float) -> "Match | str":
    """The match, or how far off the nearest is."""
    wanted, old = cost(model), _width(_layer(model))
    guess = _Plane(make, old)
    tried = [(n, w) for n in range(1, _most(model) + 1) for w in guess.widths(n, wanted, on)]
    if not tried:
        return f"no model of these layers comes near in {' and '.join(on)}"
    near = [pair for pair in tried if guess(*pair).off(wanted, on) <= tolerance]
    if not near:
        best = min(tried, key=lambda pair: guess(*pair).off(wanted, on))
        return _nearest(guess(*best), wanted, on, tolerance)
    for layers, width in sorted(near, key=lambda pair: abs(pair[1] - old)):
        other = make(make.spread(layers), width)
        counted = cost(other)
        if counted.off(wanted, on) <= tolerance:  # widths of other layers are rounded
            return Match(other, counted, wanted, layers, width)
    raise AssertionError("the costs of a model are not what four others of each kind foretold")


class _Plane:
    """What so many layers of such a width cost:  c + sum over layers (a + b w),  known from four models of
    each kind of layer."""

    def __init__(self, make: "_Fixed | _Looped", width: int) -> None:
        self.make, self.width = make, width
        self.corners = {
            (kind, n, w): cost(make(n * (kind,), w))
            for kind in dict.fromkeys(make.kinds)
            for n in (1, 2)
            for w in (width, 2 * width)
        }

    def __call__(self, layers: int, width: int) -> Cost:
        share = width / self.width - 1
        thin, wide = self._line(layers, self.width), self._line(layers, 2 * self.width)
        return Cost(*(a + share * (b - a) for a, b in zip(thin, wide, strict=True)))

    def widths(self, layers: int, wanted: Cost, on: Sequence[str]) -> list[int]:
        """Those at which this many layers would meet some of what is asked for."""
        thin, wide = self._line(layers, self.width), self._line(layers, 2 * self.width)
        step = 8 if self.width >= 256 else 1
        found = {self.width}
        for what in on:
            slope = getattr(wide, what) - getattr(thin, what)
            if slope > 0:
                share = 1 + (getattr(wanted, what) - getattr(thin, what)) / slope
                found.add(round(share * self.width / step) * step)
        return sorted(width for width in found if 0 < width <= 16 * self.width)

    def _line(self, layers: int, width: int) -> Cost:
        total = [0.0] * len(Cost._fields)
        kinds = self.make.spread(layers)
        for i, kind in enumerate(kinds):
            one, two = self.corners[kind, 1, width], self.corners[kind, 2, width]
            # What is there but for the layers is counted with the first of them.
            more = [a if i == 0 else b - a for a, b in zip(one, two, strict=True)]
            total = [so_far + part for so_far, part in zip(total, more, strict=True)]
        return Cost(*total)


class _Fixed:
    """A fixed-depth model of the layers that a looped one stores."""

    def __init__(self, model: Model) -> None:
        assert model.loop is not None
        self.model, self.kinds = model, (*model.prelude, *model.loop.layers, *model.coda)
        self.old = _width(_layer(model))

    def spread(self, layers: int) -> tuple[Block, ...]:
        """The stored layers in their order, some several times or not at all."""
        return tuple(self.kinds[i * len(self.kinds) // layers] for i in range(layers))

    def __call__(self, layers: Sequence[Block], width: int) -> Model:
        """`width` is that of the loop's last layer; the others keep their proportion to it."""
        assert self.model.loop is not None
        adapt = self.model.loop.adapt
        norm = self.model.norm or (adapt.norm if isinstance(adapt, NormedStep) else RMSNorm())
        blocks = tuple(_wide(layer, max(1, round(width * _width(layer) / self.old))) for layer in layers)
        return self.model.replace(prelude=blocks, enter=None, loop=None, leave=None, coda=(), norm=norm)


class _Looped:
    """Layers before and after, `ends` together, and a loop between with the injection of Parcae."""

    def __init__(self, model: Model, loops: int, ends: int = 2) -> None:
        self.model, self.loops, self.ends, self.kinds = model, loops, ends, (_layer(model),)

    def spread(self, layers: int) -> tuple[Block, ...]:
        return layers * self.kinds

    def __call__(self, layers: Sequence[Block], width: int) -> Model:
        layer = _wide(_layer(self.model), width)
        loop = Loop(
            layers=tuple(_wide(kind, width) for kind in layers),
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


def _wide(layer: Block, width: int) -> Block:
    """The layer with another feed-forward, and without what only a loop understands."""
    ffn, mixer = layer.ffn.replace(width=width), layer.mixer
    if isinstance(ffn, SwiGLU | MLP):
        ffn = ffn.replace(linear=Plain())
    mixer = mixer.replace(linear=Plain())
    if isinstance(mixer, GQA) and mixer.head_norm is not None:
        mixer = mixer.replace(head_norm=mixer.head_norm.replace(steps=None))
    return layer.replace(ffn=ffn, mixer=mixer)


def _nearest(cost: Cost, wanted: Cost, on: Sequence[str], tolerance: float) -> str:
    off = ", ".join(f"{getattr(cost, what) / getattr(wanted, what) - 1:+.0%} in {what}" for what in on)
    return (
        f"no model of these layers is within {tolerance:.0%} in {' and '.join(on)}; "
        f"the nearest is {off}; ask for fewer things to be equal"
    )
