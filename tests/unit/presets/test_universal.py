"""The Universal Transformer against tensor2tensor's equations written out token by token."""

import pytest
import torch
from torch import Tensor

from open_mythos.loop.halt import ACT, Last, UniversalACT
from open_mythos.loop.mark import position_sinusoid
from open_mythos.loop.state import State
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Tally
from open_mythos.presets.universal import Size, universal
from tests.lively import lively

SIZE = Size(vocab=31, dim=16, width=24, heads=2, most=5, dropout=0.0)
TOKENS = torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(0))


def halting(model: LoopedLM, mix: str, freeze: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Section 1.3 of the released code, with flags as it keeps them: answer, N and R."""
    loop, ctx, most = model.loop, Context.counting(TOKENS), 5
    assert loop is not None
    s = model.embed(TOKENS) * 4.0
    total, rest, count = (torch.zeros(TOKENS.shape) for _ in range(3))
    answer = torch.zeros_like(s)
    for n in range(most):
        seen = s + position_sinusoid(ctx.positions, 16, 10_000.0) + 4.0 * loop.mark.table.weight[n]
        p = loop.halt.score(seen).squeeze(-1).sigmoid()
        running = (total < 1).float()
        new = (total + p * running > 0.99).float() * running
        running = (total + p * running <= 0.99).float() * running
        total = total + p * running
        rest = rest + new * (1 - total)
        total = total + new * rest
        count = count + running + new
        weight = (p * running + new * rest)[..., None]
        moved = seen
        for layer in loop.layers:
            moved = layer(moved, ctx.turn(torch.tensor([n] * 3), [n] * 3))
        active = (running + new)[..., None].bool()
        s = torch.where(active, moved, s) if freeze else moved
        answer = weight * s + (1 - weight) * answer if mix == "basic" else answer + weight * s
    return answer, count, rest


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("mix", ["basic", "accumulated"])
@pytest.mark.parametrize("attention", ["causal", "full"])
def test_halting_is_that_of_the_released_code(attention: str, mix: str, freeze: bool) -> None:
    halt = UniversalACT(mix=mix, freeze=freeze)  # type: ignore[arg-type]
    model = lively(universal(SIZE.replace(attention=attention, halt=halt)))
    with torch.no_grad():
        model.loop.halt.score.bias.fill_(-1.0)  # type: ignore[union-attr]
        answer, count, rest = halting(model, mix, freeze)
        assert count.min() < count.max()
        assert model.norm is not None
        torch.testing.assert_close(model.features(TOKENS), model.norm(answer), rtol=1e-4, atol=1e-4)
    tally = Tally()
    model.features(TOKENS, tally=tally)  # with gradient nobody leaves, and the cost is that of all tokens
    torch.testing.assert_close(tally.costs["ponder"], (count + rest).mean(), rtol=1e-4, atol=1e-4)


def test_the_ponder_cost_teaches_the_halting_unit() -> None:
    model, tally = lively(universal(SIZE)), Tally()
    model.features(TOKENS, tally=tally)
    tally.costs["ponder"].backward()
    assert model.loop.halt.score.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("halt", "rest"), [(UniversalACT(mix="accumulated"), 0.7616), (ACT(), 0.0)])
def test_the_last_step_forces_nothing_but_graves_does(halt: UniversalACT | ACT, rest: float) -> None:
    model = lively(universal(SIZE.replace(halt=halt, most=2)))
    with torch.no_grad():
        model.loop.halt.score.weight.zero_()  # type: ignore[union-attr]
        model.loop.halt.score.bias.fill_(-2.0)  # type: ignore[union-attr]
    states: list[State] = []
    model.features(TOKENS, watch=lambda _, state: states.append(state))
    torch.testing.assert_close(states[-1].left, torch.full((3, 9), rest), rtol=0, atol=1e-4)


def test_an_encoder_sees_what_comes_after() -> None:
    changed = TOKENS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 31
    for attention, blind in (("causal", True), ("full", False)):
        model = lively(universal(SIZE.replace(attention=attention, halt=Last())))
        same = torch.allclose(model(TOKENS)[:, 0], model(changed)[:, 0], atol=1e-6)
        assert same is blind


def test_padding_changes_nothing_for_an_encoder() -> None:
    model = lively(universal(SIZE.replace(attention="full")))
    real = torch.ones_like(TOKENS)
    real[0, 6:] = 0
    with torch.no_grad():
        padded = model(TOKENS, ctx=Context.padded(TOKENS, real))[0, :6]
        torch.testing.assert_close(padded, model(TOKENS[:1, :6])[0], rtol=1e-4, atol=1e-4)
