"""Attention over a token's own steps, against its definition; and that the memory travels with the token."""

import pytest
import torch
from torch import Tensor

from open_mythos.loop.recall import DepthAttention
from open_mythos.loop.schedule import Plan
from open_mythos.presets.dreamer import Size, dreamer
from tests.lively import lively

SIZE = Size(vocab=37, dim=16, heads=4, steps=4, experts=4, chosen=2, width=8)
TOKENS = torch.randint(0, 37, (3, 6), generator=torch.Generator().manual_seed(0))


def test_it_is_softmax_attention_over_the_steps_so_far() -> None:
    recall = DepthAttention(heads=2, steps=3).build(8)
    torch.nn.init.normal_(recall.bias)
    inputs, past = torch.randn(3, 2, 5, 8), torch.zeros(2, 5, 0, 8)
    for n, x in enumerate(inputs):
        _, told, past = recall(x, past, torch.full((2,), n))
        seen = recall.norm(inputs[: n + 1])  # N B T D
        q, k, v = recall.q(seen[n]), recall.k(seen), recall.v(seen)
        heads: list[Tensor] = []
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            scores = (q[..., part] * k[..., part]).sum(-1) / 2  # N B T
            scores = scores + recall.bias[h, : n + 1].flip(0)[:, None, None]
            heads.append((scores.softmax(0)[..., None] * v[..., part]).sum(0))
        torch.testing.assert_close(told, recall.out(torch.cat(heads, -1)))


def test_past_the_last_remembered_step_the_latest_takes_the_last_place() -> None:
    recall = DepthAttention(heads=2, steps=3).build(8)
    torch.nn.init.normal_(recall.bias)
    inputs = torch.randn(5, 2, 5, 8)

    def told(steps: list[int]) -> Tensor:
        past = torch.zeros(2, 5, 0, 8)
        for n, number in enumerate(steps):
            _, said, past = recall(inputs[number], past, torch.full((2,), n))
        return said

    torch.testing.assert_close(told([0, 1, 2, 3]), told([0, 1, 3]))
    torch.testing.assert_close(told([0, 1, 2, 3, 4]), told([0, 1, 4]))


@pytest.mark.parametrize("parallel", [True, False])
def test_the_memory_goes_where_the_row_goes(parallel: bool) -> None:
    model = lively(dreamer(SIZE.replace(parallel=parallel)))
    together = model(TOKENS, Plan((4, 1, 3), 2))
    for row, steps in enumerate((4, 1, 3)):
        alone = model(TOKENS[row : row + 1], steps)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


def test_earlier_steps_are_remembered_and_taught() -> None:
    model = lively(dreamer(SIZE))
    assert model.loop is not None
    before = model(TOKENS, 3)
    before.square().sum().backward()
    assert model.loop.recall.k.weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.loop.recall.bias[:, 1:] -= 1e4  # as if there were no past
    assert not torch.allclose(model(TOKENS, 3), before, atol=1e-2)
    assert torch.allclose(model(TOKENS, 1), lively(dreamer(SIZE))(TOKENS, 1), atol=1e-4)
