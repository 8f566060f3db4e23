"""Causal attention of short rows on a CPU, through plain products in blocks that stay in its cache.

    for each block of queries, over the keys up to its end:
        P   = softmax(scale Q K^T + triangle)          O  = P V
        dS  = P * (dP - sum(dP * P)),  dP = dO V^T     dQ = scale dS K,  dK += scale dS^T Q,  dV += P^T dO

The fused kernel of PyTorch keeps no scores, so its backward pass makes them again, and it gains nothing from
bfloat16. These blocks keep P for it: forward and backward take 0.5 to 0.8 of its time in float32 and 0.45 in
bfloat16, for memory that grows with the square of the length. Query heads that share a key/value head are
rows of one product. Oracle: `attend_naively`, in values and gradients.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from open_mythos.nn.precision import at_least_float32
from open_mythos.shapes import Keys, Mixed, Queries, Values

BLOCK = 64  # queries at a time, which look at no later block's keys
WIDE = 128  # the same in bfloat16 where no weights are kept for a backward pass
TILE = 2**20  # numbers in the scores of as many heads as are taken together (4 MB in float32), or of one

Grouped = Float[Tensor, "BG g T K"]  # query heads beside those that share their key/value head
Mix = Float[Tensor, "BG g T Kv"]
Flat = Float[Tensor, "BG S K"]
FlatValues = Float[Tensor, "BG S Kv"]


def attend_blockwise(q: Queries, k: Keys, v: Values, scale: float) -> Mixed:
    """Causal attention of every token to itself and those before it."""
    kv_heads = k.shape[1]
    grouped, k, v = q.unflatten(1, (kv_heads, -1)).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    mixed = _Blockwise.apply(grouped, k, v, scale) if torch.is_grad_enabled() else _mix(grouped, k, v, scale)
    return mixed.unflatten(0, (-1, kv_heads)).flatten(1, 2)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Grouped, k: Flat, v: FlatValues, scale: float) -> Mix:
        kept: list[Tensor] = []
        mixed = _mix(q, k, v, scale, kept)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Mix) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            needed = [x for x in (q, k, v) if x.requires_grad]
            mixed = _mix_plainly(q, k, v, ctx.scale)
            grads = iter(torch.autograd.grad(mixed, needed, grad, create_graph=True))
            return *(next(grads) if x.requires_grad else None for x in (q, k, v)), None
        return *_gradients(grad, q, k, v, ctx.scale, kept), None


def _mix(q: Grouped, k: Flat, v: FlatValues, scale: float, kept: list[Tensor] | None = None) -> Mix:
    """`kept` receives the weights of every block."""
    mixed = q.new_empty(*q.shape[:-1], v.shape[-1])
    block = WIDE if kept is None and q.dtype == torch.bfloat16 else BLOCK
    above = q.new_full((block, block), -torch.inf).triu(1)
    for heads, start, end in _blocks(q, block):
        asked = end - start
        rows = _rows(q[heads, :, start:end])
        scores = q.new_empty(len(rows), rows.shape[1], end)
        torch.baddbmm(scores, rows, k[heads, :end].mT, beta=0, alpha=scale, out=scores)
        scores.view(len(rows), -1, asked, end)[..., start:] += above[:asked, :asked]
        weights = scores.softmax(-1)
        mixed[heads, :, start:end] = _heads(torch.bmm(weights, v[heads, :end]), asked)
        if kept is not None:
            kept.append(weights)
    return mixed


def _gradients(
    grad: Mix, q: Grouped, k: Flat, v: FlatValues, scale: float, kept: list[Tensor]
) -> tuple[Grouped, Flat, FlatValues]:
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.empty_like(x, dtype=at_least_float32(x)) for x in (k, v))
    for (heads, start, end), weights in reversed(list(zip(_blocks(q), kept, strict=True))):
        asked, queries, towards = end - start, _rows(q[heads, :, start:end]), _rows(grad[heads, :, start:end])
        grad_weights = torch.bmm(towards, v[heads, :end].mT)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_queries = torch.bmm(grad_scores, k[heads, :end]).mul_(scale)
        grad_q[heads, :, start:end] = _heads(grad_queries, asked)
        grad_keys, grad_values = torch.bmm(grad_scores.mT, queries), torch.bmm(weights.mT, towards)
        if end == q.shape[2]:  # the last block of queries comes first, and is the one that sees all keys
            grad_k[heads], grad_v[heads] = grad_keys.mul_(scale), grad_values
        else:  # a product added to a part of the keys would go through the library head by head
            grad_k[heads, :end].add_(grad_keys, alpha=scale)
            grad_v[heads, :end].add_(grad_values)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _mix_plainly(q: Grouped, k: Flat, v: FlatValues, scale: float) -> Mix:
    scores = scale * q @ k[:, None].mT
    above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(above, -torch.inf).softmax(-1) @ v[:, None]


def _blocks(q: Grouped, block: int = BLOCK) -> Iterator[tuple[slice, int, int]]:
    """(key/value heads, first query, end of the queries)."""
    together = max(1, TILE // (block * q.shape[1] * q.shape[2]))
    for head in range(0, len(q), together):
        for start in range(0, q.shape[2], block):
            yield slice(head, head + together), start, min(start + block, q.shape[2])


def _rows(x: Grouped) -> Flat:
    """Queries of all the heads of a group below each other."""
    return x.reshape(len(x), -1, x.shape[-1])


def _heads(rows: Flat, asked: int) -> Grouped:
    """The inverse of `_rows`."""
    return rows.view(len(rows), -1, asked, rows.shape[-1])
