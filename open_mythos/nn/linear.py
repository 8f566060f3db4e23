"""The linear maps inside a layer, and how they may differ from one step of the loop to the next.

    Plain    W x
    LoRA     W x + b + B_n A_n x + b_n, a low-rank pair and a shift per step n
                                        Bae et al. 2024 (arXiv 2410.20672), eq. 5

Past the last step it was made for, LoRA goes on with that step's pair.
"""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from open_mythos.config import Config
from open_mythos.nn.context import Context
from open_mythos.nn.product import linear


class Plain(Config):
    def build(self, wide: int, out: int, *, bias: bool = False, residual: bool = False) -> "Projection":
        return Projection(wide, out, bias, residual)


class LoRA(Config):
    rank: int
    steps: int

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 1:
            raise ValueError(f"LoRA needs rank and steps of at least one, got {self.rank} and {self.steps}")

    def build(self, wide: int, out: int, *, bias: bool = False, residual: bool = False) -> "LoRAProjection":
        return LoRAProjection(wide, out, bias, residual, self)


class Projection(nn.Linear):
    """`residual` marks a map whose output is added to the stream, which some initialisations scale down;
    `own_init` one that whoever holds it fills."""

    own_init = False

    def __init__(self, wide: int, out: int, bias: bool = False, residual: bool = False) -> None:
        super().__init__(wide, out, bias=bias)
        self.residual = residual

    def forward(self, x: Float[Tensor, "... I"], ctx: Context | None = None) -> Float[Tensor, "... O"]:
        return linear(x, self.weight, self.bias)


@final
class LoRAProjection(Projection):
    def __init__(self, wide: int, out: int, bias: bool, residual: bool, config: LoRA) -> None:
        super().__init__(wide, out, bias, residual)
        self.down = nn.Parameter(torch.empty(config.steps, config.rank, wide))
        self.shift = nn.Parameter(torch.empty(config.steps, out)) if bias else None
        self.up = nn.Parameter(torch.empty(config.steps, out, config.rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "up"):  # the parent's constructor comes here first
            nn.init.normal_(self.down, std=1 / math.sqrt(self.in_features))
            nn.init.zeros_(self.up)
            if self.shift is not None:
                nn.init.zeros_(self.shift)

    def forward(self, x: Float[Tensor, "B T I"], ctx: Context | None = None) -> Float[Tensor, "B T O"]:
        if ctx is None or ctx.step is None:
            raise ValueError("a LoRA map differs by step, so it can only be used inside a loop")
        step = ctx.step.clamp_max(len(self.down) - 1)
        low = x @ self.down[step].mT.to(x.dtype)
        y = super().forward(x) + low @ self.up[step].mT.to(x.dtype)
        return y if self.shift is None else y + self.shift[step][:, None].to(x.dtype)


Linear = Plain | LoRA
