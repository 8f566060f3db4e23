"""Every way in maps a state and an input to a state, one token at a time; only Nothing ignores the input."""

import pytest
import torch

from open_mythos.loop.inject import Injection, Nothing
from tests.zoo import close, every

DIM = 16


@pytest.mark.parametrize("config", every(Injection), ids=lambda config: type(config).__name__)
def test_one_token_at_a_time(config: Injection) -> None:
    module = config.build(DIM)
    h, e = torch.randn(2, 2, 3, DIM)
    out = module(h, e)
    assert out.shape == h.shape
    for row in range(2):
        for t in range(3):
            here = slice(row, row + 1), slice(t, t + 1)
            close(out[here], module(h[here], e[here]))


@pytest.mark.parametrize("config", every(Injection), ids=lambda config: type(config).__name__)
def test_both_count(config: Injection) -> None:
    module = config.build(DIM)
    h, e = torch.randn(2, 2, 3, DIM)
    assert not torch.allclose(module(h, e), module(2 * h + 1, e))
    assert torch.allclose(module(h, e), module(h, 2 * e + 1)) == isinstance(config, Nothing)
