"""Rotation against multiplication by exp(i p w), near and at a million tokens."""

import pytest
import torch
from torch import Tensor

from open_mythos.nn.context import Context
from open_mythos.nn.rope import Interpolated, Llama3, Rope, rotate, rotate_plainly
from tests.zoo import close

WIDTH = 16


def exactly(x: Tensor, positions: Tensor, rates: Tensor, pairs: str) -> Tensor:
    """In complex float64."""
    x = x.double()
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs == "adjacent" else x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.exp(1j * positions[:, None, :, None].double() * rates)
    if pairs == "halves":
        return torch.cat([turned.real, turned.imag], -1)
    return torch.view_as_real(turned).flatten(-2)


def context(positions: Tensor) -> Context:
    return Context.ragged(torch.zeros_like(positions), positions)


@pytest.mark.parametrize("pairs", ["adjacent", "halves"])
@pytest.mark.parametrize("start", [0, 1_000, 999_990])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_is_a_complex_product(pairs: str, start: int, base: float) -> None:
    x = torch.randn(2, 3, 9, WIDTH)
    positions = torch.arange(start, start + 9) + torch.tensor([[0], [7]])
    rates = base ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    given = Rope(base=base, pairs=pairs)(x, context(positions))
    close(given.double(), exactly(x, positions, rates, pairs), 1e-6)


@pytest.mark.parametrize("pairs", ["adjacent", "halves"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("skipped", [0, 6, 7])
def test_rotating_is_its_slow_twin(pairs: str, dtype: torch.dtype, tolerance: float, skipped: int) -> None:
    """Values and gradients, wherever the pairs lie."""
    x = torch.randn(2, 5, 3, skipped + 8, dtype=dtype, requires_grad=True)
    angle, towards = torch.randn(1, 1, 5, 4), torch.randn(2, 3, 5, 8, dtype=dtype)
    part = x.transpose(1, 2)[..., skipped:]
    turned = [turn(part, angle.cos(), angle.sin(), pairs) for turn in (rotate, rotate_plainly)]
    assert turned[0].dtype == dtype
    close(*(y.float() for y in turned), tolerance)
    close(*(torch.autograd.grad(y, x, towards)[0].float() for y in turned), tolerance)


def test_rows_in_step_share_their_turns() -> None:
    tokens, x = torch.zeros(3, 5, dtype=torch.long), torch.randn(3, 2, 5, WIDTH)
    counting = Context.counting(tokens, start=40)
    close(Rope()(x, counting), Rope()(x, context(counting.positions)), 0)
    assert counting.memo[Rope().key(WIDTH)].shape == (2, 1, 1, 5, WIDTH // 2)


@pytest.mark.parametrize("pairs", ["adjacent", "halves"])
def test_scores_depend_on_distance_alone(pairs: str) -> None:
    q, k = torch.randn(2, 1, 1, 6, WIDTH)
    near, far = torch.arange(6)[None], torch.arange(6)[None] + 123_456
    rope = Rope(pairs=pairs)
    near_scores, far_scores = (rope(q, context(p)) @ rope(k, context(p)).mT for p in (near, far))
    close(near_scores, far_scores, 1e-5)
    assert not torch.allclose(near_scores, q @ k.mT, atol=1e-2)


def test_half_precision_turns_in_float32() -> None:
    x, positions = torch.randn(1, 1, 4, WIDTH), torch.arange(500_000, 500_004)[None]
    given = Rope()(x.bfloat16(), context(positions))
    assert given.dtype == torch.bfloat16
    close(given.float(), Rope()(x.bfloat16().float(), context(positions)), 2e-3)


def test_two_ropes_in_one_call_do_not_mix() -> None:
    ctx, x = context(torch.arange(5)[None]), torch.randn(1, 1, 5, WIDTH)
    one = Rope()(x, ctx)
    other = Rope(base=100.0)(x, ctx)
    assert not torch.allclose(one, other)
    assert torch.equal(Rope()(x, ctx), one)
    assert Rope()(x[..., :8], ctx).shape == (1, 1, 5, 8)


def test_llama3_stretches_slow_channels_only() -> None:
    """The published piecewise formula, channel by channel."""
    scaling, rates = Llama3(), 500_000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    expected = []
    for rate in rates.tolist():
        wavelength = 2 * torch.pi / rate
        if wavelength < 8192 / 4:
            expected.append(rate)
        elif wavelength > 8192 / 1:
            expected.append(rate / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * rate / 8 + smooth * rate)
    close(scaling.stretch(rates, 500_000.0), torch.tensor(expected, dtype=torch.float64), 1e-12)


def test_interpolation_divides_positions() -> None:
    x = torch.randn(1, 1, 5, WIDTH)
    stretched = Rope(scaling=Interpolated(factor=4.0))(x, context(torch.arange(0, 20, 4)[None]))
    close(stretched, Rope()(x, context(torch.arange(5)[None])), 1e-6)


def test_a_base_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0"):
        Rope(base=0.0)
