"""What a token remembers of its own earlier steps.

    Forget            nothing but its state
    DepthAttention    + W_o softmax(q_n k_m / sqrt(K) + b(n - m)) v_m  over its own steps m = 0..n

A state of constant width must else carry every intermediate result. Attention over depth in the manner of
Dreamer, Knupp et al. 2026 (arXiv 2601.21582), after descriptions of it: its equations were not to be had.
It is about one token alone and lives as long as the token's own forward pass, so no cache keeps it. It is
added before the layers, or with `parallel` beside them. Past the last remembered step, the latest takes the
last place.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from open_mythos.config import Config
from open_mythos.nn.linear import Projection
from open_mythos.nn.norm import Norm, RMSNorm
from open_mythos.shapes import Hidden, Steps

Past = Float[Tensor, "B T _ D"]


class Forget(Config):
    def build(self, dim: int) -> "NoRecall":
        return NoRecall()


class DepthAttention(Config):
    heads: int
    steps: int  # how many are remembered
    parallel: bool = True
    norm: Norm = RMSNorm()

    def __post_init__(self) -> None:
        if self.heads < 1 or self.steps < 1:
            raise ValueError(f"DepthAttention needs heads and steps, got {self.heads} and {self.steps}")

    def build(self, dim: int) -> "DepthRecall":
        return DepthRecall(self, dim)


@final
class NoRecall(nn.Module):
    def open(self, past: Past) -> Past:
        return past

    def forward(self, x: Hidden, past: Past, step: Steps) -> tuple[Hidden, Hidden | None, Past]:
        return x, None, past


@final
class DepthRecall(nn.Module):
    def __init__(self, config: DepthAttention, dim: int) -> None:
        super().__init__()
        if dim % config.heads:
            raise ValueError(f"dim={dim} is not a multiple of DepthAttention.heads={config.heads}")
        self.config = config
        self.norm = config.norm.build(dim)
        self.q, self.k, self.v = (Projection(dim, dim) for _ in range(3))
        self.out = Projection(dim, dim, residual=True)
        self.bias = nn.Parameter(torch.empty(config.heads, config.steps))  # by distance
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def open(self, past: Past) -> Past:
        """Room for all the steps that will be remembered."""
        if past.shape[2] == self.config.steps:
            return past
        return past.new_zeros(*past.shape[:2], self.config.steps, past.shape[3])

    def forward(self, x: Hidden, past: Past, step: Steps) -> tuple[Hidden, Hidden | None, Past]:
        """What the layers read, what is added to what they say, and the memory with this step in it."""
        past = self.open(past)
        now, steps = self.norm(x), torch.arange(self.config.steps, device=x.device)
        at = step.clamp_max(self.config.steps - 1)[:, None]
        past = torch.where((steps == at)[:, None, :, None], now[:, :, None].to(past.dtype), past)
        told = self.out(self._attend(now, past.to(now.dtype), at - steps))
        return (x, told, past) if self.config.parallel else (x + told, None, past)

    def _attend(self, now: Hidden, past: Past, distance: Tensor) -> Hidden:
        q, k, v = (
            f(t).unflatten(-1, (self.config.heads, -1))
            for f, t in ((self.q, now), (self.k, past), (self.v, past))
        )
        scores = torch.einsum("bthk,btnhk->bthn", q, k).float() * q.shape[-1] ** -0.5
        scores = scores + self.bias.float()[:, distance.clamp_min(0)].transpose(0, 1)[:, None]  # B 1 H N
        weights = scores.masked_fill((distance < 0)[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
        return torch.einsum("bthn,btnhk->bthk", weights, v).flatten(-2)


Recall = Forget | DepthAttention
