"""Which tokens take a step at all, decided by the model itself.

    Everyone        all of them
    ExpertChoice    at step n the best floor(c_n T), at least one, of the tokens that took the step before:
                        h  <-  h + g F(h),   g = alpha sigmoid(router_n(h))
    TokenChoice     every token decides once, at the first step, that it takes m of them:
                        h  <-  F(h),  the last time  e + g F(h),   g = alpha softmax(router(e))_m

Mixture-of-recursions, Bae et al. 2025 (arXiv 2507.10524), with the rules and weights of its code. A token
that does not take a step keeps its state, is done, and is seen by nobody at that step (recursion-wise keys
and values), or as it was at its first (`keys=FirstStep()`, loop/keys.py). Without a cache only the chosen
tokens are computed, as a shorter batch; with one, all are, and the others are masked out: the same numbers
(tests/unit/loop/test_route.py).

Ranking a sequence looks ahead, so ExpertChoice ranks in training only and in eval mode takes the tokens
whose logit is above zero; `balance` weighs the cross entropy that teaches it so. Not `causal`, it ranks in
eval mode too, as the released code does: then a token depends on later ones, and on what is read with it.
While training warms up, the capacities fall along half a cosine from 1 (`warmup`). TokenChoice is balanced
within each sequence, as in the paper; its code does it over the batch. `z_loss` weighs the mean squared
logit, of TokenChoice that of the logits' logsumexp.

Each module says whether tokens that are done may leave the batch for good (`may_leave`).
"""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.nn.context import Columns, Context
from open_mythos.shapes import Hidden, PerToken, Steps

Layers = Callable[[Hidden, Context], Hidden]
Chosen = Bool[Tensor, "B T"]
FLAG = 9  # where in the cache, beside a layer's keys and values, it is kept who took the step


class Everyone(Config):
    def turns(self, steps: int) -> float:
        """How many of `steps` a token takes on average, where the router does as it is taught."""
        return steps

    def build(self, dim: int) -> "NoRouting":
        return NoRouting()


