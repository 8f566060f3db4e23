"""The experts' arithmetic: rows sorted by expert, one SwiGLU per group of rows.

    y_i = down_e (silu(gate_e x_i) * up_e x_i)          e: the expert of row i

One custom op, so that `torch.compile` sees a single node and no loop. On CUDA with bfloat16 it goes through
`grouped_mm`, whose offsets stay on the device, so nothing waits; on a CPU too where experts have so few rows
that starting their products one by one would cost as much as the products, and else slice by slice into one
buffer. Without gradient a few tokens are not sorted at all, on a CPU or by a compiler, and on a CPU a fused
form keeps the rows of an expert that has many in cache. All of them agree with `MixtureOfExperts.naive`,
values and gradients (tests/unit/nn/test_moe.py).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, library
from torch.nn import functional as F

from open_mythos.nn.precision import at_least_float32
from open_mythos.nn.product import linear
from open_mythos.nn.transforms import transformed

Rows = Float[Tensor, "M D"]
GateUp = Float[Tensor, "E F2 D"]
Down = Float[Tensor, "E D F"]

FEW = 4  # tokens that go to their experts one by one
EACH = 256  # rows per expert up to which a CPU takes all experts in one call
EACH_FUSED = 64  # the same without gradient, where the alternative is the fused form


def run_experts(
    x: Rows, gate_up: GateUp, down: Down, chosen: Int[Tensor, "M k"], weights: Float[Tensor, "M k"]
) -> Rows:
    """sum_j weights[i, j] * expert[chosen[i, j]](x[i]) for every row i."""
    if transformed():
        return _densely(x, gate_up, down, chosen, weights)
    if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if 0 < len(x) <= FEW:
            return _few(x, gate_up, down, chosen, weights)
        if not _in_one_call(x, gate_up, chosen.numel(), EACH_FUSED):
            return _fused(x, gate_up, down, chosen, weights)
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and len(x) <= FEW:
        return _picked(x, gate_up, down, chosen, weights)
    order, back, counts = arrange(chosen.flatten(), len(gate_up))
    y, _ = grouped_swiglu(reordered(x, order, back, chosen.shape[1]), gate_up, down, counts)
    return weigh(y, order, back, weights)


def arrange(
    kinds: Int[Tensor, "n"], count: int
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Int[Tensor, "E"]]:
    """Where each row of the order by kind comes from, the inverse of that, and how many rows a kind has."""
    order = kinds.argsort(stable=True)
    counts = kinds.new_zeros(count).scatter_add_(0, kinds, torch.ones_like(kinds))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, back, counts


def reordered(x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
    """Row order[i] // k of x as row i; `back` is the inverse of `order`."""
    return _Reordered.apply(x, order, back, k)


def weigh(y: Tensor, order: Tensor, back: Tensor, weights: Float[Tensor, "M k"]) -> Rows:
    """The weighted sum of what each token's experts said, out of rows sorted by expert."""
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Weighed.apply(y, order, back, weights)
    return (weights[:, None] @ reordered(y, back, order, 1).view(*weights.shape, -1)).squeeze(1)


