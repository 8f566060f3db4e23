"""What a step does to the layers' output before it becomes the next state.

    Unadapted    y
    DepthLoRA    y + ((y A) * s[n]) B, A and B shared, one scale per step     OpenMythos
    NormedStep   norm(y), the model's own norm after every loop               Ouro (arXiv 2510.25741)

Past the last step it was made for, DepthLoRA goes on with that step's scale. (Low-rank changes of the
layers' own weights, as in Bae et al. 2024, are `nn.linear.LoRA`.)
"""

from typing import final

import torch
from torch import nn

from open_mythos.config import Config
from open_mythos.nn.norm import Norm, RMSNorm
from open_mythos.shapes import Hidden, Steps


class Unadapted(Config):
    def build(self, dim: int) -> "NoAdaptation":
        return NoAdaptation()


class DepthLoRA(Config):
    rank: int
    steps: int
    scale: float = 1.0  # standard deviation of the scales at initialisation

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 1:
            raise ValueError(f"DepthLoRA needs a rank and steps of at least 1, got {self.rank}, {self.steps}")

    def build(self, dim: int) -> "LowRankAdaptation":
        return LowRankAdaptation(self, dim)


class NormedStep(Config):
    norm: Norm = RMSNorm()

    def build(self, dim: int) -> "NormedAdaptation":
        return NormedAdaptation(self, dim)


@final
class NoAdaptation(nn.Module):
    def forward(self, y: Hidden, step: Steps) -> Hidden:
        return y


@final
class LowRankAdaptation(nn.Module):
    def __init__(self, config: DepthLoRA, dim: int) -> None:
        super().__init__()
        self.config = config
        self.down = nn.Linear(dim, config.rank, bias=False)
        # Not an embedding: the model's initialisation would shrink it, and with it the whole path.
        self.scale = nn.Parameter(torch.empty(config.steps, config.rank))
        self.up = nn.Linear(config.rank, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale, std=self.config.scale)

    def delta(self, y: Hidden, step: Steps) -> Hidden:
        scale = self.scale[step.clamp_max(len(self.scale) - 1)]
        return self.up(self.down(y) * scale[:, None].to(y.dtype))

    def forward(self, y: Hidden, step: Steps) -> Hidden:
        return y + self.delta(y, step)


@final
class NormedAdaptation(nn.Module):
    def __init__(self, config: NormedStep, dim: int) -> None:
        super().__init__()
        self.norm = config.norm.build(dim)

    def forward(self, y: Hidden, step: Steps) -> Hidden:
        return self.norm(y)


Adaptation = Unadapted | DepthLoRA | NormedStep