class ExpertChoice(Config):
    capacity: tuple[float, ...] = (1.0, 2 / 3, 1 / 3)  # of the sequence, per step; the last goes on
    warmup: float = 0.0  # share of training over which the capacities fall from 1 to these
    alpha: float = 0.1
    balance: float = 1e-3
    z_loss: float = 0.0
    causal: bool = True  # in eval mode

    def __post_init__(self) -> None:
        if not self.capacity or not all(0 < c <= 1 for c in self.capacity):
            raise ValueError(f"capacities are shares of the sequence in (0, 1], got {self.capacity}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"the capacities' warm-up is a share of training in [0, 1], got {self.warmup}")

    def turns(self, steps: int) -> float:
        return sum(self.capacity[min(n, len(self.capacity) - 1)] for n in range(steps))

    def build(self, dim: int) -> "ExpertRouting":
        return ExpertRouting(self, dim)


class TokenChoice(Config):
    depths: int
    alpha: float = 1.0
    balance: float = 0.1
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.depths < 1:
            raise ValueError(f"tokens choose among one depth or more, got {self.depths}")

    def turns(self, steps: int) -> float:
        return sum(1 - n / self.depths for n in range(min(steps, self.depths)))

    def build(self, dim: int) -> "TokenRouting":
        return TokenRouting(self, dim)


@final
class NoRouting(nn.Module):
    may_leave = True

    def forward(
        self, x: Hidden, e: Hidden, left: PerToken, step: Steps, ctx: Context, layers: Layers
    ) -> tuple[Hidden, Chosen | None]:
        return layers(x, ctx), None


@final
class ExpertRouting(nn.Module):
    def __init__(self, config: ExpertChoice, dim: int) -> None:
        super().__init__()
        self.config = config
        self.score = nn.Linear(dim, len(config.capacity), bias=False)

    @property
    def ranks(self) -> bool:
        return self.training or not self.config.causal

    @property
    def may_leave(self) -> bool:
        return not self.ranks  # then capacities are shares of all

    def forward(
        self, x: Hidden, e: Hidden, left: PerToken, step: Steps, ctx: Context, layers: Layers
    ) -> tuple[Hidden, Chosen | None]:
        at = step.clamp_max(len(self.config.capacity) - 1)
        logits = self.score(x).float().gather(-1, at[:, None, None].expand(*x.shape[:2], 1)).squeeze(-1)
        there = (left > 0) & (ctx.positions >= 0)
        ranked = self._best(logits.detach(), there, at, ctx)
        chosen = ranked if self.ranks else there & (logits > 0)
        if ctx.tally is not None:
            ctx.tally.cost("route", self._cost(logits, ranked, there))
        gate = self.config.alpha * logits.sigmoid()
        return run_chosen(x, x, gate, chosen, ctx, layers), chosen

    def _best(self, logits: PerToken, there: Chosen, at: Int[Tensor, "B"], ctx: Context) -> Chosen:
        """The highest of those still there, as many as the share of this step of all that is not padding."""
        shares = self._shares(logits, ctx)[at]
        count = (shares * (ctx.positions >= 0).sum(1)).floor().clamp_min(1)
        order = logits.masked_fill(~there, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(1)
        return there & (rank < count[:, None])

    def _shares(self, like: Tensor, ctx: Context) -> Float[Tensor, "N"]:
        """The capacity of every step now: 1 at the beginning, then along half a cosine to its own."""
        shares = like.new_tensor(self.config.capacity, dtype=torch.float64)
        if ctx.progress is None or self.config.warmup == 0:
            return shares
        done = (ctx.progress.double() / self.config.warmup).clamp_max(1.0)
        return shares + (1 - shares) * 0.5 * (1 + (torch.pi * done).cos())

    def _cost(self, logits: PerToken, ranked: Chosen, there: Chosen) -> Float[Tensor, ""]:
        taught = F.binary_cross_entropy_with_logits(logits, ranked.float(), reduction="none")
        both = self.config.balance * taught + self.config.z_loss * logits.square()
        return (both * there).sum() / there.sum().clamp_min(1)


@final
class TokenRouting(nn.Module):
    may_leave = True

    def __init__(self, config: TokenChoice, dim: int) -> None:
        super().__init__()
        self.config = config
        self.score = nn.Linear(dim, config.depths, bias=False)

    def forward(
        self, x: Hidden, e: Hidden, left: PerToken, step: Steps, ctx: Context, layers: Layers
    ) -> tuple[Hidden, Chosen | None]:
        logits = self.score(e).float()  # of the encoded input, so the same at every step
        shares = logits.softmax(-1)
        best, depth = shares.max(-1)
        chosen = (left > 0) & (ctx.positions >= 0) & (depth >= step[:, None])
        if ctx.tally is not None:
            ctx.tally.cost("route", self._cost(logits, shares, depth, step, ctx))
        last = depth == step[:, None]
        base = torch.where(last[..., None], e.to(x.dtype), 0)
        gate = torch.where(last, self.config.alpha * best, 1)
        return run_chosen(x, base, gate, chosen, ctx, layers), chosen

    def _cost(
        self,
        logits: Float[Tensor, "B T E"],
        shares: Float[Tensor, "B T E"],
        depth: Int[Tensor, "B T"],
        step: Steps,
        ctx: Context,
    ) -> Float[Tensor, ""]:
        """Imbalance is depths times the sum of (how often chosen) * (mean probability): one when even.

        Counted once, at the first step.
        """
        real = (ctx.positions >= 0).float()[..., None]
        real = real / real.sum(1, keepdim=True).clamp_min(1)
        often = (F.one_hot(depth, self.config.depths) * real).sum(1)
        imbalance = (self.config.depths * often * (shares * real).sum(1)).sum(-1)
        squared = (logits.logsumexp(-1, keepdim=True).square() * real).sum((1, 2))
        both = self.config.balance * imbalance + self.config.z_loss * squared
        return both.mul(step == 0).mean()


def run_chosen(
    x: Hidden, base: Hidden, gate: PerToken, chosen: Chosen, ctx: Context, layers: Layers
) -> Hidden:
    """base + gate * layers(x) where chosen, x elsewhere; nobody looks at those not chosen."""
    gate = gate[..., None].to(x.dtype)
    if ctx.cache is not None or x.is_meta:  # on meta nobody can be counted, nor needs to be hidden
        seen = ctx if ctx.cache is None or ctx.lender is not None else _watched(chosen, ctx)
        return torch.where(chosen[..., None], base + gate * layers(x, seen), x)
    needed = chosen
    if ctx.lender is not None:  # the first step says how a token is seen, whether it is chosen or not
        assert ctx.step is not None
        needed = chosen | (ctx.step == 0)[:, None]
    length = int(needed.sum(1).max())
    if length == 0:
        return x
    pick = (~needed).long().argsort(dim=1, stable=True)[:, :length]  # the needed ones first, in order
    wide = pick[..., None].expand(-1, -1, x.shape[-1])
    part = x.gather(1, wide)
    y = layers(part, _shorter(ctx, pick, needed.gather(1, pick)))
    y = base.gather(1, wide) + gate.gather(1, pick[..., None]) * y
    return x.scatter(1, wide, torch.where(chosen.gather(1, pick)[..., None], y, part))


def _shorter(ctx: Context, pick: Int[Tensor, "B t"], there: Bool[Tensor, "B t"]) -> Context:
    """The context of these tokens alone; those that are not there are padding."""
    mask, lent = ctx.mask, ctx.lender is not None
    if mask is not None:
        rows = pick[:, None, :, None].expand(-1, 1, -1, mask.shape[-1])
        mask = mask.expand(len(pick), -1, -1, -1).gather(2, rows)
        if not lent:
            mask = mask.gather(3, pick[:, None, None, :].expand(-1, 1, mask.shape[2], -1))
    return ctx.but(
        positions=torch.where(there, ctx.positions.gather(1, pick), -1),
        start=None,
        tokens=None if ctx.tokens is None else ctx.tokens.gather(1, pick),
        documents=None if ctx.documents is None else ctx.documents.gather(1, pick),
        mask=mask,
        columns=Columns(ctx.positions, ctx.documents) if lent else None,
        memo={},
    )


def _watched(chosen: Chosen, ctx: Context) -> Context:
    """The same tokens, looking only at those that took the step, and at themselves."""
    flags = ctx.at("loop", 0).extend(chosen[..., None].float(), part=FLAG)[..., 0] > 0  # B S
    columns = torch.arange(flags.shape[1], device=flags.device)
    itself = columns == ctx.positions.clamp_min(0)[..., None]
    seen = (flags[:, None, :] | itself)[:, None]  # B 1 T S
    return ctx.but(mask=seen if ctx.mask is None else seen & ctx.mask, memo={})


Routing = Everyone | ExpertChoice | TokenChoice
