"""Every kernel agrees with the definition, values and gradients."""

import pytest
import torch
from torch import Tensor

from open_mythos.nn import attend as attend_module
from open_mythos.nn import blockwise
from open_mythos.nn.attend import FEW, SHORT, attend, attend_latents, attend_naively
from open_mythos.nn.blockwise import attend_blockwise
from open_mythos.nn.context import Sight
from tests.zoo import close

SHAPES = [(4, 4, 8, 8), (4, 2, 8, 8), (6, 1, 8, 8), (4, 4, 12, 8), (4, 1, 8, 12)]  # H, G, K, Kv


def inputs(shape: tuple[int, int, int, int], asked: int, held: int) -> tuple[Tensor, Tensor, Tensor]:
    heads, groups, width, value_width = shape
    q = torch.randn(2, heads, asked, width, requires_grad=True)
    k = torch.randn(2, groups, held, width, requires_grad=True)
    v = torch.randn(2, groups, held, value_width, requires_grad=True)
    return q, k, v


def sight(kind: str, asked: int, held: int) -> Sight:
    if kind == "mask":
        mask = torch.rand(2, 1, asked, held) < 0.6
        mask[..., 0] = True  # a query that may look at nothing has no softmax
        return Sight(mask=mask)
    return Sight(causal=kind == "causal")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
@pytest.mark.parametrize(("asked", "held"), [(1, 13), (FEW, 13), (FEW + 1, 13), (13, 13)])
def test_agrees_with_the_definition(shape: tuple[int, ...], kind: str, asked: int, held: int) -> None:
    held = asked if kind == "causal" else held
    q, k, v = inputs(shape, asked, held)
    look = sight(kind, asked, held)
    for scale in (None, 0.3):
        given, expected = attend(q, k, v, look, scale), attend_naively(q, k, v, look, scale)
        close(given, expected, 1e-6)
        towards = torch.randn_like(given)
        close(*(torch.autograd.grad(mixed, (q, k, v), towards) for mixed in (given, expected)), 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", [5, 64, 128, 200, SHORT + 1])
def test_half_precision_by_blocks(shape: tuple[int, ...], length: int) -> None:
    q, k, v = (x.bfloat16().detach().requires_grad_() for x in inputs(shape, length, length))
    look = Sight(causal=True)
    given = attend(q, k, v, look)
    assert given.dtype == torch.bfloat16
    expected = attend_naively(q.float(), k.float(), v.float(), look)
    with torch.no_grad():
        quietly = attend(q, k, v, look)
    for mixed in (given, quietly):
        close(mixed.float(), expected, 2e-2)
    towards = torch.randn_like(expected)
    grads = torch.autograd.grad(given, (q, k, v), towards.bfloat16())
    for grad, want in zip(grads, torch.autograd.grad(expected, (q, k, v), towards), strict=True):
        assert (grad - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", [1, 63, 64, 150])
@pytest.mark.parametrize("tile", [1, blockwise.TILE])
def test_blocks_agree_with_the_definition(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], length: int, tile: int
) -> None:
    """In float32, values and gradients, head by head and together, ending inside a block and at its edge."""
    monkeypatch.setattr(blockwise, "TILE", tile)
    q, k, v = inputs(shape, length, length)
    mixed, expected = attend_blockwise(q, k, v, 0.3), attend_naively(q, k, v, Sight(causal=True), 0.3)
    close(mixed, expected, 1e-6)
    with torch.no_grad():
        close(attend_blockwise(q, k, v, 0.3), expected, 1e-6)
    towards = torch.randn_like(expected)
    close(*(torch.autograd.grad(y, (q, k, v), towards) for y in (mixed, expected)), 1e-5)


@pytest.mark.parametrize("learned", ["qkv", "q", "kv"])
def test_the_gradient_of_blocks_has_a_gradient(learned: str) -> None:
    """Also where some of queries, keys and values need none."""
    named = dict(zip("qkv", inputs(SHAPES[1], 9, 9), strict=True))
    q, k, v = (x.requires_grad_(name in learned) for name, x in named.items())
    asked = [named[name] for name in learned]
    twice = []
    for mixed in (attend_blockwise(q, k, v, 0.3), attend_naively(q, k, v, Sight(causal=True), 0.3)):
        pulled = torch.autograd.grad(mixed.square().sum(), asked, create_graph=True)
        twice.append(torch.autograd.grad(sum(p.square().sum() for p in pulled), asked))
    close(*twice, 1e-4)


@pytest.mark.parametrize("asked", [1, FEW, FEW + 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_may_see_different_things(shape: tuple[int, ...], asked: int) -> None:
    q, k, v = inputs(shape, asked, 13)
    mask = torch.rand(1, q.shape[1], asked, 13) < 0.6
    mask[..., 0] = True
    look = Sight(mask=mask)
    close(attend(q, k, v, look), attend_naively(q, k, v, look), 1e-6)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call of the fused kernel had."""
    calls: list[int] = []
    called = attend_module.F.scaled_dot_product_attention

    def counted(*args: Tensor, **options: object) -> Tensor:
        calls.append(args[0].shape[2])
        return called(*args, **options)

    monkeypatch.setattr(attend_module.F, "scaled_dot_product_attention", counted)
    return calls


def test_few_queries_take_plain_products(kernel: list[int]) -> None:
    """The fused kernel is a trap for decoding on a CPU, so it must not be met there."""
    for asked in (1, FEW, FEW + 1):
        attend(*inputs(SHAPES[1], asked, 20), Sight())
    assert kernel == [FEW + 1]


@pytest.mark.parametrize("kind", ["all", "mask"])
@pytest.mark.parametrize("asked", [1, 3, FEW + 1])
def test_latents_agree_with_the_definition(
    kernel: list[int], monkeypatch: pytest.MonkeyPatch, kind: str, asked: int
) -> None:
    """With the heads as queries of one head, where much is held, and without; gradients always without."""
    held = torch.randn(2, 1, 13, 12, requires_grad=True)
    q = torch.randn(2, 4, asked, 12, requires_grad=True)
    look = sight(kind, asked, 13)
    expected = attend_naively(q, held, held[..., :8], look, 0.3)
    fused = [asked] if asked > FEW else []
    with torch.no_grad():
        close(attend_latents(q, held, 8, look, 0.3), expected, 1e-6)
        assert kernel == fused
        monkeypatch.setattr(attend_module, "LONG", 13 * 12)
        close(attend_latents(q, held, 8, look, 0.3), expected, 1e-6)
        assert kernel == fused + (fused or [4 * asked])
    given, towards = attend_latents(q, held, 8, look, 0.3), torch.randn_like(expected)
    close(*(torch.autograd.grad(y, (q, held), towards) for y in (given, expected)), 1e-5)


def test_dropout_drops() -> None:
    q, k, v = inputs(SHAPES[0], 9, 9)
    assert not torch.allclose(
        attend(q, k, v, Sight(causal=True), dropout=0.5), attend(q, k, v, Sight(causal=True))
    )
    assert not torch.allclose(attend(q, k, v, Sight(), dropout=0.5), attend(q, k, v, Sight()))
