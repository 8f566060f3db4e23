"""How weights begin.

A module fills its own special parameters (`reset_parameters`); an initialisation then sets the matrices
and tables by what they do. "Out" marks the maps whose result is added to the stream.

    Normal        N(0, std^2)                                        GPT-2; OpenMythos: std 0.02
    ScaledNormal  N(0, 2 / (5 D)), out / sqrt(2 layers)              Takase et al. 2023 (arXiv 2312.16903),
                                                                     as in Huginn
    Orthogonal    orthogonal of entry std sqrt(2 / (5 D)), out zero  Parcae (arXiv 2604.12946)
    AsMade        what PyTorch's own modules begin with              Chen 2026 (arXiv 2603.21676)
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from open_mythos.config import Config
from open_mythos.nn.linear import Projection
from open_mythos.nn.moe import MixtureOfExperts


class Normal(Config):
    std: float = 0.02
    out: float = 1.0  # factor on the maps into the stream; zero makes every block begin as the identity

    def fill(self, weight: Tensor, dim: int, out: bool) -> None:
        nn.init.normal_(weight, std=self.std * (self.out if out else 1.0))


class ScaledNormal(Config):
    layers: int  # unrolled: Huginn counts 132 for 2 + 4 * 32 + 2
    cut: float = 3.0

    def fill(self, weight: Tensor, dim: int, out: bool) -> None:
        std = math.sqrt(2 / (5 * dim)) / (math.sqrt(2 * self.layers) if out else 1.0)
        nn.init.trunc_normal_(weight, std=std, a=-self.cut * std, b=self.cut * std)


class Orthogonal(Config):
    def fill(self, weight: Tensor, dim: int, out: bool) -> None:
        if out:
            nn.init.zeros_(weight)
            return
        gain = math.sqrt(2 / (5 * dim)) * math.sqrt(max(weight.shape[-2:]))
        for matrix in weight if weight.ndim == 3 else [weight]:
            nn.init.orthogonal_(matrix, gain=gain)


class AsMade(Config):
    def fill(self, weight: Tensor, dim: int, out: bool) -> None:
        """The modules have filled themselves."""


def initialise(model: nn.Module, init: "Init", dim: int) -> None:
    """Fill every parameter of `model` anew. Works on a model made on the meta device and given storage."""
    for module in reversed(list(model.modules())):  # parts before the whole, which knows better
        reset = getattr(module, "reset_parameters", None)
        if reset is not None and module is not model:
            reset()
    with torch.no_grad():
        for weight, out in _matrices(model):
            init.fill(weight, dim, out)


def _matrices(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    seen: set[int] = set()
    for module in model.modules():
        for weight, out in _of(module):
            if id(weight) not in seen:
                seen.add(id(weight))
                yield weight, out


def _of(module: nn.Module) -> list[tuple[Tensor, bool]]:
    if isinstance(module, MixtureOfExperts):
        return [(module.router, False), (module.gate_up, False), (module.down, True)]
    if isinstance(module, Projection):
        return [(module.weight, module.residual)]
    if isinstance(module, (nn.Linear, nn.Embedding)) and not getattr(module, "own_init", False):
        return [(module.weight, False)]
    return []


Init = Normal | ScaledNormal | Orthogonal | AsMade
