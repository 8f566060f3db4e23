"""What training minimises, summed over the valid targets of a batch:

    cross entropy of the readout + z_loss * logsumexp^2 + ponder * (N + R) + balance of the experts

The readout is scored at the last step, at every step that has gradient with a fixed prior, against a
target of its own at every step, or at every step as often as a learned gate leaves there (readout.py).
Ponder cost and sequence balance come from the layers' tally.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.loop.halt import GatedExit
from open_mythos.loop.schedule import Plan
from open_mythos.loop.state import State
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Tally
from open_mythos.shapes import Features, Tokens
from open_mythos.train.loss import IGNORED, Loss
from open_mythos.train.parallel import at_hand
from open_mythos.train.readout import Exits, Final, Gated, LearnedExit, Readout, TaughtExit, mean_exit


class Scored(NamedTuple):
    """`loss` is the readout's alone; `total` also has the costs, and is what to differentiate.

    `exit_step` is the step after which a learned gate leaves, summed over the valid targets.
    """

    loss: Loss
    total: Tensor
    tally: Tally
    exit_step: Tensor | None = None


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

        Raises `ValueError` where every step is to be scored but the sequences differ in depth, or where
        exits are to be learned without a gate or without gradient at every step.
        """
        if isinstance(self.readout, Gated):
            return self._score_exits(self.readout, model, targets, plan, ctx, rng)
        tally = Tally()
        if isinstance(self.readout, Final):
            assert ctx.tokens is not None
            features = [model.features(ctx.tokens, plan, ctx, rng=rng, tally=tally)]
        else:
            states, last = _watched(model, plan, ctx, rng, tally)
            live = [state for state in states if state.h.requires_grad or not torch.is_grad_enabled()]
            features = [*(_read(model, state, ctx) for state in live[:-1]), last]
        loss = self.readout.loss(features, model.head.weight, targets, z_loss=self.z_loss)
        return Scored(loss, self._with_costs(loss, tally), tally)

    def _score_exits(
        self,
        readout: LearnedExit | TaughtExit,
        model: LoopedLM,
        targets: Sequence[Tokens],
        plan: Plan,
        ctx: Context,
        rng: Generator | None,
    ) -> Scored:
        gate = _gate(model, plan, len(ctx.positions))
        taught = isinstance(readout, TaughtExit)
        tally = Tally()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not taught):
            states, last = _watched(model, plan, ctx, rng, tally)
            features = [_read(model, state, ctx) for state in states[:-1]]
            # Below a threshold of one the model's own answer may be that of an earlier step.
            features.append(last if gate.config.threshold == 1 else _read(model, states[-1], ctx))
        logits = _exit_logits(gate, states)
        loss = readout.loss(features, model.head.weight, targets, logits, z_loss=self.z_loss)
        step = mean_exit(logits.detach()).where(targets[-1] != IGNORED, 0.0).sum()
        if taught:  # the model stays as it is: no costs, and no load to balance its experts by
            return Scored(loss, loss.total, Tally(), step)
        return Scored(loss, self._with_costs(loss, tally), tally, step)

    def _with_costs(self, loss: Loss, tally: Tally) -> Tensor:
        total = loss.total
        for name, cost in tally.costs.items():
            weight = self.ponder if name == "ponder" else 1.0
            total = total + weight * cost * loss.valid
        return total


def _watched(
    model: LoopedLM, plan: Plan, ctx: Context, rng: Generator | None, tally: Tally
) -> tuple[list[State], Features]:
    """The state after every step, and the features after the last."""
    assert ctx.tokens is not None
    if not isinstance(plan.steps, int):
        raise ValueError(
            "scoring every step needs one depth for the batch; let the schedule draw per='batch'"
        )
    states: list[State] = []
    last = model.features(
        ctx.tokens, plan, ctx, rng=rng, tally=tally, watch=lambda _, state: states.append(state)
    )
    return states, last


def _read(model: LoopedLM, state: State, ctx: Context) -> Features:
    """The features if this step had been the last."""
    return model.decode(state._replace(answer=state.h), ctx)


def _gate(model: LoopedLM, plan: Plan, rows: int) -> GatedExit:
    if model.loop is None or not isinstance(model.loop.halt, GatedExit):
        raise ValueError(
            'learning when to leave needs a gate: give the loop model.loop.halt={"is": "ExitGate"}'
        )
    if any(plan.split(rows)[0]):
        raise ValueError(
            "a learned exit weighs every step against the others, so every step needs gradient; "
            "leave the schedule's `grad` out"
        )
    return model.loop.halt


def _exit_logits(gate: GatedExit, states: Sequence[State]) -> Exits:
    """The gate's opinion of each state, asked from outside of the loop, so with its weights put together."""
    weight, bias = (at_hand(parameter) for parameter in (gate.score.weight, gate.score.bias))
    return torch.stack([F.linear(state.h, weight, bias).squeeze(-1).float() for state in states])
