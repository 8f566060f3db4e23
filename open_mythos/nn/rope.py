"""Rotary position embedding, Su et al. 2021 (arXiv 2104.09864).

Each pair of channels (a, b) of a head turns by an angle proportional to the token's position p:

    (a, b)  ->  (a cos - b sin, a sin + b cos)        angle_i = p * base^(-2i / K)

Pairs are `adjacent` channels (x_2i, x_2i+1: OpenMythos, Parcae, Huginn) or the two `halves` of the
head (x_i, x_i+K/2: Llama, Ouro). Angles are made for the positions at hand, in float64, once per
call: no table, so a context of a million tokens costs nothing.

`Llama3` slows the slow channels down, so that a model trained on `original` tokens reads `factor` times as
many:

    wavelength < original / high    unchanged
    wavelength > original / low     angle / factor
    between                         a blend of the two, linear in original / wavelength

`Yarn` does the same with a blend that is linear in the channel, between those that turn `fast` and `slow`
times within `original` tokens, and lengthens queries and keys by `gain`, 0.1 ln(factor) + 1.
"""

import math
from typing import Literal

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from open_mythos.config import Config
from open_mythos.nn.context import Context


class Llama3(Config):
    """Llama 3.1, Grattafiori et al. 2024 (arXiv 2407.21783), with the constants of its release."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.low < self.high:
            raise ValueError(
                f"Llama3 needs factor >= 1 and 0 < low < high, got {self.factor}, {self.low} and {self.high}"
            )

    def stretch(self, rates: Float[Tensor, "half"], base: float) -> Float[Tensor, "half"]:
        turns = self.original * rates / (2 * math.pi)  # original / wavelength
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return rates * (keep + (1 - keep) / self.factor)


class Interpolated(Config):
    """Every angle divided by one factor, Chen et al. 2023 (arXiv 2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"Interpolated.factor must be above 0, got {self.factor}")

    def stretch(self, rates: Float[Tensor, "half"], base: float) -> Float[Tensor, "half"]:
        return rates / self.factor


class Yarn(Config):
    """Peng et al. 2023 (arXiv 2309.00071), as in transformers; `rounded` bounds are whole channels."""

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    gain: float | None = None
    rounded: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.slow < self.fast:
            raise ValueError(
                f"Yarn needs factor >= 1 and 0 < slow < fast, got {self.factor}, {self.slow} and {self.fast}"
            )

    def stretch(self, rates: Float[Tensor, "half"], base: float) -> Float[Tensor, "half"]:
        first, last = (self._channel(turns, len(rates), base) for turns in (self.fast, self.slow))
        if self.rounded:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * len(rates) - 1)
        channel = torch.arange(len(rates), dtype=rates.dtype, device=rates.device)
        slowed = ((channel - first) / (last - first or 1e-3)).clamp(0, 1)
        return rates * (1 - slowed + slowed / self.factor)

    def lengthen(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.gain is None else self.gain

    def _channel(self, turns: float, half: int, base: float) -> float:
        """The one, as a fraction, that turns so often within the original context."""
        return half * math.log(self.original / (2 * math.pi * turns)) / math.log(base)


Scaling = Llama3 | Interpolated | Yarn


class Rope(Config):
    base: float = 10_000.0
    pairs: Literal["adjacent", "halves"] = "adjacent"
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if self.base <= 0:
            raise ValueError(f"the base of rotary embedding must be positive, got {self.base}")

    def __call__(self, x: Float[Tensor, "B H T K"], ctx: Context) -> Float[Tensor, "B H T K"]:
        """Turn `x`, laid out (B H T K), by the positions of `ctx`."""
        width = x.shape[-1]
        turns = self.turns(width, ctx)
        if self.pairs == "adjacent" and _suits_complex(x):
            turn = ctx.once((*self.key(width), "complex"), lambda: torch.complex(turns[0], turns[1]))
            return turned(x, turn)
        return rotate_plainly(x, turns[0], turns[1], self.pairs)

    def turns(self, width: int, ctx: Context) -> Float[Tensor, "2 B 1 T half"]:
        """Cosines and sines for heads of this width."""
        return ctx.once(self.key(width), lambda: self._turns(width, ctx))

    def key(self, width: int) -> tuple[object, ...]:
        """Under which a context keeps the turns of heads of this width: (2 B 1 T half), cosines and sines."""
        return "rope", self.base, self.scaling, width

    def _turns(self, width: int, ctx: Context) -> Float[Tensor, "2 B 1 T half"]:
        positions = ctx.positions if ctx.start is None else ctx.positions[:1]
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        rates = self.base**-exponent
        if self.scaling is not None:
            rates = self.scaling.stretch(rates, self.base)
        angle = positions[:, None, :, None] * rates
        turns = torch.stack([angle.cos(), angle.sin()])
        if isinstance(self.scaling, Yarn):
            turns = turns * self.scaling.lengthen()
        return turns.float()


def rotate(
    x: Float[Tensor, "B H T K"],
    cos: Float[Tensor, "#B 1 T half"],
    sin: Float[Tensor, "#B 1 T half"],
    pairs: Literal["adjacent", "halves"],
) -> Float[Tensor, "B H T K"]:
    if pairs == "adjacent" and _suits_complex(x):
        return turned(x, torch.complex(cos, sin))
    return rotate_plainly(x, cos, sin, pairs)


def rotate_plainly(
    x: Float[Tensor, "B H T K"],
    cos: Float[Tensor, "#B 1 T half"],
    sin: Float[Tensor, "#B 1 T half"],
    pairs: Literal["adjacent", "halves"],
) -> Float[Tensor, "B H T K"]:
    """The equation. The oracle of the complex product, which on a CPU is five times as fast."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if pairs == "adjacent" else x.chunk(2, dim=-1)
    turned = a * cos - b * sin, a * sin + b * cos
    joined = torch.stack(turned, dim=-1).flatten(-2) if pairs == "adjacent" else torch.cat(turned, dim=-1)
    return joined.to(x.dtype)


def _suits_complex(x: Tensor) -> bool:
    """Whether pairs can be read as complex numbers of float32 where they lie. (A compiler does better.)"""
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        return False
    if x.dtype == torch.float32:
        rows, heads, tokens, channels = x.stride()
        return channels == 1 and rows % 2 == heads % 2 == tokens % 2 == x.storage_offset() % 2 == 0
    return x.dtype in (torch.bfloat16, torch.float16)


def turned(x: Float[Tensor, "... K"], turn: Complex[Tensor, "..."]) -> Float[Tensor, "... K"]:
    """Adjacent pairs of `x` turned by complex numbers, which broadcast against them."""
    return torch.view_as_real(_as_complex(x) * turn).flatten(-2).to(x.dtype)


def _as_complex(x: Float[Tensor, "... K"]) -> Complex[Tensor, "... half"]:
    x = x if x.dtype == torch.float32 else x.to(torch.float32, memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
