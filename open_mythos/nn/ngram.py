"""Hashed n-gram embeddings: the last few tokens, looked up together.

    x_t = E[token_t] + sum_n  F_n[hash(token_{t-n+1} .. token_t)]

Clark et al. 2022 (CANINE, arXiv 2103.06874) hash characters; Pagnoni et al. 2024 (BLT, arXiv 2412.09871) and
Huang et al. 2025 (over-tokenized transformers, arXiv 2501.16975) look up n-grams of the input so. Tables grow
without a FLOP, and what neighbours say of the next token need not be computed by attention.

An n-gram does not reach over the begin of a row or document. To go on from a cache, a token's number is
remembered there. Tables begin at zero, as if there were none.
"""

from typing import final

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.nn.context import DOCUMENTS_AND_CACHE, Context
from open_mythos.shapes import Hidden, Tokens

NONE = -1  # before the first token
SPREAD, TURN = 6_364_136_223_846_793_005, 1_442_695_040_888_963_407  # of Knuth's generator, modulo 2^64


class NGrams(Config):
    rows: int = 16_384  # of each table; what the hash throws together shares a row
    orders: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"n-gram embeddings need at least one row, got rows={self.rows}")
        if not self.orders or min(self.orders) < 2 or len(set(self.orders)) < len(self.orders):
            raise ValueError(f"the orders of n-grams are different numbers from 2 on, got {self.orders}")

    def build(self, dim: int) -> "HashedNGrams":
        return HashedNGrams(self, dim)


@final
class HashedNGrams(nn.Module):
    def __init__(self, config: NGrams, dim: int) -> None:
        super().__init__()
        self.config = config
        self.tables = nn.ModuleList(nn.Embedding(config.rows, dim) for _ in config.orders)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in self.parameters():
            nn.init.zeros_(table)

    def forward(self, x: Hidden, tokens: Tokens, ctx: Context) -> Hidden:
        before = previous(tokens, ctx, max(self.config.orders) - 1)
        for order, table in zip(self.config.orders, self.tables, strict=True):
            x = x + table(hashed(torch.stack((tokens, *before[: order - 1])), self.config.rows))
        return x


def previous(tokens: Tokens, ctx: Context, count: int) -> list[Tokens]:
    """The tokens 1, 2, .. `count` places before each one; `NONE` where a row or document begins, or
    where a mask hides them."""
    held = ctx.extend(tokens[..., None])[..., 0]
    find = _in_batch if ctx.fresh else _in_cache
    return [find(held, ctx, lag) for lag in range(1, count + 1)]


def hashed(grams: Int[Tensor, "N B T"], rows: int) -> Tokens:
    """One row number per n-gram, the same on every machine."""
    mixed = torch.zeros_like(grams[0], dtype=torch.int64)
    for tokens in grams:
        mixed = (mixed + tokens - NONE) * SPREAD + TURN  # in 64 bits, wrapping around
    return ((mixed >> 32) & 0x7FFF_FFFF) % rows  # the upper half is the well mixed one


def _in_batch(tokens: Tokens, ctx: Context, lag: int) -> Tokens:
    def back(x: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        return F.pad(x, (lag, 0), value=NONE)[:, : x.shape[1]]

    wanted = ctx.positions - lag
    there = (back(ctx.positions) == wanted) & (wanted >= 0)
    if ctx.documents is not None:
        there = there & (back(ctx.documents) == ctx.documents)
    if ctx.mask is not None:
        there = there & F.pad(ctx.mask[:, 0].diagonal(-lag, 1, 2), (lag, 0))[:, : tokens.shape[1]]
    return torch.where(there, back(tokens), NONE)


def _in_cache(held: Int[Tensor, "B S"], ctx: Context, lag: int) -> Tokens:
    """A token's column is its position."""
    if ctx.documents is not None:
        raise ValueError(DOCUMENTS_AND_CACHE)
    wanted = ctx.positions - lag
    there, column = wanted >= 0, wanted.clamp_min(0)
    if ctx.mask is not None:
        mask = ctx.mask[:, 0].expand(len(held), -1, -1)
        there = there & mask.gather(2, column[..., None])[..., 0]
    return torch.where(there, held.gather(1, column), NONE)
