"""What training minimises, summed over the valid targets of a batch:

    cross entropy of the readout + z_loss * logsumexp^2 + ponder * (N + R) + balance of the experts
        - similarity * R(k) + drift * (log |h_N| / |h_1|)^2 + jacobian * |J|^2        (regularise.py)

The readout is scored at the last step, at every step that has gradient with a fixed prior, against a
target of its own at every step, or at every step as often as a learned gate leaves there (readout.py).
Ponder cost and sequence balance come from the layers' tally.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.loop.halt import GatedExit
from open_mythos.loop.schedule import Plan
from open_mythos.loop.state import State
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Tally
from open_mythos.shapes import Features, Hidden, Tokens
from open_mythos.train.loss import IGNORED, Loss
from open_mythos.train.parallel import at_hand
from open_mythos.train.readout import Exits, Final, Gated, LearnedExit, Readout, TaughtExit, mean_exit
from open_mythos.train.regularise import jacobian_secant, loop_similarity, norm_drift


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
    similarity: float = 0.0  # reward for blocks of `block` layers that are alike, where none loop (paper: 10)
    block: int = 1
    drift: float = 0.0  # price of a state that swells or shrinks over the steps
    jacobian: float = 0.0  # price of a last step that carries disturbances on (paper: 0.1)

    def score(
        self,
        model: LoopedLM,
        targets: Sequence[Tokens],
        plan: Plan,
        ctx: Context,
        rng: Generator | None = None,
    ) -> Scored:
        """Run the model on the tokens of `ctx` and score it against `targets` (one, or one per step).

        Raises `ValueError` where every step is to be looked at but the sequences differ in depth, where exits
        are to be learned without a gate or without gradient at every step, and where a model has not what a
        regulariser shapes.
        """
        if isinstance(self.readout, Gated):
            return self._score_exits(self.readout, model, targets, plan, ctx, rng)
        tally, states = Tally(), list[State]()
        if isinstance(self.readout, Final) and not self._shapes_steps:
            assert ctx.tokens is not None
            features = [model.features(ctx.tokens, plan, ctx, rng=rng, tally=tally)]
        else:
            states, last = _watched(model, plan, ctx, rng, tally)
            live = [state for state in states if state.h.requires_grad or not torch.is_grad_enabled()]
            earlier = [] if isinstance(self.readout, Final) else live[:-1]
            features = [*(_read(model, state, ctx) for state in earlier), last]
        loss = self.readout.loss(features, model.head.weight, targets, z_loss=self.z_loss)
        self._shape(model, states, ctx, rng, tally)
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
        self._shape(model, states, ctx, rng, tally)
        return Scored(loss, self._with_costs(loss, tally), tally, step)

    @property
    def _shapes_steps(self) -> bool:
        return bool(self.drift or self.jacobian)

    def _shape(
        self,
        model: LoopedLM,
        states: Sequence[State],
        ctx: Context,
        rng: Generator | None,
        tally: Tally,
    ) -> None:
        """Add what the regularisers ask for to the costs."""
        if self.similarity:
            if model.loop is not None:
                raise ValueError(
                    "objective.similarity makes layers alike that do not loop; those of a loop are one"
                )
            alike = loop_similarity([*model.prelude, *model.coda], self.block)
            tally.cost("similarity", -self.similarity * alike)
        if self._shapes_steps and model.loop is None:
            raise ValueError(
                "objective.drift and objective.jacobian shape the steps of a loop; there is none"
            )
        if self.drift:
            tally.cost("drift", self.drift * norm_drift(states[0].h, states[-1].h))
        if self.jacobian:
            rng = rng if rng is not None else Generator().manual_seed(0)
            step = _another(model, states[-1], len(states), ctx)
            tally.cost("jacobian", self.jacobian * jacobian_secant(step, states[-1].h, rng))

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
        raise ValueError("to look at every step the batch needs one depth; let the schedule draw per='batch'")
    states: list[State] = []
    last = model.features(
        ctx.tokens, plan, ctx, rng=rng, tally=tally, watch=lambda _, state: states.append(state)
    )
    return states, last


def _another(model: LoopedLM, state: State, taken: int, ctx: Context) -> Callable[[Hidden], Hidden]:
    """The last of the `taken` steps, as a function of the state it begins with."""
    loop, rows, device = model.loop, len(state.h), state.h.device
    assert loop is not None
    if any(isinstance(parameter, DTensor) for parameter in loop.parameters()):
        raise ValueError(
            "objective.jacobian takes a step outside of the loop, whose weights lie on several processes; "
            "leave it out, or train on one"
        )
    number = torch.full((rows,), taken - 1, device=device)
    last = torch.ones(rows, dtype=torch.bool, device=device)
    ctx = replace(ctx.turn(number, rows * (taken - 1,)), tally=None)

    def step(h: Hidden) -> Hidden:
        before = State.begin(state.e.detach(), h).but(past=state.past.detach(), first=state.first.detach())
        return loop.step(before, ctx, number, last).h

    return step


def _read(model: LoopedLM, state: State, ctx: Context) -> Features:
    """The features if this step had been the last."""
    return model.decode(state.but(answer=state.h), ctx)


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
