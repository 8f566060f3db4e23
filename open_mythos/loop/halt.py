"""When a token has thought enough, and what it then says.

A halting rule folds the states h_1, h_2, ... into one answer, spending a unit of mass per token:

    answer  =  sum_n w_n h_n          sum_n w_n = 1          left = 1 - sum of the w_n so far

    Last         the latest state is the answer
    ACT          a learned share each step; once the sum would reach the threshold, or at the last step,
                 all that is left             Graves 2016 (arXiv 1603.08983), eqs. 5-8

ACT reports the ponder cost N + R (eq. 13) to the tally as "ponder"; only R has a gradient. `as_released`
repeats what the package open-mythos 0.5.0 did: no remainder at the last step.
Law (tests/laws/test_halt.py): the mass is one, and a state that never changes is its own answer.
"""

from typing import final

import torch
from torch import nn

from open_mythos.config import Config
from open_mythos.loop.state import State
from open_mythos.nn.context import Context
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


@final
class LastHalting(nn.Module):
    def forward(self, state: State, marked: Hidden, h: Hidden, last: PerSequence, ctx: Context) -> State:
        return state._replace(h=h, answer=h, left=state.left * ~last[:, None])


@final
class AdaptiveHalting(nn.Module):
    def __init__(self, config: ACT, dim: int) -> None:
        super().__init__()
        self.config = config
        self.score = nn.Linear(dim, 1)

    def share(self, h: Hidden) -> PerToken:
        """The halting probability of each token, in float32."""
        return self.score(h).squeeze(-1).float().sigmoid()

    def forward(self, state: State, marked: Hidden, h: Hidden, last: PerSequence, ctx: Context) -> State:
        share = self.share(h)
        enough = 1 - state.left + share >= self.config.threshold
        ends = enough if self.config.as_released else enough | last[:, None]
        weight = torch.where(ends, state.left, torch.minimum(share, state.left))
        if ctx.tally is not None:
            running = (state.left > 0).float()
            ctx.tally.cost("ponder", (running + running * ends * state.left).mean())
        # The first step's answer starts from nothing, whatever the state began with.
        so_far = torch.where((state.left == 1)[..., None], 0, state.answer)
        answer = so_far + weight[..., None].to(h.dtype) * h
        return state._replace(h=h, answer=answer, left=torch.where(ends, 0, state.left - weight))


Halting = Last | ACT
