"""The fast product of rows and weights against `F.linear`: values, gradients, gradients of gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from open_mythos.nn import product
from open_mythos.nn.product import linear, linear_alone
from tests.zoo import close


@pytest.fixture(autouse=True)
def _large_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "LARGE", 1)


def inputs(shape: tuple[int, ...], out: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = (*shape,), (out, shape[-1]), (out,)
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 33), (2, 1, 3, 16)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_is_f_linear(shape: tuple[int, ...], biased: bool) -> None:
    x, weight, bias = inputs(shape, 9)
    given = (x, weight, bias) if biased else (x, weight)
    fast, slow = linear(*given), F.linear(*given)
    close(fast, slow, 1e-5)
    towards = torch.randn_like(slow)
    close(*(torch.autograd.grad(y, given, towards) for y in (fast, slow)), 1e-5)
    with torch.no_grad():
        close(linear(*given), slow.detach(), 1e-5)


def test_large_products_take_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = inputs((2, 5), 3)
    taken: list[Tensor] = []
    onednn = product._onednn
    monkeypatch.setattr(product, "_onednn", lambda *given: taken.append(onednn(*given)) or taken[-1])
    linear(x, weight).sum().backward()
    assert len(taken) == 2 * product._has_onednn()  # of the values and of the gradient of the rows
    monkeypatch.setattr(product, "LARGE", 8 * weight.numel() + 1)
    linear(x, weight)
    assert len(taken) == 2 * product._has_onednn()


@pytest.mark.parametrize("shape", [(7,), (1, 40), (1, 1, 33)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_one_row_is_multiplied_out(
    shape: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradient, where the weight is neither small nor large."""
    monkeypatch.setattr(product, "SMALL", 1)
    monkeypatch.setattr(product, "LARGE", 2**40)
    x, weight, bias = inputs(shape, 9)
    given = (x, weight, bias) if biased else (x, weight)
    summed: list[Tensor] = []
    vecdot = torch.linalg.vecdot
    monkeypatch.setattr(torch.linalg, "vecdot", lambda a, b: summed.append(vecdot(a, b)) or summed[-1])
    assert torch.equal(linear(*given), F.linear(*given))
    assert not summed
    with torch.no_grad():
        close(linear(*given), F.linear(*given), 1e-5)
        close(
            linear(x.expand(2, *shape)[:1, ..., ::2], weight[:, ::2]),
            F.linear(x[None, ..., ::2], weight[:, ::2]),
        )
        assert len(summed) == 2
        assert torch.equal(linear(x.expand(2, *shape), weight), F.linear(x.expand(2, *shape), weight))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
        monkeypatch.setattr(product, "LARGE", 8)
        monkeypatch.setattr(product, "_has_onednn", lambda: False)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert len(summed) == 2


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("biased", [False, True])
def test_one_row_for_a_compiler(dtype: torch.dtype, tolerance: float, biased: bool) -> None:
    x, weight, bias = inputs((1, 1, 300), 9, dtype)
    given = x, weight, bias if biased else None
    close(product._summed(*given), F.linear(*given), tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = product._summed(*given), F.linear(*given)
    assert mine.dtype == theirs.dtype
    close(mine, theirs, 1e-2)


def test_takes_views() -> None:
    x = torch.randn(6, 4, 10).transpose(0, 1)[..., ::2]
    weight = torch.randn(5, 8).mT
    close(linear(x, weight), F.linear(x, weight), 1e-5)


def test_only_what_asks_gets_a_gradient() -> None:
    x, weight, _ = inputs((4, 6), 3)
    linear(x.detach(), weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_the_gradient_has_a_gradient() -> None:
    x, weight, bias = inputs((2, 5, 6), 4)
    twice = []
    for map_ in (linear, F.linear):
        pulled = torch.autograd.grad(map_(x, weight, bias).pow(3).sum(), (x, weight, bias), create_graph=True)
        twice.append(torch.autograd.grad(sum(p.square().sum() for p in pulled), (x, weight, bias)))
    for fast, slow in zip(*twice, strict=True):
        close(fast / slow.abs().max(), slow / slow.abs().max(), 1e-5)


def test_other_precisions_are_left_alone() -> None:
    x, weight, bias = inputs((3, 8), 4, torch.float64)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16


def test_no_rows() -> None:
    assert linear(torch.empty(0, 4), torch.randn(3, 4)).shape == (0, 3)


@pytest.mark.parametrize("large", [1, 2**40])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_a_product_of_one_row_decided_beforehand(
    biased: bool, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "LARGE", large)
    x, weight, bias = inputs((33,), 9)
    close(
        linear_alone(weight, bias if biased else None)(x), F.linear(x, weight, bias if biased else None), 1e-5
    )


def test_a_single_vector_has_a_gradient() -> None:
    x, weight = torch.randn(4096, requires_grad=True), torch.randn(1024, 4096, requires_grad=True)
    theirs = torch.autograd.grad(F.linear(x, weight).sum(), (x, weight))
    close(torch.autograd.grad(linear(x, weight).sum(), (x, weight)), theirs, 1e-4)
