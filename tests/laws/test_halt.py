"""A halting rule spends a mass of one, and a state that never changes is its own answer."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from open_mythos.loop.halt import ACT, ExitGate, Halting, UniversalACT
from open_mythos.loop.schedule import Plan
from open_mythos.loop.state import State
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Tally
from tests.zoo import LOOPED, awake, close, every, words

ROWS, LENGTH, DIM, TURNS = 2, 50, 8, 6
# T2T's halting forces nothing at the last step, so it spends its mass only if it may turn long enough.
FORCED = [rule for rule in every(Halting) if not isinstance(rule, UniversalACT)]
FORCED += [ACT(threshold=t) for t in (0.01, 0.5, 1.0)]


def turns(module: nn.Module, states: list[torch.Tensor]) -> list[State]:
    """The rule's states over `states`, the last of which is the last step; beginning from noise."""
    ctx = Context.counting(torch.zeros(ROWS, LENGTH, dtype=torch.long), cache=None)
    begin = torch.randn(ROWS, LENGTH, DIM)
    state, seen = State.begin(begin, begin), []
    for n, h in enumerate(states):
        last = torch.full((ROWS,), n == len(states) - 1)
        after = module(state, h, h, last, ctx)
        state = after.but(taken=state.taken + (state.left > 0))
        seen.append(state)
    return seen


def built(rule: Halting) -> nn.Module:
    torch.manual_seed(3)
    module = rule.build(DIM)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("rule", FORCED, ids=repr)
def test_the_mass_is_one(rule: Halting) -> None:
    states = [torch.randn(ROWS, LENGTH, DIM) for _ in range(TURNS)]
    seen = turns(built(rule), states)
    left = torch.stack([torch.ones(ROWS, LENGTH), *(state.left for state in seen)])
    weights = left[:-1] - left[1:]
    assert (weights >= 0).all()
    assert (left[-1] == 0).all()
    close(weights.sum(0), torch.ones(ROWS, LENGTH))
    if isinstance(rule, ACT):
        close(seen[-1].answer, sum(w[..., None] * h for w, h in zip(weights, states, strict=True)))


def test_a_gate_however_sure_does_not_let_a_token_leave_before_its_threshold() -> None:
    module = built(ExitGate(threshold=1.0))
    with torch.no_grad():
        module.score.bias.fill_(200.0)  # 1 - sigmoid is zero in float32
    states = [torch.randn(ROWS, LENGTH, DIM) for _ in range(TURNS)]
    *before, end = turns(module, states)
    assert all((state.left > 0).all() for state in before)
    assert torch.equal(end.answer, states[-1])


@pytest.mark.parametrize("rule", every(Halting), ids=repr)
def test_autocast_does_not_decide_who_leaves(rule: Halting) -> None:
    states = [torch.randn(ROWS, LENGTH, DIM) for _ in range(TURNS)]
    expected = turns(built(rule), states)
    with torch.autocast("cpu", torch.bfloat16):
        given = turns(built(rule), states)
    for one, other in zip(given, expected, strict=True):
        assert torch.equal(one.left, other.left)


@pytest.mark.parametrize("rule", FORCED, ids=repr)
def test_a_state_that_never_changes_is_its_own_answer(rule: Halting) -> None:
    h = torch.randn(ROWS, LENGTH, DIM)
    close(turns(built(rule), [h] * TURNS)[-1].answer, h)


@pytest.mark.parametrize("rule", FORCED, ids=repr)
def test_one_step_answers_with_its_state(rule: Halting) -> None:
    """Whatever the state began with is forgotten."""
    h = torch.randn(ROWS, LENGTH, DIM)
    close(turns(built(rule), [h])[-1].answer, h)


def test_shares_too_small_to_lower_the_mass_still_add_up() -> None:
    """In float32 a share below 2^-25 leaves a mass of one at one; what it weighed is not forgotten."""
    module = built(ACT(as_released=True))
    nn.init.zeros_(module.score.weight)
    nn.init.constant_(module.score.bias, -18.0)
    states = [torch.randn(ROWS, LENGTH, DIM) for _ in range(TURNS)]
    seen = turns(module, states)
    assert (seen[-1].left == 1).all()
    close(seen[-1].answer, torch.tensor(-18.0).sigmoid() * sum(states), 1e-12)


def test_a_finished_token_keeps_its_answer() -> None:
    states = [torch.randn(ROWS, LENGTH, DIM) for _ in range(TURNS)]
    seen = turns(built(ACT(threshold=0.5)), states)
    for before, after in pairwise(seen):
        done = before.left == 0
        assert torch.equal(after.answer[done], before.answer[done])
    assert (seen[1].left == 0).any()
    assert (seen[1].left > 0).any()


def forces(rule: object) -> bool:
    """Whether the rule ends every token at the last step."""
    return not isinstance(rule, UniversalACT) and not getattr(rule, "as_released", False)


@pytest.mark.parametrize("name", [name for name in LOOPED if forces(LOOPED[name].loop.halt)])
def test_after_the_loop_nothing_is_left(name: str) -> None:
    model, tokens = awake(LOOPED[name]), words(3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            ctx = Context.counting(tokens)
            state = model.loop(model.encode(tokens, ctx), ctx, Plan((1, 2, 4)))
            assert (state.left == 0).all()


def test_ponder_cost() -> None:
    """Graves 2016, eq. 13: steps taken and remainder, averaged over tokens; only the latter learns."""
    module, tally = built(ACT(threshold=0.7)), Tally()
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    ctx = Context.counting(tokens).with_tally(tally)
    states = torch.randn(TURNS, ROWS, LENGTH, DIM)
    state = State.begin(states[0], states[0])
    for n in range(TURNS):
        after = module(state, states[n], states[n], torch.full((ROWS,), n == TURNS - 1), ctx)
        state = after.but(taken=state.taken + (state.left > 0))
    shares = module.share(states.flatten(0, 1)).view(TURNS, -1)
    costs = []
    for token in shares.T:
        spent, n = torch.zeros(()), 0
        while n < TURNS - 1 and spent + token[n] < 0.7:
            spent, n = spent + token[n], n + 1
        costs.append(n + 1 + 1 - spent)
    expected = torch.stack(costs).mean()
    close(tally.costs["ponder"], expected)
    assert len({round(float(cost.detach())) for cost in costs}) > 2
    given, wanted = (
        torch.autograd.grad(c, list(module.parameters())) for c in (tally.costs["ponder"], expected)
    )
    close(given, wanted)
