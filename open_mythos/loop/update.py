"""How the layers' output becomes the next state.

    Replace    y                                                Huginn, Parcae, Universal Transformer, Ouro
    LTI        A * h + B * e + y,  A = exp(-exp(log_dt + log_a))    OpenMythos
    Gate       z * y + (1 - z) * h,  z = sigmoid(W [y ; h] + b)     Chen 2026 (arXiv 2603.21676)

LTI is a diagonal linear time-invariant system whose spectral radius max(A) is below one by
construction: A stays strictly inside (0, 1) in float32, and its gradient finite, at any parameter value.
Law: tests/laws/test_update.py.
"""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from open_mythos.config import Config
from open_mythos.loop.inject import FASTEST, SLOWEST
from open_mythos.shapes import Hidden


class Replace(Config):
    def build(self, dim: int) -> "ReplaceUpdate":
        return ReplaceUpdate()


class LTI(Config):
    decay: float = math.exp(-1)  # at initialisation; the smaller, the fewer steps until the state rests

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"LTI begins with a decay between 0 and 1, got {self.decay}")

    def build(self, dim: int) -> "LTIUpdate":
        return LTIUpdate(self, dim)


class Gate(Config):
    bias: float = -2.0  # the new value gets sigmoid(-2) = 12 % at first

    def build(self, dim: int) -> "GatedUpdate":
        return GatedUpdate(self, dim)


@final
class ReplaceUpdate(nn.Module):
    def forward(self, h: Hidden, e: Hidden, y: Hidden) -> Hidden:
        return y


@final
class LTIUpdate(nn.Module):
    def __init__(self, config: LTI, dim: int) -> None:
        super().__init__()
        self.config = config
        self.log_a = nn.Parameter(torch.empty(dim))
        self.log_dt = nn.Parameter(torch.empty(1))
        self.b = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_a, math.log(-math.log(self.config.decay)))
        nn.init.zeros_(self.log_dt)
        nn.init.constant_(self.b, 0.1)

    def decay(self) -> Float[Tensor, "D"]:
        """The diagonal of A, in float32, strictly inside (0, 1)."""
        rate = (self.log_dt.float() + self.log_a.float()).nan_to_num().clamp(SLOWEST, FASTEST)
        return torch.exp(-torch.exp(rate))

    def forward(self, h: Hidden, e: Hidden, y: Hidden) -> Hidden:
        return torch.addcmul(y, self.decay(), h).addcmul_(self.b.float(), e).to(h.dtype)


@final
class GatedUpdate(nn.Module):
    def __init__(self, config: Gate, dim: int) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(2 * dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gate.bias, self.config.bias)

    def forward(self, h: Hidden, e: Hidden, y: Hidden) -> Hidden:
        z = self.gate(torch.cat([y, h], dim=-1)).sigmoid()
        return z * y + (1 - z) * h


Update = Replace | LTI | Gate
