"""Gradient flows through the last steps of a plan and no further, per batch and per sequence."""

import pytest
import torch

from open_mythos.loop.halt import ExitGate, Last
from open_mythos.loop.inject import Nothing
from open_mythos.loop.route import Everyone
from open_mythos.loop.schedule import Plan
from open_mythos.loop.update import LTI
from open_mythos.nn.context import Context
from tests.zoo import LOOPED, awake, close, gradients, words

# Loops that see their input at every step, and whose last step always counts.
FED = [
    name
    for name, config in LOOPED.items()
    if isinstance(config.loop.halt, Last)
    and isinstance(config.loop.route, Everyone)
    and (isinstance(config.loop.update, LTI) or not isinstance(config.loop.inject, Nothing))
]


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("grad", [2, 7])
def test_equals_stopping_by_hand(name: str, grad: int) -> None:
    model, hand, tokens = awake(LOOPED[name]), awake(LOOPED[name]), words()
    weights = torch.randn(2, 7, model.config.vocab)
    (model(tokens, Plan(4, grad)) * weights).sum().backward()

    ctx = Context.counting(tokens)
    state = hand.encode(tokens, ctx)
    for n in range(4):
        step, last = torch.full((2,), n), torch.full((2,), n == 3)
        with torch.set_grad_enabled(n >= 4 - grad):
            state = hand.step(state, ctx.turn(step, [n, n]), step, last)
    (hand.head(hand.decode(state, ctx)) * weights).sum().backward()
    close(gradients(model), gradients(hand), 1e-4)


@pytest.mark.parametrize("name", LOOPED)
def test_reaches_the_start_only_when_no_step_is_frozen(name: str) -> None:
    model, tokens = awake(LOOPED[name]), words(3)
    start = torch.randn(3, 7, model.config.dim, requires_grad=True)
    plan = Plan((1, 3, 3), (2, 2, 3))  # all of row 0, not the first step of row 1, all of row 2
    model(tokens, plan, start=start).square().sum().backward()
    assert start.grad is not None
    reached = start.grad.abs().amax((1, 2))
    assert reached[1] == 0
    assert (reached[[0, 2]] > 0).all()


@pytest.mark.parametrize("name", FED)
def test_the_input_keeps_its_gradient(name: str) -> None:
    """Frozen steps must not cut the encoded input off from the steps that follow."""
    model, tokens = awake(LOOPED[name]), words()
    model(tokens, Plan((4, 2), (1, 1))).square().sum().backward()
    assert model.embed.weight.grad is not None
    assert (model.embed.weight.grad[tokens.unique()].abs().amax(-1) > 0).all()
    for parameter in model.prelude.parameters():
        assert parameter.grad is not None


@pytest.mark.parametrize("name", LOOPED)
def test_frozen_steps_carry_none(name: str) -> None:
    model = awake(LOOPED[name])
    carried: list[bool] = []
    model(words(), Plan(5, 2), watch=lambda n, state: carried.append(state.h.requires_grad))
    assert carried[:3] == [False, False, False]
    # Where tokens choose their depth, none may be left for the last two.
    assert carried[3:] == [True, True] or not isinstance(LOOPED[name].loop.route, Everyone)


@pytest.mark.parametrize("name", LOOPED)
def test_every_parameter_learns(name: str) -> None:
    model = awake(LOOPED[name])
    tokens = words(4, 16)
    model(tokens, 4).log_softmax(-1).square().mean().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    if isinstance(LOOPED[name].loop.halt, ExitGate):  # it decides and is not read; its loss is apart
        idle -= {"loop.halt.score.weight", "loop.halt.score.bias"}
    assert not idle


def test_a_plan_that_does_not_fit_says_so() -> None:
    model = awake(LOOPED["parcae"])
    with pytest.raises(ValueError, match="the plan is for 3 sequences, the batch has 2"):
        model(words(), Plan((1, 2, 3)))
