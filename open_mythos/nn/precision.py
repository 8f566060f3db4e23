"""In which precision to compute.

Under autocast products take their inputs in half precision and hand on what they make in it; statistics, the
router and halting stay in float32.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(x: Tensor) -> torch.dtype:
    """In which to take statistics of `x`."""
    return x.dtype if x.dtype == torch.float64 else torch.float32


def working_dtype(x: Tensor) -> torch.dtype:
    """What a product takes `x` in; for operations that autocast does not know. Float64 it leaves alone."""
    kind = _kind(x)
    lowers = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if lowers else x.dtype


def outside_autocast(x: Tensor) -> AbstractContextManager[object]:
    kind = _kind(x)
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def lowered(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`x` as products take it, converted once for all that read it. With gradient each product converts its
    own, so that their gradients are added up in the precision of `x`.
    """
    return x if torch.is_grad_enabled() else x.to(working_dtype(x))


def _kind(x: Tensor) -> str:
    """Of device; the meta device, which autocast does not know, counts as the CPU."""
    return "cpu" if x.is_meta else x.device.type
