"""The product of rows with a weight, on a CPU through the faster of the two libraries that PyTorch carries.

    y = x W^T + b            dx = dy W            dW = dy^T x            db = sum(dy)

In float32 PyTorch takes MKL, which on processors that are not Intel's reaches half to three quarters of what
oneDNN does on the same product; oneDNN costs more to start, and a millisecond when a shape is new. So large
products go to oneDNN, and all else (small ones, other precisions and devices, `torch.compile`, dW, where MKL
is as fast) to `F.linear`, which is also the oracle. One row without gradient, as in decoding, waits for the
weight; while that stays in cache, all products and then their sums are up to twice as fast as what MKL has
for processors that it does not know (bench/product.py shows both), and a compiler reads any weight just once.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.nn.precision import at_least_float32, working_dtype
from open_mythos.nn.transforms import transformed

LARGE = 2**22  # multiplications from which oneDNN's start pays; to read the weight, one row waits like eight
SMALL = 2**15  # elements of a weight from which one row is multiplied out

Row = Float[Tensor, "_"]
Rows = Float[Tensor, "... I"]
Weight = Float[Tensor, "O I"]
Bias = Float[Tensor, "O"]
Out = Float[Tensor, "... O"]


def linear(x: Rows, weight: Weight, bias: Bias | None = None) -> Out:
    """`F.linear`, equal to rounding."""
    if torch.compiler.is_compiling():
        alone = x.numel() == x.shape[-1] and x.device.type == "cpu" and not torch.is_grad_enabled()
        return _summed(x, weight, bias) if alone else F.linear(x, weight, bias)
    rows, size = x.numel() // x.shape[-1], weight.numel()
    large = max(rows, 8) * size >= LARGE
    alone = rows == 1 and size >= SMALL and not large and not torch.is_grad_enabled()
    fast = alone or (large and rows > 0 and _has_onednn())
    if not fast or not _is_plain(x, weight) or transformed():
        return F.linear(x, weight, bias)
    if alone:
        return _multiplied_out(x, weight, bias)
    if not torch.is_grad_enabled():
        return _onednn(x, weight, bias)
    return cast(Tensor, _Linear.apply(x, weight, bias))


def linear_alone(weight: Weight, bias: Bias | None = None) -> Callable[[Row], Row]:
    """`linear` of one row in float32 on a CPU with this weight, without gradient: how is decided once."""
    if 8 * weight.numel() >= LARGE:
        return lambda x: linear(x[None], weight, bias)[0]
    multiply = torch.mv if weight.numel() < SMALL else torch.linalg.vecdot
    if bias is None:
        return lambda x: multiply(weight, x)
    return lambda x: multiply(weight, x).add_(bias)


class _Linear(torch.autograd.Function):
    """The backward pass is made of differentiable products, so it can itself be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Rows, weight: Weight, bias: Bias | None) -> Out:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Out) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            linear(grad, weight.mT) if needs_x else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _multiplied_out(x: Rows, weight: Weight, bias: Bias | None) -> Out:
    """Of one row: every product, then the sums."""
    y = torch.linalg.vecdot(weight, x.unsqueeze(-2))
    return y if bias is None else y + bias


def _summed(x: Rows, weight: Weight, bias: Bias | None) -> Out:
    """The same for a compiler, which makes one pass over the weight of it and of what follows; added up in
    float32 at least, in the precision that `F.linear` would take."""
    wide, out = at_least_float32(x), working_dtype(x)
    row, weight = (part.to(out).to(wide) for part in (x.flatten(), weight))
    y = (weight * row).sum(-1).to(out).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(out)


def _onednn(x: Rows, weight: Weight, bias: Bias | None) -> Out:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], ""))


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Both are float32, on a CPU, and nobody stands between them and the kernel."""
    return (
        x.dtype == weight.dtype == torch.float32
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
    )


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)  # type: ignore[attr-defined]
