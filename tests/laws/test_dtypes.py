"""Every model runs in half and in double precision, and autocast gives gradients to the same parameters."""

import pytest
import torch

from open_mythos.loop.schedule import Plan
from open_mythos.nn.attention import GQA, MLA
from open_mythos.nn.context import Context
from tests.zoo import EVERY, LOOPED, awake, close, gradients, words


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_runs_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model, tokens = EVERY[name].build().to(dtype), words(2, 16)
    with torch.no_grad():
        logits = model(tokens)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_is_near(name: str) -> None:
    """As made, where rounding is not magnified: within a few per cent of the logits' scale."""
    model, tokens = EVERY[name].build().eval(), words(2, 16)
    with torch.no_grad():
        exact = model(tokens)
        rounded = model.bfloat16()(tokens).float()
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", EVERY)
def test_learns_in_float64(name: str) -> None:
    """To look closer at float32, whose rounding is all that may lie between the two."""
    model, double, tokens = awake(EVERY[name]), awake(EVERY[name]).double(), words(2, 16)
    single, exact = model(tokens), double(tokens)
    assert exact.dtype == torch.float64
    close(single.double(), exact, 1e-4)
    for logits in (single, exact):
        logits.log_softmax(-1)[..., 0].mean().backward()
    assert gradients(double).keys() == gradients(model).keys()
    for key, grad in gradients(double).items():
        close(gradients(model)[key].double(), grad, 1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_learns_in_bfloat16(name: str) -> None:
    model, half, tokens = awake(EVERY[name]), awake(EVERY[name]).bfloat16(), words(2, 16)
    plan = Plan((3, 2), 2) if name in LOOPED else None
    for each in (model, half):
        each(tokens, plan).float().log_softmax(-1)[..., 0].mean().backward()
    assert gradients(half).keys() == gradients(model).keys()
    for key, grad in gradients(half).items():
        assert grad.dtype == torch.bfloat16
        assert grad.isfinite().all(), key


@pytest.mark.parametrize("name", EVERY)
def test_autocast_leaves_float64_alone(name: str) -> None:
    model, tokens = awake(EVERY[name]).double(), words(2, 16)
    with torch.no_grad():
        exact = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(tokens), exact)


@pytest.mark.parametrize("name", EVERY)
def test_autocast_is_the_same_without_gradient(name: str) -> None:
    """There what a layer's maps read is lowered once for all of them."""
    model, tokens = EVERY[name].build().eval(), words(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens).float()
        with torch.no_grad():
            given = model(tokens).float()
    assert (given - expected).norm() < 0.01 * expected.norm()


READERS = [
    GQA(heads=4),
    MLA(heads=4, q_rank=16, kv_rank=8, rope_dim=4, nope_dim=4, value_dim=4),
]


@pytest.mark.parametrize("part", READERS, ids=lambda part: type(part).__name__)
def test_autocast_adds_gradients_up_in_float32(part: GQA | MLA) -> None:
    """Of maps that read the same: lowered once for all of them (as autocast itself does with leaves, so here
    is none), their sum would be rounded."""
    torch.manual_seed(0)
    tokens, x = words(2, 16), torch.randn(2, 16, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        part.build(32)(1 * x, Context.counting(tokens, cache=None)).float().square().sum().backward()
    assert x.grad is not None
    assert (x.grad != x.grad.bfloat16()).float().mean() > 0.5


@pytest.mark.parametrize("name", EVERY)
def test_autocast_reaches_the_same_parameters(name: str) -> None:
    """Copies of weights made in steps without gradient must not serve those with it."""
    model, cast, tokens = awake(EVERY[name]), awake(EVERY[name]), words(2, 16)
    plan = Plan(3, 2) if name in LOOPED else None
    model(tokens, plan).log_softmax(-1)[..., 0].mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cast(tokens, plan).float().log_softmax(-1)[..., 0].mean()
    loss.backward()
    expected, given = gradients(model), gradients(cast)
    assert given.keys() == expected.keys()
    for key, grad in given.items():
        assert grad.dtype == torch.float32
        assert grad.isfinite().all(), key
        assert bool(grad.abs().sum() > 0) == bool(expected[key].abs().sum() > 0), key
