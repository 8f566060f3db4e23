"""Keeping the scale of the stream.

    RMSNorm      x / rms(x) * w              Zhang & Sennrich 2019 (arXiv 1910.07467)
    LayerNorm    (x - mean) / std * w + b    Ba et al. 2016 (arXiv 1607.06450)

Statistics are taken in float32 whatever the dtype of `x`, and the result comes back in that dtype.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.config import Config

Vectors = Float[Tensor, "... D"]


class RMSNorm(Config):
    eps: float = 1e-6
    weight: bool = True

    def build(self, dim: int) -> "RootMeanSquareNorm":
        return RootMeanSquareNorm(dim, self.eps, self.weight)


class LayerNorm(Config):
    eps: float = 1e-5

    def build(self, dim: int) -> nn.LayerNorm:
        return nn.LayerNorm(dim, self.eps)


@final
class RootMeanSquareNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6, weight: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim)) if weight else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Vectors) -> Vectors:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Vectors, weight: Float[Tensor, "D"] | None, eps: float) -> Vectors:
    if x.is_cuda:
        weight = None if weight is None else weight.float()
        return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)
    # On the CPU the library's kernel is not fused; one pass for the norm and one product is faster.
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()
    scale = torch.rsqrt(square / x.shape[-1] + eps).to(x.dtype)
    return x * scale if weight is None else x * scale * weight.to(x.dtype)


Norm = RMSNorm | LayerNorm
