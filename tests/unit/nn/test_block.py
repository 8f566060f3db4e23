"""What a block adds to its mixer and its feed-forward."""

import pytest
import torch

from open_mythos.nn.attention import GQA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.context import Context
from open_mythos.nn.ffn import SwiGLU


@pytest.mark.parametrize("silent", ["mixer.out", "ffn.down"])  # so that only the other branch adds anything
def test_dropout_drops_from_both_branches_and_only_in_training(silent: str) -> None:
    config = PreNorm(mixer=GQA(heads=2), ffn=SwiGLU(width=16))
    plain, block = config.build(8), config.replace(dropout=0.5).build(8)
    block.load_state_dict(plain.state_dict())
    x, ctx = torch.randn(2, 50, 8), Context.counting(torch.zeros(2, 50, dtype=torch.long))
    assert torch.equal(block.eval()(x, ctx), plain(x, ctx))
    torch.nn.init.zeros_(block.get_submodule(silent).weight)
    added = block.train()(x, ctx) - x
    assert 0.4 < (added == 0).float().mean() < 0.6