class _Reordered(torch.autograd.Function):
    """The gradient gathers too, by the inverse order `back`, adding nothing up at random places: several
    times as fast as that of `x[order // k]`, and always in the same order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, order if k == 1 else order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return grad if ctx.k == 1 else grad.view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class _Weighed(torch.autograd.Function):
    """The rows are added up where they lie: on a CPU 2 to 10 times as fast as to gather and multiply them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, back: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y, order, back, weights)
        return F.embedding_bag(back.view_as(weights), y, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor]:
        y, order, back, weights = ctx.saved_tensors
        grad = grad.index_select(0, order // weights.shape[1])
        of_weights = torch.linalg.vecdot(grad, y).index_select(0, back).view_as(weights)
        return grad * weights.flatten().index_select(0, order)[:, None], None, None, of_weights


@library.custom_op("open_mythos::grouped_swiglu", mutates_args=())
def grouped_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(y, middle) for rows sorted by expert; `middle` (M 2F) is kept for the backward pass."""
    if _in_one_call(x, gate_up, len(x), EACH):
        ends = counts.cumsum(0).to(torch.int32)
        middle = F.grouped_mm(x, gate_up.mT, offs=ends)
        return F.grouped_mm(swiglu(middle), down.mT, offs=ends), middle
    middle, y = x.new_empty(len(x), gate_up.shape[1]), torch.empty_like(x)
    for e, rows in _slices(counts):
        torch.mm(x[rows], gate_up[e].mT, out=middle[rows])
        torch.mm(swiglu(middle[rows]), down[e].mT, out=y[rows])
    return y, middle


@grouped_swiglu.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], gate_up.shape[1])


@library.custom_op("open_mythos::grouped_swiglu_backward", mutates_args=())
def grouped_swiglu_backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor, middle: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, gate_up and down."""
    if _in_one_call(x, gate_up, len(x), EACH):
        ends = counts.cumsum(0).to(torch.int32)
        grad_hidden = F.grouped_mm(grad, down, offs=ends)
        grad_middle, hidden = _swiglu_backward(grad_hidden, middle)
        return (
            F.grouped_mm(grad_middle, gate_up, offs=ends),
            F.grouped_mm(grad_middle.mT, x, offs=ends),
            F.grouped_mm(grad.mT, hidden, offs=ends),
        )
    grad_x, grad_up, grad_down = torch.empty_like(x), torch.empty_like(gate_up), torch.empty_like(down)
    for e, rows in _slices(counts):
        grad_middle, hidden = _swiglu_backward(grad[rows] @ down[e], middle[rows])
        torch.mm(grad[rows].mT, hidden, out=grad_down[e])
        torch.mm(grad_middle.mT, x[rows], out=grad_up[e])
        torch.mm(grad_middle, gate_up[e], out=grad_x[rows])
    for e in (counts == 0).nonzero().flatten().tolist():
        grad_up[e].zero_()
        grad_down[e].zero_()
    return grad_x, grad_up, grad_down


@grouped_swiglu_backward.register_fake
def _(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor, middle: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gate_up), torch.empty_like(down)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, grad_y: Tensor, grad_middle: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and type(grad_y) is Tensor:  # the gradient is to be differentiated itself
        *inputs, counts, _ = ctx.saved_tensors
        # Views, or the gradient of the weights would run on into the steps that made x with them.
        x, gate_up, down = parts = [whole.view_as(whole) for whole in inputs]
        needed = [part for part in parts if part.requires_grad]
        y = _plainly(x, gate_up, down, counts)
        grads = iter(torch.autograd.grad(y, needed, grad_y, create_graph=True))
        return *(next(grads) if part.requires_grad else None for part in parts), None
    return *grouped_swiglu_backward(grad_y.contiguous(), *ctx.saved_tensors), None


grouped_swiglu.register_autograd(_differentiate, setup_context=_keep)


def _plainly(x: Rows, gate_up: GateUp, down: Down, counts: Int[Tensor, "E"]) -> Rows:
    """`grouped_swiglu` in operations that autograd knows."""
    slices = _slices(counts) or [(0, slice(0, 0))]
    return torch.cat([swiglu(x[rows] @ gate_up[e].mT) @ down[e].mT for e, rows in slices])


def _densely(
    x: Rows, gate_up: GateUp, down: Down, chosen: Int[Tensor, "M k"], weights: Float[Tensor, "M k"]
) -> Rows:
    """Every expert on every row, looking at no number."""
    share = torch.zeros_like(weights[:, :1]).expand(-1, len(gate_up)).scatter(1, chosen, weights)
    gate, up = torch.einsum("md,efd->mef", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("mef,edf,me->md", F.silu(gate) * up, down, share)


def _few(
    x: Rows, gate_up: GateUp, down: Down, chosen: Int[Tensor, "M k"], weights: Float[Tensor, "M k"]
) -> Rows:
    """Token by token: to sort so few would cost more than their products."""
    pairs = [(x[i : i + 1], e) for i, experts in enumerate(chosen.tolist()) for e in experts]
    said = [linear(swiglu(linear(row, gate_up[e])), down[e]) for row, e in pairs]
    return torch.bmm(weights[:, None], torch.cat(said).view(*chosen.shape, -1)).squeeze(1)


def _picked(
    x: Rows, gate_up: GateUp, down: Down, chosen: Int[Tensor, "M k"], weights: Float[Tensor, "M k"]
) -> Rows:
    """The same for a compiler, which makes loops of it that read the chosen experts where they lie."""
    wide = at_least_float32(x)
    middle = (gate_up[chosen].to(wide) * x[:, None, None].to(wide)).sum(-1).to(x.dtype)  # M k 2F
    said = (down[chosen].to(wide) * swiglu(middle)[:, :, None].to(wide)).sum(-1)  # M k D
    return (said * weights[:, :, None].to(wide)).sum(1).to(x.dtype)


def _fused(
    x: Rows, gate_up: GateUp, down: Down, chosen: Int[Tensor, "M k"], weights: Float[Tensor, "M k"]
) -> Rows:
    """Expert by expert: gather its rows, both products, weigh, add. Nothing larger than one expert's rows."""
    y = torch.zeros_like(x)
    k = chosen.shape[1]
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    tokens = order // k
    scale = weights.flatten().index_select(0, order)[:, None]
    for e, rows in _slices(torch.bincount(flat, minlength=len(gate_up))):
        who = tokens[rows]
        hidden = swiglu(x.index_select(0, who) @ gate_up[e].mT)
        y.index_add_(0, who, (hidden @ down[e].mT).mul_(scale[rows]))
    return y


def _in_one_call(x: Tensor, gate_up: Tensor, rows: int, each: int) -> bool:
    """Whether `grouped_mm` takes these (rows of whole 16 bytes, and at least one) and is the faster way."""
    aligned = all(width * x.element_size() % 16 == 0 for width in (x.shape[-1], gate_up.shape[1] // 2))
    if not aligned or rows == 0:
        return False
    if x.is_cuda:
        return x.dtype == torch.bfloat16
    few = rows <= each * len(gate_up)
    return few and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def _slices(counts: Int[Tensor, "E"]) -> list[tuple[int, slice]]:
    """(expert, its rows) for experts that have any."""
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]


def swiglu(middle: Float[Tensor, "... F2"]) -> Float[Tensor, "... F"]:
    """silu(gate) * up, the two of them side by side; without gradient in one new tensor."""
    gate, up = middle.chunk(2, dim=-1)
    hidden = F.silu(gate)
    return hidden * up if torch.is_grad_enabled() else hidden.mul_(up)


def _swiglu_backward(
    grad: Float[Tensor, "M F"], middle: Float[Tensor, "M F2"]
) -> tuple[Float[Tensor, "M F2"], Float[Tensor, "M F"]]:
    """(gradient of `middle`, the hidden value itself)."""
    gate, up = middle.chunk(2, dim=-1)
    grad_middle, silu = torch.empty_like(middle), F.silu(gate)
    grad_gate, grad_up = grad_middle.chunk(2, dim=-1)
    torch.mul(grad, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return grad_middle, silu.mul_(up)
