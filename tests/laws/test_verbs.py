"""The forward pass is its four verbs and nothing else: encode, step, ..., step, decode, head."""

import pytest
import torch
from torch import Tensor

from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from tests.zoo import EVERY, LOOPED, awake, close, words


def by_hand(model: LoopedLM, tokens: Tensor, steps: int) -> Tensor:
    ctx, rows = Context.counting(tokens), len(tokens)
    state = model.encode(tokens, ctx)
    for n in range(steps):
        step, last = torch.full((rows,), n), torch.full((rows,), n == steps - 1)
        state = model.step(state, ctx.turn(step, [n] * rows), step, last)
    return model.head(model.decode(state, ctx))


@pytest.mark.parametrize("name", EVERY)
def test_forward_is_its_verbs(name: str) -> None:
    model, tokens = awake(EVERY[name]), words()
    expected = by_hand(model, tokens, model.steps)
    close(model(tokens), expected)
    with torch.no_grad():  # experts are fused and finished tokens leave
        close(model(tokens), expected)


@pytest.mark.parametrize("name", LOOPED)
def test_more_or_fewer_loops_than_trained_are_fine(name: str) -> None:
    model, tokens = awake(LOOPED[name]), words()
    many = model(tokens, 7)
    assert many.isfinite().all()
    close(many, by_hand(model, tokens, 7))
    one, two = model(tokens, 1), model(tokens, 2)
    assert not torch.allclose(one, two, atol=1e-4)  # every step counts


@pytest.mark.parametrize("name", ["parcae", "mythos-mla-act"])
def test_a_watcher_sees_every_step(name: str) -> None:
    seen: list[int] = []
    awake(LOOPED[name])(words(), 4, watch=lambda n, state: seen.append(n))
    assert seen == [0, 1, 2, 3]


def test_a_model_without_a_loop_has_no_steps() -> None:
    model, tokens = awake(EVERY["fixed-depth"]), words()
    ctx = Context.counting(tokens)
    with pytest.raises(ValueError, match="no steps to take"):
        model.step(model.encode(tokens, ctx), ctx, torch.zeros(2, dtype=torch.long), torch.ones(2).bool())


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (torch.zeros(2, 0, dtype=torch.long), "no tokens to read"),
        (torch.tensor([[0, 61]]), "token 61 is outside the vocabulary of 0 to 60"),
        (torch.tensor([[0, -1]]), "token -1 is outside"),
        (torch.zeros(1, 9, dtype=torch.long), "9 tokens do not fit the model's context of 8"),
    ],
)
def test_bad_input_is_told_so(tokens: Tensor, says: str) -> None:
    model = EVERY["parcae"].replace(context=8).build()
    with pytest.raises(ValueError, match=says):
        model(tokens)
    with pytest.raises(ValueError, match="at least one step, got 0"):
        model(words(1, 4), 0)


def test_tokens_are_whole_numbers_in_rows() -> None:
    model = EVERY["parcae"].build()
    for tokens, got in ((torch.zeros(3, dtype=torch.long), "int64"), (torch.zeros(1, 2), "float32")):
        with pytest.raises(ValueError, match=rf"int64 or int32 of shape \(B, T\), got torch.{got}"):
            model.check(tokens)
