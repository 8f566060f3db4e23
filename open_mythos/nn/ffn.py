"""What each token does on its own.

    SwiGLU    W_down (silu(W_gate x) * W_up x)       Shazeer 2020 (arXiv 2002.05202)
    MLP       W_down act(W_up x)                     Vaswani et al. 2017 (arXiv 1706.03762)
    MoE       a few of many small SwiGLUs, chosen per token, and shared ones (moe.py)

Both halves of a SwiGLU's first product are one matrix, the gate first.
"""

from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.nn.context import Context
from open_mythos.nn.experts import swiglu
from open_mythos.nn.linear import Linear, Plain
from open_mythos.nn.moe import MoE
from open_mythos.shapes import Hidden

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "half_relu2"]


class SwiGLU(Config):
    width: int
    linear: Linear = Plain()

    def build(self, dim: int) -> "GatedFeedForward":
        return GatedFeedForward(self, dim)


class MLP(Config):
    """`half_relu2` is relu(x)^2 / 2, which Parcae calls ReLU2; `gelu_tanh` the approximation of GPT-2."""

    width: int
    activation: Activation = "gelu"
    bias: bool = False
    dropout: float = 0.0
    linear: Linear = Plain()

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"MLP.width must be at least 1, got {self.width}")
        check_dropout(self)

    def build(self, dim: int) -> "FeedForward":
        return FeedForward(self, dim)


def check_dropout(config: Any) -> None:
    """Raise `ValueError` unless it leaves something: the chance to be dropped lies in [0, 1)."""
    if not 0 <= config.dropout < 1:
        raise ValueError(f"{type(config).__name__}.dropout should lie in [0, 1), got {config.dropout}")


@final
class GatedFeedForward(nn.Module):
    def __init__(self, config: SwiGLU, dim: int) -> None:
        super().__init__()
        if config.width < 1:
            raise ValueError(f"SwiGLU.width must be at least 1, got {config.width}")
        self.gate_up = config.linear.build(dim, 2 * config.width)  # gate first
        self.down = config.linear.build(config.width, dim, residual=True)

    def matrices(self) -> dict[str, int]:
        """Which parameters hold several matrices on top of each other, and how many."""
        return {"gate_up.weight": 2}

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        return self.down(swiglu(self.gate_up(x, ctx)), ctx)


@final
class FeedForward(nn.Module):
    def __init__(self, config: MLP, dim: int) -> None:
        super().__init__()
        self.config = config
        self.up = config.linear.build(dim, config.width, bias=config.bias)
        self.down = config.linear.build(config.width, dim, bias=config.bias, residual=True)

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        middle = _activate(self.up(x, ctx), self.config.activation)
        return self.down(F.dropout(middle, self.config.dropout, self.training), ctx)


def _activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "relu":
            return torch.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "half_relu2":
            return torch.relu(x).square() / 2


FFN = SwiGLU | MLP | MoE
