"""Norms against their formulas, in float64."""

import pytest
import torch
from torch.nn import functional as F

from open_mythos.nn.norm import LayerNorm, RMSNorm, plain_rms_norm, rms_norm
from tests.zoo import close

DTYPES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items(), ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@pytest.mark.parametrize("rows", [1, 6])
def test_rms_norm(dtype: torch.dtype, tolerance: float, size: float, eps: float, rows: int) -> None:
    x, w = (size * torch.randn(1, rows, 32)).to(dtype), torch.randn(32).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    for weight, expected in ((None, exact), (w, exact * w.double())):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                given = rms_norm(x, weight, eps)
            assert given.dtype == dtype
            close(given.double(), expected, tolerance)


def test_rms_norm_gradients() -> None:
    x, w = torch.randn(2, 3, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    towards = torch.randn(2, 3, 32)
    both = rms_norm(x, w, 1e-6), F.rms_norm(x, (32,), w, 1e-6)
    close(*(torch.autograd.grad(y, (x, w), towards) for y in both), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items(), ids=str)
def test_rms_norm_is_its_slow_twin(dtype: torch.dtype, tolerance: float) -> None:
    """Also where `x` and the gradient are not contiguous."""
    x = torch.randn(3, 2, 32, dtype=dtype).transpose(0, 1).requires_grad_()
    w = torch.randn(32, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    towards = torch.randn(3, 2, 32, dtype=dtype).transpose(0, 1)
    fast, slow = rms_norm(x, w, 1e-6), plain_rms_norm(x, w, 1e-6)
    close(fast.double(), slow.double(), tolerance)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, w), towards) for y in (fast, slow)), strict=True):
        assert mine.dtype == theirs.dtype
        close(mine.double(), theirs.double(), tolerance)


def test_the_gradient_of_rms_norm_has_a_gradient() -> None:
    x, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    twice = []
    for y in (rms_norm(x, w, 1e-6), plain_rms_norm(x, w, 1e-6)):
        pulled = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        twice.append(torch.autograd.grad(sum(p.square().sum() for p in pulled), (x, w)))
    close(*twice, 1e-4)


def test_zeros_stay_zero_and_finite() -> None:
    x = torch.zeros(1, 2, 8, requires_grad=True)
    y = rms_norm(x, None, 1e-6)
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1, 2])
def test_zeros_without_eps_have_no_direction(rows: int) -> None:
    with torch.no_grad():
        assert rms_norm(torch.zeros(1, rows, 8), torch.ones(8), 0.0).isnan().all()


def test_large_half_values_do_not_overflow() -> None:
    y = rms_norm(torch.full((1, 1, 8), 30_000.0, dtype=torch.float16), None, 1e-6)
    close(y.float(), torch.ones(1, 1, 8), 1e-3)


def test_built_norms() -> None:
    x = torch.randn(2, 3, 16)
    close(RMSNorm(eps=1e-2).build(16)(x), F.rms_norm(x, (16,), None, 1e-2), 1e-6)
    assert not list(RMSNorm(weight=False).build(16).parameters())
    close(LayerNorm(eps=1e-2).build(16)(x), F.layer_norm(x, (16,), eps=1e-2), 1e-6)


@pytest.mark.parametrize("frozen", ["input", "gain"])
def test_the_gradient_has_a_gradient_where_a_part_is_frozen(frozen: str) -> None:
    x, w = torch.randn(5, 8, requires_grad=frozen != "input"), torch.randn(8, requires_grad=frozen != "gain")
    learned = x if frozen == "gain" else w
    twice = []
    for y in (rms_norm(x, w, 1e-6), plain_rms_norm(x, w, 1e-6)):
        (pulled,) = torch.autograd.grad(y.pow(3).sum(), learned, create_graph=True)
        twice.append(torch.autograd.grad(pulled.square().sum(), learned)[0])
    torch.testing.assert_close(*twice)


def test_a_single_vector() -> None:
    x, weight = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    for found, plain in zip(
        torch.autograd.grad(rms_norm(x, weight, 1e-6).pow(3).sum(), (x, weight)),
        torch.autograd.grad(plain_rms_norm(x, weight, 1e-6).pow(3).sum(), (x, weight)),
        strict=True,
    ):
        close(found, plain, 1e-5)
