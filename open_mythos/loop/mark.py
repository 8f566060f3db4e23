"""How a step is told from the others: what is added to the state before the layers run.

The layers are shared, so without a mark every step computes the same function.

    Unmarked        h
    StepSinusoid    h + a * [sin(n w), cos(n w)] on the leading channels
                    OpenMythos' loop index; Dehghani et al. 2018 (arXiv 1807.03819)
    StepTable       h + table[n], learned
                    Chen 2026 (arXiv 2603.21676)
    PositionStep    h + sinusoid(position) + sqrt(D) table[n] or sinusoid(n)
                    Universal Transformer (T2T), both as large as its embeddings

Past its last row a table goes on with that row, and a sinusoid of `steps` with its last step: from there on
the loop is one and the same map, which can settle. `relative` scales the sinusoid by the token's own rms, so
that the signal is a share of the stream and not a flood: at amplitude one it is 93-96 % of the energy that
enters the block of a freshly made dim-256 OpenMythos.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from open_mythos.config import Config
from open_mythos.nn.context import Context
from open_mythos.nn.precision import at_least_float32
from open_mythos.shapes import Hidden, Positions, Steps


class Unmarked(Config):
    def build(self, dim: int) -> "NoMark":
        return NoMark()


class StepSinusoid(Config):
    channels: int | None = None  # an eighth of the width
    base: float = 10_000.0
    amplitude: float = 1.0
    relative: bool = False
    steps: int | None = None  # as many are told apart; later ones bear the mark of the last

    def build(self, dim: int) -> "SinusoidMark":
        return SinusoidMark(self, dim)


class StepTable(Config):
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"StepTable.steps must be at least 1, got {self.steps}")

    def build(self, dim: int) -> "TableMark":
        return TableMark(self.steps, dim)


class PositionStep(Config):
    steps: int | None = None  # rows of a learned table; none for a sinusoid
    base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"PositionStep.steps must be at least 1, got {self.steps}")

    def build(self, dim: int) -> "PositionStepMark":
        return PositionStepMark(self, dim)


@final
class NoMark(nn.Module):
    def forward(self, h: Hidden, step: Steps, ctx: Context) -> Hidden:
        return h


@final
class SinusoidMark(nn.Module):
    def __init__(self, config: StepSinusoid, dim: int) -> None:
        super().__init__()
        self.config = config
        self.channels = dim // 8 if config.channels is None else config.channels
        if not 0 <= self.channels <= dim:
            raise ValueError(f"the loop index marks {self.channels} channels, but there are {dim}")
        if config.steps is not None and config.steps < 1:
            raise ValueError(f"the loop index tells at least 1 step apart, got steps={config.steps}")

    def forward(self, h: Hidden, step: Steps, ctx: Context) -> Hidden:
        known = ctx.place.step if ctx.cache is not None and ctx.step is step else None
        if isinstance(known, int):  # the host knows the step, and all rows are at the same
            signal = ctx.kept((self, known, h.device), lambda: self.signal(step[:1], h.shape[-1]))
        else:
            signal = self.signal(step, h.shape[-1])
        if self.config.relative:
            size = torch.linalg.vector_norm(h.detach(), dim=-1, keepdim=True, dtype=at_least_float32(h))
            signal = signal * size / h.shape[-1] ** 0.5
        return h + signal.to(h.dtype)

    def signal(self, step: Steps, dim: int) -> Float[Tensor, "#B 1 D"]:
        """What is added at this step, relative to the size of the state if so configured."""
        if self.config.steps is not None:
            step = step.clamp_max(self.config.steps - 1)
        return self.config.amplitude * step_sinusoid(step, self.channels, dim, self.config.base)[:, None]


@final
class TableMark(nn.Module):
    def __init__(self, steps: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(steps, dim)

    def forward(self, h: Hidden, step: Steps, ctx: Context) -> Hidden:
        row = step.clamp_max(self.table.num_embeddings - 1)
        return h + self.table(row)[:, None].to(h.dtype)


@final
class PositionStepMark(nn.Module):
    def __init__(self, config: PositionStep, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"a sinusoid pairs channels, so dim={dim} must be even")
        self.config = config
        self.table = nn.Embedding(config.steps, dim) if config.steps is not None else None

    def forward(self, h: Hidden, step: Steps, ctx: Context) -> Hidden:
        dim = h.shape[-1]
        where = ctx.once(("sinusoid", dim), lambda: position_sinusoid(ctx.positions, dim, self.config.base))
        if self.table is None:
            depth = position_sinusoid(step[:, None], dim, self.config.base)
        else:
            depth = dim**0.5 * self.table(step.clamp_max(self.table.num_embeddings - 1))[:, None]
        return h + (where + depth).to(h.dtype)


def step_sinusoid(step: Steps, channels: int, dim: int, base: float) -> Float[Tensor, "B D"]:
    """[sin | cos] of step * base^(-2i / channels) on the leading channels, zero on the rest; float32."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=step.device) / max(channels, 1)
    angle = step[:, None] * base**-exponent
    signal = torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :channels]
    return torch.nn.functional.pad(signal, (0, dim - channels))


def position_sinusoid(positions: Positions, dim: int, base: float) -> Float[Tensor, "B T D"]:
    """Vaswani et al. 2017 (arXiv 1706.03762), section 3.5, in T2T's layout [sin | cos]."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=positions.device) / max(half - 1, 1)
    angle = positions[..., None] * base**-exponent
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


Mark = Unmarked | StepSinusoid | StepTable | PositionStep
