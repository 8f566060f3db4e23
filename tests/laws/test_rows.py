"""A row of a batch ignores its neighbours, its padding, and the other documents in it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.cache import KVCache
from open_mythos.nn.context import Context
from tests.zoo import EVERY, LOOPED, awake, close, gradients, words


def alone(model: LoopedLM, row: Tensor, plan: Plan | None = None) -> Tensor:
    return model(row[None], plan)[0]


@pytest.mark.parametrize("name", EVERY)
def test_neighbours(name: str) -> None:
    model, tokens = awake(EVERY[name]), words(3)
    with torch.no_grad():
        together = model(tokens)
        for row in range(3):
            close(together[row], alone(model, tokens[row]))


@pytest.mark.parametrize("name", EVERY)
def test_padding(name: str) -> None:
    """On the left, on the right, and on both sides."""
    model, tokens = awake(EVERY[name]), words(3, 8)
    real = torch.ones_like(tokens)
    real[0, :3], real[1, 5:], real[2, :2], real[2, 6:] = 0, 0, 0, 0
    expected = [alone(model, tokens[row, real[row].bool()]) for row in range(3)]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            logits = model(tokens, ctx=Context.padded(tokens, real))
        assert logits.isfinite().all()  # a query of padding must not poison a loss that leaves it out
        for row in range(3):
            close(logits[row, real[row].bool()], expected[row])


@pytest.mark.parametrize("name", EVERY)
def test_positions_of_its_own(name: str) -> None:
    """Where a row starts is its own business, and rotary attention sees distances only."""
    model, tokens = awake(EVERY[name]), words(2)
    positions = torch.arange(7) + torch.tensor([[0], [5]])
    ragged = model(tokens, ctx=Context.ragged(tokens, positions))
    for row, start in enumerate((0, 5)):
        shifted = Context.ragged(tokens[row : row + 1], torch.arange(start, start + 7)[None])
        close(ragged[row], model(tokens[row : row + 1], ctx=shifted)[0])


@pytest.mark.parametrize("name", EVERY)
def test_documents(name: str) -> None:
    model, tokens = awake(EVERY[name]), words(2, 9)
    cuts = ([0, 4, 9], [0, 2, 9])
    documents, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, (_, cut, end) in enumerate(cuts):
        documents[row, cut:] = 1
        positions[row] = torch.cat([torch.arange(cut), torch.arange(end - cut)])
    ctx = replace(Context.ragged(tokens, positions), documents=documents)
    with torch.no_grad():
        packed = model(tokens, ctx=ctx)
        for row, (_, cut, _) in enumerate(cuts):
            close(packed[row, :cut], alone(model, tokens[row, :cut]))
            close(packed[row, cut:], alone(model, tokens[row, cut:]))


@pytest.mark.parametrize("name", EVERY)
def test_a_mask_can_only_hide(name: str) -> None:
    """A mask of the lower triangle changes nothing; hiding the first tokens equals cutting them off."""
    model, tokens = awake(EVERY[name]), words(2)
    positions = torch.arange(7).expand(2, -1)
    lower = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    ctx = replace(Context.counting(tokens), mask=lower)
    close(model(tokens, ctx=ctx), model(tokens))
    hidden = lower.clone()
    hidden[..., 3:, :3] = False
    ctx = replace(Context.ragged(tokens, positions), mask=hidden)
    cut = Context.ragged(tokens[:, 3:], positions[:, 3:])
    close(model(tokens, ctx=ctx)[:, 3:], model(tokens[:, 3:], ctx=cut))


def test_padding_looks_at_something() -> None:
    """Not every kernel knows what to say of a query that sees no column."""
    real = torch.tensor([[0, 0, 1, 1, 0]])
    sight = Context.padded(words(1, 5), real).sight()
    assert sight.mask is not None
    assert sight.mask.any(-1).all()


@pytest.mark.parametrize("name", ["mythos-mla", "mythos-gqa-act", "ngrams"])
def test_documents_and_a_filled_cache_are_refused(name: str) -> None:
    model, tokens, cache = awake(EVERY[name]), words(1, 6), KVCache(1, 6)
    apart = torch.tensor([[0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        whole = model(tokens, ctx=Context.counting(tokens).but(documents=apart))
        read = model(tokens[:, :4], ctx=Context.counting(tokens[:, :4], 0, cache).but(documents=apart[:, :4]))
        close(read, whole[:, :4])
        with pytest.raises(ValueError, match="does not remember which document a token belongs to"):
            model(tokens[:, 4:], ctx=Context.counting(tokens[:, 4:], 4, cache).but(documents=apart[:, 4:]))


@pytest.mark.parametrize("name", ["mythos-mla", "mythos-gqa-act"])
@pytest.mark.parametrize("length", [5, 12])
def test_who_may_look_at_nothing_spoils_nobody(name: str, length: int) -> None:
    """A mask may hide all columns from padding; few queries and many go different ways."""
    model, tokens = awake(EVERY[name]), words(2, length)
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[0, :, :, :2] = False
    logits = model(tokens, ctx=Context.counting(tokens).but(mask=mask))
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("name", EVERY)
def test_tokens_of_either_width(name: str) -> None:
    model, tokens = awake(EVERY[name]), words()
    assert torch.equal(model(tokens.int()), model(tokens))


@pytest.mark.parametrize("name", LOOPED)
def test_depth_of_its_own(name: str) -> None:
    """Per-sequence depth equals running each row alone, values and gradients."""
    plan = Plan((4, 1, 3), (2, 1, 2))
    tokens = words(3)
    model, single = awake(LOOPED[name]), awake(LOOPED[name])
    weights = torch.randn(3, 7, model.config.vocab)
    together = model(tokens, plan)
    (together * weights).sum().backward()
    for row in range(3):
        logits = alone(single, tokens[row], Plan(plan.steps[row], plan.grad[row]))
        close(together[row], logits)
        (logits * weights[row]).sum().backward()
    close(gradients(model), gradients(single), 1e-4)
    with torch.no_grad():
        close(model(tokens, plan), together.detach())


@pytest.mark.parametrize("name", LOOPED)
def test_depth_with_padding_and_documents(name: str) -> None:
    model, tokens = awake(LOOPED[name]), words(3, 8)
    real = torch.ones_like(tokens)
    real[0, :3], real[2, 6:] = 0, 0
    plan = Plan((3, 1, 2))
    with torch.no_grad():
        logits = model(tokens, plan, ctx=Context.padded(tokens, real))
        for row in range(3):
            keep = real[row].bool()
            close(logits[row, keep], alone(model, tokens[row, keep], Plan(plan.steps[row])))
