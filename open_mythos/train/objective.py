"""What training minimises, summed over the valid targets of a batch:

    cross entropy of the readout + z_loss * logsumexp^2 + ponder * (N + R) + balance of the experts

The readout is scored at the last step, at every step that has gradient with a fixed prior, or against a
target of its own at every step (readout.py). Ponder cost and sequence balance come from the layers' tally.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from open_mythos.config import Config
from open_mythos.loop.schedule import Plan
from open_mythos.loop.state import State
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Tally
from open_mythos.shapes import Features, Tokens
from open_mythos.train.loss import Loss
from open_mythos.train.readout import Final, Readout


class Scored(NamedTuple):
    """`loss` is the readout's alone; `total` also has the costs, and is what to differentiate."""

    loss: Loss
    total: Tensor
    tally: Tally


class Objective(Config):
    readout: Readout = Final()
    z_loss: float = 0.0
    ponder: float = 0.0

    def score(
        self,
        model: LoopedLM,
        targets: Sequence[Tokens],
        plan: Plan,
        ctx: Context,
        rng: Generator | None = None,
    ) -> Scored:
        """Run the model on the tokens of `ctx` and score it against `targets` (one, or one per step).

        Raises `ValueError` where every step is to be scored but the sequences differ in depth.
        """
        tally = Tally()
        features = self._features(model, plan, ctx, rng, tally)
        loss = self.readout.loss(features, model.head.weight, targets, z_loss=self.z_loss)
        total = loss.total
        for name, cost in tally.costs.items():
            weight = self.ponder if name == "ponder" else 1.0
            total = total + weight * cost * loss.valid
        return Scored(loss, total, tally)

    def _features(
        self, model: LoopedLM, plan: Plan, ctx: Context, rng: Generator | None, tally: Tally
    ) -> list[Features]:
        assert ctx.tokens is not None
        if isinstance(self.readout, Final):
            return [model.features(ctx.tokens, plan, ctx, rng=rng, tally=tally)]
        if not isinstance(plan.steps, int):
            raise ValueError(
                "scoring every step needs one depth for the batch; let the schedule draw per='batch'"
            )
        states: list[State] = []
        last = model.features(
            ctx.tokens, plan, ctx, rng=rng, tally=tally, watch=lambda _, state: states.append(state)
        )
        live = [state for state in states if state.h.requires_grad or not torch.is_grad_enabled()]
        return [*(model.decode(state._replace(answer=state.h), ctx) for state in live[:-1]), last]
