import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from open_mythos.train.regularise import (
    jacobian_secant,
    jacobian_vjp,
    loop_similarity,
    norm_drift,
    unit_probe,
)


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))


def test_a_looped_stack_is_wholly_similar() -> None:
    block = [layer(), layer()]
    assert_close(loop_similarity(block + copy.deepcopy(block) + block, 2), torch.tensor(1.0))


def test_similarity_is_saunshis_formula() -> None:
    layers, k = [layer() for _ in range(6)], 2
    weights = [[m[0].weight.flatten(), m[1].weight.flatten()] for m in layers]  # type: ignore[index]
    by_weight = [
        sum(
            F.cosine_similarity(weights[i * k + j][g], weights[(i + 1) * k + j][g], dim=0)
            for i in range(6 // k - 1)
            for j in range(k)
        )
        / (6 - k)
        for g in range(2)
    ]
    assert_close(loop_similarity(layers, k), torch.stack(by_weight).mean())


def test_rewarding_similarity_brings_blocks_together() -> None:
    layers = nn.ModuleList(layer() for _ in range(4))
    optimizer = torch.optim.SGD(layers.parameters(), lr=1.0)
    before = float(loop_similarity(list(layers), 2).detach())
    for _ in range(20):
        (-loop_similarity(list(layers), 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loop_similarity(list(layers), 2).detach()) > max(0.9, before)


@pytest.mark.parametrize("block", [0, 3, 4, 5])
def test_blocks_must_divide(block: int) -> None:
    with pytest.raises(ValueError, match="blocks of"):
        loop_similarity([layer() for _ in range(4)], block)


def test_norm_drift() -> None:
    first = torch.randn(2, 3, 4)
    assert_close(norm_drift(first, first), torch.tensor(0.0))
    assert_close(norm_drift(first, torch.e * first), torch.tensor(1.0))
    assert_close(norm_drift(first, first / torch.e), torch.tensor(1.0))
    assert torch.isfinite(norm_drift(torch.zeros(1, 1, 4), first[:1, :1]))


class Mixing(nn.Module):
    """A linear step that mixes tokens and channels, so that its Jacobian is known."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.tokens = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(3, 3))

    def forward(self, h: Tensor) -> Tensor:
        return torch.einsum("btd,de,ts->bse", h, self.channels, self.tokens)


@pytest.mark.parametrize("estimate", [jacobian_vjp, jacobian_secant])
def test_jacobian_estimates_the_frobenius_norm(estimate: object) -> None:
    torch.manual_seed(0)
    step, state, rng = Mixing(), torch.randn(2, 3, 5), torch.Generator().manual_seed(0)
    frobenius = step.channels.square().sum() * step.tokens.square().sum()  # of the Kronecker product
    expected = frobenius / (3 * 5)
    draws = torch.stack([estimate(step, state, rng) for _ in range(2000)])  # type: ignore[operator]
    assert_close(draws.mean().detach(), expected.detach(), rtol=0.05, atol=0)
    (gradient,) = torch.autograd.grad(draws.mean(), step.channels)
    (wanted,) = torch.autograd.grad(expected, step.channels)
    assert (gradient - wanted).norm() < 0.1 * wanted.norm()


def test_jacobian_goes_through_attention_twice() -> None:
    attend = nn.Linear(8, 24)

    def step(h: Tensor) -> Tensor:
        q, k, v = attend(h)[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]

    state = torch.randn(2, 4, 8, requires_grad=True)
    jacobian_vjp(step, state, torch.Generator().manual_seed(0)).backward()
    assert attend.weight.grad.abs().max() > 0
    assert state.grad is None


def test_probes_are_unit_and_from_the_generator() -> None:
    like = torch.empty(2, 3, 16)
    probe = unit_probe(like, torch.Generator().manual_seed(1))
    assert_close(probe.norm(dim=-1), torch.ones(2, 3))
    assert torch.equal(probe, unit_probe(like, torch.Generator().manual_seed(1)))
