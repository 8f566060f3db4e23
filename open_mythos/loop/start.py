"""Where the loop begins: the state before the first step.

    Zeros       0
    Embedded    e, the encoded input itself            OpenMythos, Universal Transformer, Ouro
    Noise       scale * truncated normal(0, std^2), cut at 3 std
                Huginn (arXiv 2502.05171), Parcae (arXiv 2604.12946): std = sqrt(2 / (5 D))

Noise is drawn only when the caller hands in a generator. Without one the start is zero, the mean of the
distribution, so that the same call gives the same answer, cached or not, alone or in a batch.
"""

import math
from typing import final

import torch
from torch import Generator, Tensor, nn

from open_mythos.config import Config
from open_mythos.shapes import Hidden


class Zeros(Config):
    def build(self, dim: int) -> "ZeroStart":
        return ZeroStart()


class Embedded(Config):
    def build(self, dim: int) -> "EmbeddedStart":
        return EmbeddedStart()


class Noise(Config):
    std: float | None = None  # sqrt(2 / (5 D))
    scale: float = 1.0

    def build(self, dim: int) -> "NoiseStart":
        return NoiseStart(self.std if self.std is not None else math.sqrt(2 / (5 * dim)), self.scale)


@final
class ZeroStart(nn.Module):
    def forward(self, e: Hidden, rng: Generator | None = None) -> Hidden:
        return torch.zeros_like(e)


@final
class EmbeddedStart(nn.Module):
    def forward(self, e: Hidden, rng: Generator | None = None) -> Hidden:
        return e.clone()  # or a compiled step sees two names for one tensor on the first step only


@final
class NoiseStart(nn.Module):
    def __init__(self, std: float, scale: float) -> None:
        super().__init__()
        self.std, self.scale = std, scale

    def forward(self, e: Hidden, rng: Generator | None = None) -> Hidden:
        if rng is None:
            return torch.zeros_like(e)
        seeds = torch.randint(2**62, (len(e),), generator=rng, device=rng.device).tolist()
        return (
            torch.stack([self._row(e.shape[1:], rng.device, seed) for seed in seeds]).mul_(self.scale).to(e)
        )

    def _row(self, shape: torch.Size, device: torch.device, seed: int) -> Tensor:
        """One sequence, from a seed of its own: how a batch is shared out over processes changes nothing."""
        own = Generator(device).manual_seed(seed)
        h = torch.empty(shape, dtype=torch.float32, device=device)
        return nn.init.trunc_normal_(h, std=self.std, a=-3 * self.std, b=3 * self.std, generator=own)


Start = Zeros | Embedded | Noise
