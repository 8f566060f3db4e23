"""A diagonal decay stays strictly inside (0, 1), with finite gradients, at any parameter value."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from open_mythos.loop.inject import Diagonal
from open_mythos.loop.update import LTI

DIM = 8
EXTREMES = [0.0, 1.0, -1.0, 20.0, -20.0, 1e4, -1e4, 1e30, -1e30]


def check(module: nn.Module, out: Tensor, decay: Tensor) -> None:
    assert decay.dtype == torch.float32
    assert ((decay > 0) & (decay < 1)).all()
    assert out.isfinite().all()
    (out.float().mean() + decay.sum()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lti(dtype: torch.dtype) -> None:
    for log_a, log_dt in itertools.product(EXTREMES, EXTREMES):
        module = LTI().build(DIM).to(dtype)
        nn.init.constant_(module.log_a, log_a)
        nn.init.constant_(module.log_dt, log_dt)
        h, e, y = torch.randn(3, 2, 3, DIM, dtype=dtype)
        out = module(h, e, y)
        assert out.dtype == dtype
        check(module, out, module.decay())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diagonal(dtype: torch.dtype) -> None:
    for log_a, raw_dt in itertools.product(EXTREMES, EXTREMES):
        module = Diagonal().build(DIM).to(dtype)
        nn.init.constant_(module.log_a, log_a)
        nn.init.constant_(module.raw_dt, raw_dt)
        h, e = torch.randn(2, 2, 3, DIM, dtype=dtype)
        out = module(h, e)
        assert out.dtype == dtype
        check(module, out, module.decay())


def test_the_decay_forgets() -> None:
    """Iterated without input, the state shrinks: the spectral radius is below one."""
    module = LTI().build(DIM)
    nn.init.normal_(module.log_a)
    h, nothing = torch.randn(1, 1, DIM), torch.zeros(1, 1, DIM)
    sizes = []
    for _ in range(5):
        h = module(h, nothing, nothing)
        sizes.append(float(h.detach().norm()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.99])
def test_lti_begins_as_it_is_told(decay: float) -> None:
    torch.testing.assert_close(LTI(decay=decay).build(DIM).decay(), torch.full((DIM,), decay))


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_lti_refuses_what_is_no_decay(decay: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        LTI(decay=decay)
