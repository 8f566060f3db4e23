"""When a token has thought enough, and what it then says.

A halting rule folds the states h_1, h_2, ... into one answer, spending a unit of mass per token:

    answer  =  sum_n w_n h_n          sum_n w_n = 1          left = 1 - sum of the w_n so far

    Last         the latest state is the answer
    ACT          a learned share each step; once the sum would reach the threshold, or at the last step,
                 all that is left             Graves 2016 (arXiv 1603.08983), eqs. 5-8
    UniversalACT the same as tensor2tensor has it, Dehghani et al. 2018 (arXiv 1807.03819): the share is
                 read off the state before the layers, nothing is forced at the last step, and
                 "basic" mixes  answer <- w h + (1 - w) answer  where "accumulated" adds up
    ExitGate     leave with probability g_n = sigmoid(w h_n + b); the answer is the first state at which
                 1 - prod (1 - g_m) reaches the threshold       Ouro, Zhu et al. 2025 (arXiv 2510.25741)

ACT reports the ponder cost N + R (eq. 13) to the tally as "ponder"; only R has a gradient. `as_released`
repeats what the package open-mythos 0.5.0 did: no remainder at the last step.
Law (tests/laws/test_halt.py): the mass is one, and a state that never changes is its own answer.
"""

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from open_mythos.config import Config
from open_mythos.loop.state import State
from open_mythos.nn.context import Context
from open_mythos.nn.precision import outside_autocast
from open_mythos.shapes import Hidden, PerSequence, PerToken


class Last(Config):
    def build(self, dim: int) -> "LastHalting":
        return LastHalting()


class ACT(Config):
    threshold: float = 0.99
    as_released: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"the halting threshold lies in (0, 1], got {self.threshold}")

    def build(self, dim: int) -> "AdaptiveHalting":
        return AdaptiveHalting(self, dim)


class UniversalACT(Config):
    mix: Literal["basic", "accumulated"] = "basic"
    epsilon: float = 0.01
    bias: float = 1.0  # of the halting unit, at initialisation
    freeze: bool = False  # halted states stay (the paper's text) or go on being changed (the code)
    marked: bool = True  # the share is read off the state with its signals added (the code), or as it came

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ValueError(f"UniversalACT.epsilon lies in (0, 1), got {self.epsilon}")

    def build(self, dim: int) -> "UniversalHalting":
        return UniversalHalting(self, dim)


class ExitGate(Config):
    """A threshold of one never exits early. Law: tests/unit/presets/test_ouro.py."""

    threshold: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"the exit threshold lies in (0, 1], got {self.threshold}")

    def build(self, dim: int) -> "GatedExit":
        return GatedExit(self, dim)


@final
class LastHalting(nn.Module):
    def forward(self, state: State, marked: Hidden, h: Hidden, last: PerSequence, ctx: Context) -> State:
        return state.but(h=h, answer=h, left=state.left * ~last[:, None])


@final
class AdaptiveHalting(nn.Module):
    def __init__(self, config: ACT, dim: int) -> None:
        super().__init__()
        self.config = config
        self.score = nn.Linear(dim, 1)

    def share(self, h: Hidden) -> PerToken:
        """The halting probability of each token, in float32."""
        return _said(self.score, h).sigmoid()

    def forward(self, state: State, marked: Hidden, h: Hidden, last: PerSequence, ctx: Context) -> State:
        share = self.share(h)
        enough = 1 - state.left + share >= self.config.threshold
        ends = enough if self.config.as_released else enough | last[:, None]
        weight = torch.where(ends, state.left, torch.minimum(share, state.left))
        if ctx.tally is not None:
            running = (state.left > 0).float()
            ctx.tally.cost("ponder", _mean(running + running * ends * state.left, ctx))
        answer = torch.addcmul(_so_far(state), weight[..., None].to(h.dtype), h)
        return state.but(h=h, answer=answer, left=(state.left - weight).masked_fill(ends, 0))


@final
class UniversalHalting(nn.Module):
    def __init__(self, config: UniversalACT, dim: int) -> None:
        super().__init__()
        self.config = config
        self.score = nn.Linear(dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.score.bias, self.config.bias)

    def forward(self, state: State, marked: Hidden, h: Hidden, last: PerSequence, ctx: Context) -> State:
        left, running = state.left, state.left > 0
        share = _said(self.score, marked if self.config.marked else state.h).sigmoid()
        ends = running & (1 - left + share > 1 - self.config.epsilon)
        weight = torch.where(ends, left, share * running)
        if ctx.tally is not None:
            ctx.tally.cost("ponder", _mean(running + ends * left, ctx))
        w = weight[..., None].to(h.dtype)
        so_far = _so_far(state)
        answer = so_far * (1 - w) + w * h if self.config.mix == "basic" else so_far + w * h
        moved = torch.where(running[..., None], h, state.h) if self.config.freeze else h
        return state.but(h=moved, answer=answer, left=torch.where(ends, 0, left - weight))


@final
class GatedExit(nn.Module):
    def __init__(self, config: ExitGate, dim: int) -> None:
        super().__init__()
        self.config = config
        self.score = nn.Linear(dim, 1)

    def logits(self, h: Hidden) -> PerToken:
        """Of leaving after the step that made `h`; for the losses of train/readout.py."""
        return _said(self.score, h)

    def forward(self, state: State, marked: Hidden, h: Hidden, last: PerSequence, ctx: Context) -> State:
        done = state.left == 0
        # A gate that is quite sure must not, by rounding, spend the mass of a token that stays.
        stays = (state.left * self.logits(h).neg().sigmoid()).clamp_min(torch.finfo(torch.float32).tiny)
        ends = last[:, None]
        if self.config.threshold < 1:
            ends = ends | (1 - stays >= self.config.threshold)
        answer = torch.where(done[..., None], state.answer, h)
        return state.but(h=h, answer=answer, left=torch.where(done | ends, 0, stays))


def _said(unit: nn.Linear, h: Hidden) -> PerToken:
    """By a halting unit, of each token: under autocast too in float32, or rounding would say who leaves."""
    with outside_autocast(h):
        return unit(h.to(unit.weight.dtype)).squeeze(-1).float()


def finish(rule: nn.Module, state: State) -> State:
    """What every token would answer if this had been its last step; only ACT has something to add."""
    answer = state.answer
    if isinstance(rule, AdaptiveHalting) and not rule.config.as_released:
        answer = torch.addcmul(_so_far(state), state.left[..., None].to(state.h.dtype), state.h)
    return state.but(answer=answer, left=torch.zeros_like(state.left))


def _so_far(state: State) -> Hidden:
    """What the steps before this one answered: of the first, nothing, whatever the state began with. The mass
    that is left does not tell the first, as a tiny share leaves it at one by rounding."""
    return state.answer * (state.taken > 0)[..., None]  # on a CPU several times as fast as to fill


def _mean(cost: PerToken, ctx: Context) -> Float[Tensor, ""]:
    """Over all tokens that entered the loop, though some may have left; padding does not count."""
    return cost.mean() if ctx.entered is None else cost.sum() / ctx.entered


Halting = Last | ACT | UniversalACT | ExitGate
