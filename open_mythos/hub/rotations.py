"""The table of rotations that some published checkpoints carry along (we make ours from positions)."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotations(base: float, width: int, context: int) -> Float[Tensor, "1 T 1 half 2"]:
    """Cosine and sine of p * base^(-2i / K), worked out in float32 as their code does."""
    rates = base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(context, dtype=torch.float32), rates)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]
