"""How weights begin.

A module fills its own special parameters (`reset_parameters`); an initialisation then sets the matrices
and tables by their role: "out" maps' results are added to the stream, "up" is the second half of a gated
pair, "in" all the rest; their biases begin at zero, unless everything is as made. Value embeddings and
their gates, n-gram embeddings, and a `Projection` with `own_init`, keep what they filled in themselves.

    Normal        N(0, std^2)                                        GPT-2; OpenMythos: std 0.02
    ScaledNormal  N(0, 2 / (5 D)), out / sqrt(2 layers)              Takase et al. 2023 (arXiv 2312.16903),
                                                                     as in Huginn
    Orthogonal    orthogonal of entry std sqrt(2 / (5 D)), out zero  Parcae (arXiv 2604.12946)
    AsMade        what PyTorch's own modules begin with              Chen 2026 (arXiv 2603.21676)
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from open_mythos.config import Config
from open_mythos.nn.attention import TokenValues
from open_mythos.nn.ffn import GatedFeedForward
from open_mythos.nn.linear import Projection
from open_mythos.nn.moe import MixtureOfExperts
from open_mythos.nn.ngram import HashedNGrams

Role = Literal["in", "up", "out"]


class Normal(Config):
    std: float = 0.02
    out: float = 1.0  # factor on the maps into the stream; zero makes every block begin as the identity

    def __post_init__(self) -> None:
        if self.std < 0 or self.out < 0:
            raise ValueError(f"Normal's std and out are at least 0, got std={self.std} and out={self.out}")

    def fill(self, weight: Tensor, dim: int, role: Role) -> None:
        nn.init.normal_(weight, std=self.std * (self.out if role == "out" else 1.0))


class ScaledNormal(Config):
    layers: int  # unrolled: Huginn counts 132 for 2 + 4 * 32 + 2
    cut: float = 3.0
    up_as_out: bool = False  # Huginn's code also scales down the second half of a gated pair

    def __post_init__(self) -> None:
        if self.layers < 1 or self.cut <= 0:
            raise ValueError(
                "ScaledNormal needs at least one layer and a cut above 0, got "
                f"layers={self.layers} and cut={self.cut}"
            )

    def fill(self, weight: Tensor, dim: int, role: Role) -> None:
        down = role == "out" or (role == "up" and self.up_as_out)
        std = math.sqrt(2 / (5 * dim)) / (math.sqrt(2 * self.layers) if down else 1.0)
        nn.init.trunc_normal_(weight, std=std, a=-self.cut * std, b=self.cut * std)


class Orthogonal(Config):
    def fill(self, weight: Tensor, dim: int, role: Role) -> None:
        if role == "out":
            nn.init.zeros_(weight)
            return
        gain = math.sqrt(2 / (5 * dim)) * math.sqrt(max(weight.shape[-2:]))
        for matrix in weight if weight.ndim == 3 else [weight]:
            nn.init.orthogonal_(matrix, gain=gain)


class AsMade(Config):
    def fill(self, weight: Tensor, dim: int, role: Role) -> None:
        """The modules have filled themselves."""


def initialise(model: nn.Module, init: "Init", dim: int) -> None:
    """Fill every parameter of `model` anew. Works on a model made on the meta device and given storage."""
    for module in reversed(list(model.modules())):  # parts before the whole, which knows better
        reset = getattr(module, "reset_parameters", None)
        if reset is not None and module is not model:
            reset()
    with torch.no_grad():
        for weight, role in _matrices(model):
            init.fill(weight, dim, role)
        for bias in () if isinstance(init, AsMade) else _biases(model):
            bias.zero_()


def _matrices(model: nn.Module) -> Iterator[tuple[Tensor, Role]]:
    seen = {
        id(p)
        for module in model.modules()
        if isinstance(module, TokenValues | HashedNGrams)
        for p in module.parameters()
    }
    for module in model.modules():
        if isinstance(module, GatedFeedForward) and id(module.gate_up.weight) not in seen:
            seen.add(id(module.gate_up.weight))
            gate, up = module.gate_up.weight.chunk(2)
            yield gate, "in"
            yield up, "up"
        for weight, role in _of(module):
            if id(weight) not in seen:
                seen.add(id(weight))
                yield weight, role


def _biases(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, Projection) and not module.own_init and module.bias is not None:
            yield module.bias


def _of(module: nn.Module) -> list[tuple[Tensor, Role]]:
    if isinstance(module, MixtureOfExperts):
        return [(module.router, "in"), (module.gate_up, "in"), (module.down, "out")]
    if isinstance(module, Projection):
        return [] if module.own_init else [(module.weight, "out" if module.residual else "in")]
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return [(module.weight, "in")]
    return []


Init = Normal | ScaledNormal | Orthogonal | AsMade
