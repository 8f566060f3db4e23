"""The only file that calls an attention kernel.

    out = softmax(scale * q k^T + mask) v            grouped: H / G query heads share a key/value head

Few queries, as in decoding, go through two plain products with the heads of a group as the rows of one
matrix (on a CPU that is many times faster than a fused kernel; see docs/numerics.md). Short causal rows on
a CPU go block by block (blockwise.py). All else goes through `scaled_dot_product_attention`. Where values are
a part of the keys, as MLA's latents are (`attend_latents`), the fused kernel can be told that the heads are
queries of one head; it then reads what is held once and not twice. The oracle of all is `attend_naively`.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from open_mythos.nn.blockwise import attend_blockwise
from open_mythos.nn.context import Sight
from open_mythos.nn.transforms import transformed
from open_mythos.shapes import Keys, Mask, Mixed, Queries, Values

FEW = 8  # queries per head up to which plain products are taken
LONG = 2**20  # numbers held per row from which reading them twice costs more than that kernel's start
SHORT = 1024  # tokens per row up to which blocks are taken; what they keep grows with its square
LONGER = 2**14  # the same in bfloat16 without gradient, for which nothing is kept


def attend(
    q: Queries, k: Keys, v: Values, sight: Sight, scale: float | None = None, dropout: float = 0.0
) -> Mixed:
    """Attention over the keys that `sight` allows, scaled by 1/sqrt(K) unless told otherwise."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast, what a table or a norm added is float32
    if q.shape[2] <= FEW and not sight.causal and not dropout:
        return _plain_products(q, k, v, sight.mask, scale)
    if transformed() and not dropout:  # the kernels know no forward-mode derivative
        return _plain_products(q, k, v, _triangle(q) if sight.causal else sight.mask, scale)
    if sight.causal and not dropout and _blocks_are_faster(q):
        return attend_blockwise(q, k, v, scale)
    width = max(q.shape[-1], v.shape[-1])  # fused kernels want one width for keys and values
    mixed = F.scaled_dot_product_attention(
        _widen(q, width),
        _widen(k, width),
        _widen(v, width),
        attn_mask=sight.mask,
        dropout_p=dropout,
        is_causal=sight.causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return mixed[..., : v.shape[-1]]


def attend_latents(q: Queries, held: Keys, rank: int, sight: Sight, scale: float) -> Mixed:
    """`attend` with one key for all heads, whose first `rank` channels are the value."""
    once = q.device.type == "cpu" and q.dtype == held.dtype == torch.float32 and not torch.is_grad_enabled()
    few = q.shape[2] <= FEW and not sight.causal
    if not once or not few or held.shape[2] * held.shape[3] < LONG:
        return attend(q, held, held[..., :rank], sight, scale)
    mask = sight.mask
    if mask is not None:  # B 1 T S, for every head, or B H T S
        mask = mask.expand(-1, q.shape[1], -1, -1).flatten(1, 2)[:, None]
    rows = q.flatten(1, 2)[:, None]  # B 1 HT W
    mixed = F.scaled_dot_product_attention(rows, held, held, attn_mask=mask, scale=scale)
    return mixed[..., :rank].view(*q.shape[:3], rank)


def attend_naively(q: Queries, k: Keys, v: Values, sight: Sight, scale: float | None = None) -> Mixed:
    """The definition, with every score written out. The oracle."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if sight.causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if sight.mask is not None:
        scores = scores.masked_fill(~sight.mask, -torch.inf)
    return scores.softmax(-1) @ v


def _plain_products(q: Queries, k: Keys, v: Values, mask: Mask | None, scale: float) -> Mixed:
    batch, groups, asked = len(q), k.shape[1], q.shape[2]
    rows = q.reshape(batch * groups, -1, q.shape[-1])  # the queries of a group's heads below each other
    scores = _scores(rows, k.flatten(0, 1), scale)  # BG H/G*T S
    if mask is not None:
        by_head = scores.view(batch, groups, -1, asked, k.shape[2])
        seen = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (groups, -1))
        scores = by_head.masked_fill(~seen, -torch.inf).flatten(0, 1).flatten(1, 2)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    if mask is not None:  # who may look at nothing sees zero, as in the fused kernel
        blind = ~seen.any(-1, keepdim=True).expand(*by_head.shape[:-1], 1)
        weights = weights.masked_fill(blind.reshape(*weights.shape[:-1], 1), 0)
    return torch.bmm(weights, v.flatten(0, 1)).view(batch, -1, asked, v.shape[-1])


def _triangle(q: Queries) -> Mask:
    return torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()


def _scores(
    rows: Float[Tensor, "BG M K"], keys: Float[Tensor, "BG S K"], scale: float
) -> Float[Tensor, "BG M S"]:
    if rows.device.type == "cpu" and rows.dtype != torch.float32:
        # The other way round the library would first copy the keys of the whole context.
        return torch.bmm(keys, (rows * scale).mT).mT
    return torch.bmm(rows * scale, keys.mT)


def _blocks_are_faster(q: Queries) -> bool:
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    longer = q.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    return q.shape[2] <= (LONGER if longer else SHORT)


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
