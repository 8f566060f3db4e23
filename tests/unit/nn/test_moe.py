"""The sorted, grouped experts agree with every expert on every token, values and gradients."""

import pytest
import torch
from torch import Tensor, nn

from open_mythos.nn import experts
from open_mythos.nn.cache import KVCache
from open_mythos.nn.context import Context, Place
from open_mythos.nn.moe import MixtureOfExperts, MoE, sequence_balance
from open_mythos.nn.tally import Tally
from tests.zoo import close

DIM = 16
CONFIG = MoE(experts=6, chosen=2, width=8)
CONFIGS = [
    CONFIG,
    CONFIG.replace(chosen=1),
    CONFIG.replace(chosen=6, shared=0),
    CONFIG.replace(shared=2, shared_width=5),
    MoE(experts=1, chosen=1, width=8),
    CONFIG.replace(width=6),  # rows that `grouped_mm` does not take
]


@pytest.fixture(params=["all in one call", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows the experts have, they go one by one too."""
    if request.param == "one by one":
        monkeypatch.setattr(experts, "EACH", 0)
        monkeypatch.setattr(experts, "EACH_FUSED", 0)


def awake(config: MoE) -> MixtureOfExperts:
    layer = config.build(DIM)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(layer.bias, std=0.1)
    return layer


def context(x: Tensor, tally: Tally | None = None) -> Context:
    ctx = Context.counting(torch.zeros(x.shape[:2], dtype=torch.long))
    return ctx if tally is None else ctx.with_tally(tally)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (2, 2)])  # many tokens, or so few that they are not sorted
def test_agrees_with_naive(config: MoE, shape: tuple[int, int]) -> None:
    layer, x = awake(config), torch.randn(*shape, DIM, requires_grad=True)
    given, expected = layer(x, context(x)), layer.naive(x)
    close(given, expected, 1e-5)
    with torch.no_grad():
        close(layer(x, context(x)), expected, 1e-5)
    towards, wanted = torch.randn_like(given), [x, *layer.parameters()]
    close(*(torch.autograd.grad(y, wanted, towards) for y in (given, expected)), 1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@torch.no_grad()
def test_a_few_tokens_for_a_compiler(config: MoE, dtype: torch.dtype, tolerance: float) -> None:
    layer, x = awake(config).to(dtype), torch.randn(3, DIM, dtype=dtype)
    chosen, weights, _ = layer.route(x)
    given = x, layer.gate_up, layer.down, chosen, weights.to(dtype)
    close(experts._picked(*given), experts._few(*given), tolerance)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("grad", [True, False], ids=["with gradient", "without"])
def test_experts_without_tokens(grad: bool) -> None:
    layer, x = awake(CONFIG), torch.randn(2, 5, DIM)
    layer.bias.copy_(torch.tensor([0, 100.0, 0, 0, 100.0, 0]))
    with torch.set_grad_enabled(grad):
        given = layer(x, context(x))
        close(given, layer.naive(x), 1e-5)
    if grad:
        given.sum().backward()
        for idle in (0, 2, 3, 5):
            assert (layer.gate_up.grad[idle] == 0).all()
            assert (layer.down.grad[idle] == 0).all()
        assert (layer.down.grad[[1, 4]].abs().amax((1, 2)) > 0).all()


def test_a_gradient_of_no_rows_can_be_differentiated() -> None:
    layer, x = awake(CONFIG), torch.randn(0, DIM)
    chosen = torch.zeros(0, 2, dtype=torch.long)
    y = experts.run_experts(x, layer.gate_up, layer.down, chosen, torch.zeros(0, 2))
    grads = torch.autograd.grad(y.sum(), [layer.gate_up, layer.down], create_graph=True)
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("grad", [True, False], ids=["with gradient", "without"])
def test_half_precision(grad: bool) -> None:
    layer, x = awake(CONFIG).bfloat16(), torch.randn(2, 50, DIM).bfloat16()
    with torch.set_grad_enabled(grad):
        given = layer(x, context(x))
    assert given.dtype == torch.bfloat16
    expected = layer.float().naive(x.float())
    assert (given.float() - expected).norm() < 0.02 * expected.norm()


def test_autocast_reaches_the_experts() -> None:
    """The custom op lies outside autocast, so the layer tells it."""
    layer, x = awake(CONFIG), torch.randn(2, 50, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        given = layer(x, context(x))
    expected = layer.naive(x)
    assert 1e-4 * expected.norm() < (given.float() - expected).norm() < 0.02 * expected.norm()
    given.float().sum().backward()
    assert layer.gate_up.grad.dtype == torch.float32


def test_weights_are_cast_once_per_call() -> None:
    """And not once per step of the loop."""
    layer, x = awake(CONFIG), torch.randn(1, 3, DIM).bfloat16()
    layer.shared_gate_up.bfloat16(), layer.shared_down.bfloat16()
    ctx = context(x)
    layer(x, ctx)
    first = dict(ctx.casts)
    layer(x, ctx)
    assert len(first) == 2
    assert all(ctx.casts[key] is tensor for key, tensor in first.items())


def test_calls_that_share_a_cache_share_the_casts_until_a_weight_changes() -> None:
    layer, x = awake(CONFIG), torch.randn(1, 3, DIM).bfloat16()
    layer.shared_gate_up.bfloat16(), layer.shared_down.bfloat16()
    cache = KVCache(1, 8)

    def call() -> list[Tensor]:
        ctx = Context.counting(torch.zeros(1, 3, dtype=torch.long), cache=cache)
        layer(x, ctx)
        return [ctx.cast(stack, x.dtype) for stack in (layer.gate_up, layer.down)]

    with torch.no_grad():
        first, second = call(), call()
        assert all(a is b for a, b in zip(first, second, strict=True))
        layer.down.mul_(2)
        third = call()
    assert third[0] is first[0]
    assert torch.equal(third[1], 2 * first[1])
    assert all(cast.requires_grad for cast in call())  # with gradient, each call has its own


def test_routing() -> None:
    """The bias moves the choice and never the weights; weights are a softmax over the chosen."""
    layer, x = awake(CONFIG), torch.randn(40, DIM)
    chosen, weights, scores = layer.route(x)
    close(scores, x @ layer.router.mT, 1e-6)
    close(weights.sum(-1), torch.ones(40), 1e-6)
    for i in range(40):
        best = (scores[i] + layer.bias).argsort(descending=True)[:2]
        assert set(best.tolist()) == set(chosen[i].tolist())
        close(weights[i], scores[i, chosen[i]].softmax(-1), 1e-6)
    layer.bias.zero_()
    assert not torch.equal(layer.route(x)[0].sort(-1).values, chosen.sort(-1).values)


def test_shared_experts_side_by_side_are_one() -> None:
    layer, x = awake(MoE(experts=2, chosen=1, width=8, shared=2, shared_width=3)), torch.randn(1, 4, DIM)
    gate, up = layer.shared_gate_up.weight.chunk(2)
    parts = []
    for half in (slice(0, 3), slice(3, 6)):
        hidden = torch.nn.functional.silu(x @ gate[half].mT) * (x @ up[half].mT)
        parts.append(hidden @ layer.shared_down.weight[:, half].mT)
    close(layer.always(x), parts[0] + parts[1], 1e-5)


def test_rebalancing_evens_out_the_load() -> None:
    """A router that sends nearly everything to two experts is brought round by the bias alone."""
    layer = CONFIG.replace(chosen=1, speed=0.02).build(DIM)
    torch.nn.init.normal_(layer.router, std=0.2)
    x = torch.randn(2000, DIM) + 2 * layer.router[0].detach() / layer.router[0].norm() * 2

    def share() -> Tensor:
        return torch.bincount(layer.route(x)[0].flatten(), minlength=6) / 2000

    before, router = share(), layer.router.clone()
    for _ in range(200):
        layer.rebalance((share() * 2000).long())
    assert before.max() > 0.5
    assert share().max() < 0.22
    assert share().min() > 0.11
    assert torch.equal(layer.router, router)


def test_rebalance_moves_by_speed() -> None:
    layer = CONFIG.build(DIM)
    layer.rebalance(torch.tensor([0, 1, 2, 3, 4, 2]))
    close(layer.bias, 1e-3 * torch.tensor([1.0, 1, 0, -1, -1, 0]), 1e-9)


def test_sequence_balance() -> None:
    """arXiv 2412.19437, eqs. 17-20, expert by expert; one when the load is even."""
    chosen, scores = torch.randint(5, (2 * 7, 3)), torch.randn(2 * 7, 5)
    expected = 0.0
    for row in range(2):
        tokens = range(7 * row, 7 * row + 7)
        for e in range(5):
            f = 5 / (3 * 7) * sum(int((chosen[t] == e).sum()) for t in tokens)
            p = sum(float(scores[t].softmax(-1)[e]) for t in tokens) / 7
            expected += f * p / 2
    close(float(sequence_balance(chosen, scores, torch.Size((2, 7)))), expected, 1e-6)
    even = torch.arange(10).view(10, 1) % 5
    close(float(sequence_balance(even, torch.zeros(10, 5), torch.Size((1, 10)))), 1.0, 1e-6)


def test_reports() -> None:
    config = CONFIG.replace(balance=0.5)
    layer, x, tally = awake(config), torch.randn(2, 7, DIM), Tally()
    layer(x, context(x, tally).at("prelude", 3))
    layer(x, context(x, tally).at("loop", 1))
    chosen, _, scores = layer.route(x.flatten(0, 1))
    assert tally.loads.keys() == {("prelude", 3), ("loop", 1)}
    close(tally.loads["loop", 1], [torch.bincount(chosen.flatten(), minlength=6)], 0)
    close(tally.costs["balance"], 2 * 0.5 * sequence_balance(chosen, scores, torch.Size((2, 7))), 1e-6)
    tally.costs["balance"].backward()
    assert layer.router.grad.abs().sum() > 0
    assert context(x).place == Place()
