"""Ouro's exits, against its equations and the plain model of the checkpoint's tests: both stages of learning
them on one model, and a Q-exit that ends the work.
"""

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.testing import assert_close

from open_mythos.hub import ouro
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.cache import KVCache, LastExited
from open_mythos.nn.context import Context
from open_mythos.train.loss import IGNORED
from open_mythos.train.objective import Objective
from open_mythos.train.readout import LearnedExit, TaughtExit
from tests.lively import work_of
from tests.unit.hub.test_llama import theirs_of
from tests.unit.hub.test_ouro import TOKENS, every_step, randomised

TARGETS = TOKENS.roll(-1, 1)
TARGETS[:, -1] = IGNORED

Gates = Float[Tensor, "N B T"]


def known(model: LoopedLM, steps: int) -> tuple[Gates, Gates]:
    """Gates lambda_t, and the cross entropy of every step and token, zero where there is no target."""
    theirs = theirs_of(model, ouro)
    states, gates = every_step(theirs, TOKENS, steps)
    surprise = []
    for state in states:
        p = (state @ theirs["lm_head.weight"].T).softmax(-1)
        picked = p.gather(-1, TARGETS.clamp_min(0)[..., None])[..., 0]
        surprise.append(torch.where(TARGETS >= 0, -picked.log(), 0.0))
    return torch.stack(gates), torch.stack(surprise)


@pytest.mark.parametrize("beta", [0.1, 0.05])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_stage_one_is_the_expected_loss_less_the_entropy(steps: int, beta: float) -> None:
    """sum_t p_t CE_t - beta H(p); ours is KL to the uniform prior, that is beta log T more per token."""
    model = randomised()
    gates, surprise = known(model, steps)
    stayed, p = torch.ones_like(gates[0]), []
    for gate in gates[:-1]:
        p.append(stayed * gate)
        stayed = stayed * (1 - gate)
    p = torch.stack([*p, stayed])
    entropy = -(p * p.log()).sum(0)
    valid = TARGETS >= 0
    want = ((p * surprise).sum(0) - beta * (entropy - torch.tensor(float(steps)).log()))[valid].sum()
    scored = Objective(readout=LearnedExit(beta=beta)).score(
        model, [TARGETS], Plan(steps), Context.counting(TOKENS)
    )
    assert_close(scored.total, want, rtol=1e-5, atol=0)
    assert scored.loss.valid == valid.sum()


@pytest.mark.parametrize("steps", [2, 5])
def test_stage_two_asks_to_go_on_where_the_step_helped(steps: int) -> None:
    """Cross entropy of 1 - lambda_t with sigmoid(50 (max(0, CE_{t-1} - CE_t) - 0.005)), t = 2..T, over T."""
    model = randomised()
    gates, surprise = known(model, steps)
    want = pull = torch.zeros(())
    for t in range(1, steps):
        label = torch.sigmoid(50 * ((surprise[t - 1] - surprise[t]).clamp_min(0) - 0.005)).detach()
        on = 1 - gates[t]
        terms = label * on.log() + (1 - label) * (1 - on).log()
        want = want - terms[TARGETS >= 0].sum() / steps
        pull = pull + (label - on)[TARGETS >= 0].sum() / steps
    scored = Objective(readout=TaughtExit()).score(model, [TARGETS], Plan(steps), Context.counting(TOKENS))
    assert_close(scored.total, want, rtol=1e-5, atol=0)
    (bias,) = torch.autograd.grad(scored.total, model.loop.halt.score.bias)  # type: ignore[union-attr]
    assert_close(bias[0], pull, rtol=1e-4, atol=1e-5)


def exits(model: LoopedLM, threshold: float, steps: int) -> Int[Tensor, "B T"]:
    """The first t with 1 - prod_{j <= t} (1 - lambda_j) >= q, or the last."""
    gates, _ = known(model, steps)
    reached = 1 - (1 - gates[:-1]).cumprod(0) >= threshold
    return (~reached).cumprod(0).sum(0) + 1


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.95, 1.0])
def test_who_leaves_by_the_gate_takes_no_further_step(threshold: float) -> None:
    """A token works as long as it, or one behind it in its row, is still in the loop."""
    steps = 6
    model = randomised(early_exit_threshold=threshold, total_ut_steps=steps)
    want = exits(model, threshold, steps)
    ctx = Context.counting(TOKENS)
    with work_of(model) as work:
        state = model.loop(model.encode(TOKENS, ctx), ctx, Plan(steps))  # type: ignore[misc]
    assert torch.equal(state.taken.long(), want)
    still = want.flip(1).cummax(1).values.flip(1)
    rectangles = [
        int((still > n).any(1).sum()) * int((still > n).any(0).sum()) for n in range(int(still.max()))
    ]
    assert work == rectangles
    states, _ = every_step(theirs_of(model, ouro), TOKENS, steps)
    answers = torch.stack(states).gather(0, (want - 1)[None, :, :, None].expand(1, -1, -1, 32))[0]
    assert (model(TOKENS) - answers @ model.head.weight.T).abs().max() < 1e-4
    if threshold == 1:
        assert sum(work) == steps * TOKENS.numel()


@torch.no_grad()
def test_while_decoding_every_token_pays_for_its_own_steps_alone() -> None:
    model = randomised(early_exit_threshold=0.6, total_ut_steps=6)
    cache = KVCache(2, TOKENS.shape[1], LastExited())
    model(TOKENS[:, :4], cache=cache)
    spent = []
    for i in range(4, TOKENS.shape[1]):
        ctx = Context.counting(TOKENS[:, i : i + 1], i, cache)
        with work_of(model) as work:
            state = model.loop(model.encode(TOKENS[:, i : i + 1], ctx), ctx, Plan(6))  # type: ignore[misc]
        assert sum(work) == int(state.taken.sum())
        spent.append(sum(work))
    assert min(spent) < max(spent) <= 2 * 6
    assert sum(spent) < 2 * 6 * len(spent)
