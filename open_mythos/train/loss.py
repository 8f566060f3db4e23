"""Next-token cross entropy that never holds all logits.

    loss  =  sum_i w_i ( logsumexp(z_i) - z_i[target_i]  +  c logsumexp(z_i)^2 ),     z = features W^T

Rows go through the head a chunk at a time, and the gradient with respect to features and weight is
made on the spot, while the chunk's logits are at hand: memory is one chunk of logits and one copy of
the head, whatever the batch. The second term is the z-loss (Chowdhery et al. 2022, arXiv 2204.02311,
c = 1e-4). Sums and counts are returned apart, so that whoever accumulates can divide by the count of
valid targets over all micro-batches and all ranks.

Oracle: `naive_next_token_loss`, in values and gradients.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from open_mythos.nn.precision import working_dtype
from open_mythos.nn.product import linear
from open_mythos.shapes import Features, PerToken, Tokens

IGNORED = -100  # a target that is not to be predicted
CHUNK_BYTES, CHUNK_ROWS = 2**24, 256  # of fp32 logits at a time, and the fewest rows that are fast

Scalar = Float[Tensor, ""]


class Loss(NamedTuple):
    """Sums over the valid targets of a batch.

    total   what to minimise: carries gradient; divide by the global `valid`
    valid   count of valid targets
    tokens  (B, T) cross entropy in nats without weights and z-loss, 0 where ignored; no gradient
    """

    total: Scalar
    valid: Int[Tensor, ""]
    tokens: PerToken


def next_token_loss(
    features: Features,
    head: Float[Tensor, "V D"],
    targets: Tokens,
    *,
    weights: PerToken | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Loss:
    """Cross entropy of `targets`, already aligned with `features`; -100 marks those to ignore.

    `weights` scale each token's term and may carry gradient. `chunk` is the number of rows at a
    time. Logits are computed in the precision of autocast where it is on, else of the features;
    everything after them in fp32. Raises `ValueError` for targets outside the vocabulary (on the CPU,
    where looking costs nothing).
    """
    _check(targets, head.shape[0])
    dtype = working_dtype(features)
    rows = features.flatten(0, 1).to(dtype)
    scales = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights.float()
    total, tokens = _ChunkedLoss.apply(
        rows,
        head,
        targets.flatten(),
        scales.flatten(),
        z_loss,
        chunk or max(CHUNK_ROWS, CHUNK_BYTES // (4 * head.shape[0])),
        torch.is_grad_enabled(),
    )
    return Loss(total, (targets != IGNORED).sum(), tokens.view_as(targets))


def naive_next_token_loss(
    features: Features,
    head: Float[Tensor, "V D"],
    targets: Tokens,
    *,
    weights: PerToken | None = None,
    z_loss: float = 0.0,
) -> Loss:
    """The same by its definition, with all logits at once."""
    logits = F.linear(features, head).float()
    tokens = F.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="none")
    valid = targets != IGNORED
    terms = tokens + z_loss * logits.logsumexp(-1).square() * valid
    total = (terms if weights is None else terms * weights).sum()
    return Loss(total, valid.sum(), tokens.detach())


class _ChunkedLoss(torch.autograd.Function):
    """(rows, head, targets, scales) -> (scalar, per-row cross entropy), gradients computed ahead."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, "M D"],
        head: Float[Tensor, "V D"],
        targets: Int[Tensor, "M"],
        scales: Float[Tensor, "M"],
        z_loss: float,
        chunk: int,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        need_rows, need_head = (training and need for need in ctx.needs_input_grad[:2])
        weight = head.to(rows.dtype)
        d_rows = torch.empty_like(rows) if need_rows else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if need_head else None
        tokens, terms = (torch.empty_like(scales) for _ in range(2))
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, len(rows), chunk):
                at = slice(start, start + chunk)
                logits = linear(rows[at], weight)
                probabilities, normaliser = _softmax(logits)
                tokens[at], terms[at] = _terms(logits, normaliser, targets[at], z_loss)
                if not (need_rows or need_head):
                    continue
                d_logits = _d_logits_(probabilities, normaliser, targets[at], z_loss).to(rows.dtype)
                scale = scales[at].where(targets[at] != IGNORED, 0.0).to(rows.dtype)[:, None]
                if d_rows is not None:
                    torch.mul(linear(d_logits, weight.T), scale, out=d_rows[at])
                if d_head is not None:
                    _accumulate_(d_head, d_logits.T, rows[at] * scale)
        ctx.save_for_backward(d_rows, d_head, terms)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(tokens)
        return (terms * scales).sum(), tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        d_rows, d_head, terms = ctx.saved_tensors
        return (
            None if d_rows is None else d_rows * gradient.to(d_rows.dtype),
            None if d_head is None else (d_head * gradient).to(ctx.head_dtype),
            None,
            terms * gradient if ctx.needs_input_grad[3] else None,
            None,
            None,
            None,
        )


def _softmax(logits: Float[Tensor, "m V"]) -> tuple[Float[Tensor, "m V"], Float[Tensor, "m 1"]]:
    """Probabilities, and the log of the sum of exponents, in fp32.

    The most likely token's probability gives the sum away: on a CPU in less than half the time of logsumexp.
    """
    probabilities = logits.softmax(-1, dtype=torch.float32)
    largest = logits.amax(-1, keepdim=True).float()
    return probabilities, largest - probabilities.amax(-1, keepdim=True).log()


def _terms(
    logits: Float[Tensor, "m V"], normaliser: Float[Tensor, "m 1"], targets: Int[Tensor, "m"], z_loss: float
) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
    """Cross entropy, and the same with z-loss, of each row."""
    valid = targets != IGNORED
    entropy = (normaliser - logits.gather(1, targets.clamp_min(0)[:, None]).float())[:, 0]
    terms = entropy + z_loss * normaliser[:, 0].square()
    return entropy.where(valid, 0.0), terms.where(valid, 0.0)


def _d_logits_(
    probabilities: Float[Tensor, "m V"],
    normaliser: Float[Tensor, "m 1"],
    targets: Int[Tensor, "m"],
    z_loss: float,
) -> Float[Tensor, "m V"]:
    """softmax (1 + 2 c logsumexp) - onehot, written over the probabilities."""
    if z_loss:
        probabilities.mul_(1 + 2 * z_loss * normaliser)
    ones = torch.ones_like(normaliser)
    return probabilities.scatter_add_(1, targets.clamp_min(0)[:, None], -ones)


def _accumulate_(
    total: Float[Tensor, "V D"], left: Float[Tensor, "V m"], right: Float[Tensor, "m D"]
) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _check(targets: Tokens, vocabulary: int) -> None:
    if targets.device.type != "cpu" or not targets.numel():
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if high >= vocabulary or (low < 0 and bool(((targets < 0) & (targets != IGNORED)).any())):
        raise ValueError(
            f"targets lie between {low} and {high}; "
            f"they should be token ids below {vocabulary}, or {IGNORED} to ignore"
        )
