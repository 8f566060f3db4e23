"""How the input re-enters the state before every step.

A loop that sees its input only once forgets it, so each step first mixes the encoded input e back in:

    Nothing     h                                   Universal Transformer, Ouro, Chen
    Add         h + e                               Yang et al. 2023 (arXiv 2311.12424)
    NormedAdd   norm(h + e)                         OpenMythos
    Concat      W [h ; e]                           Huginn, Geiping et al. 2025 (arXiv 2502.05171)
    Diagonal    exp(-dt a) * h + dt * (B e)         Parcae, Prairie et al. 2026 (arXiv 2604.12946)
                dt = softplus(raw_dt), a = exp(log_a): the decay is in (0, 1) whatever the parameters

Law (tests/laws/test_inject.py): every variant maps (B T D, B T D) to B T D, one token at a time.
"""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.nn.linear import Projection
from open_mythos.nn.norm import Norm, RMSNorm
from open_mythos.shapes import Hidden

# exp(-rate) is strictly between 0 and 1 in float32 for rates between these.
SLOWEST, FASTEST = -13.8, 4.4


class Nothing(Config):
    def build(self, dim: int) -> "NoInjection":
        return NoInjection()


class Add(Config):
    def build(self, dim: int) -> "AddInjection":
        return AddInjection()


class NormedAdd(Config):
    norm: Norm = RMSNorm()

    def build(self, dim: int) -> "NormedAddInjection":
        return NormedAddInjection(self, dim)


class Concat(Config):
    def build(self, dim: int) -> "ConcatInjection":
        return ConcatInjection(dim)


class Diagonal(Config):
    decay: float = math.sqrt(1 / 5)  # at initialisation

    def build(self, dim: int) -> "DiagonalInjection":
        return DiagonalInjection(self, dim)


@final
class NoInjection(nn.Module):
    def forward(self, h: Hidden, e: Hidden) -> Hidden:
        return h


@final
class AddInjection(nn.Module):
    def forward(self, h: Hidden, e: Hidden) -> Hidden:
        return h + e


@final
class NormedAddInjection(nn.Module):
    def __init__(self, config: NormedAdd, dim: int) -> None:
        super().__init__()
        self.norm = config.norm.build(dim)

    def forward(self, h: Hidden, e: Hidden) -> Hidden:
        return self.norm(h + e)


@final
class ConcatInjection(nn.Module):
    """Begins as a truncated normal of std sqrt(2 / (5 D)), in Huginn and in Parcae."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = Projection(2 * dim, dim)  # state half first
        self.mix.own_init = True
        self.std = math.sqrt(2 / (5 * dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.mix.weight, std=self.std, a=-3 * self.std, b=3 * self.std)

    def forward(self, h: Hidden, e: Hidden) -> Hidden:
        return self.mix(torch.cat([h, e], dim=-1))


@final
class DiagonalInjection(nn.Module):
    def __init__(self, config: Diagonal, dim: int) -> None:
        super().__init__()
        if not 0 < config.decay < 1:
            raise ValueError(f"the decay of a stable injection lies between 0 and 1, got {config.decay}")
        self.config = config
        self.log_a = nn.Parameter(torch.empty(dim))
        self.raw_dt = nn.Parameter(torch.empty(dim))
        self.b = nn.Parameter(torch.empty(dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.log_a)
        nn.init.constant_(self.raw_dt, math.log(math.expm1(-math.log(self.config.decay))))
        nn.init.eye_(self.b)

    def decay(self) -> Float[Tensor, "D"]:
        """The state's share that stays, in float32, in (0, 1)."""
        # In log space: dt * a may be 0 * inf, and its gradient not a number.
        dt = F.softplus(self.raw_dt.float()).clamp_min(1e-30)
        return torch.exp(-torch.exp((dt.log() + self.log_a.float()).clamp(SLOWEST, FASTEST)))

    def forward(self, h: Hidden, e: Hidden) -> Hidden:
        fed = F.softplus(self.raw_dt.float()) * F.linear(e, self.b)
        return (self.decay() * h + fed).to(h.dtype)


Injection = Nothing | Add | NormedAdd | Concat | Diagonal
