"""The Universal Transformer against a twin written from tensor2tensor's equations, with nothing of ours."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from open_mythos.loop.halt import ACT, Last, UniversalACT
from open_mythos.loop.schedule import Plan
from open_mythos.loop.state import State
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Tally
from open_mythos.presets.universal import Size, universal
from tests.by_hand import Weights, attention, causal, close, layer_norm, linear, weights_of
from tests.lively import lively

SIZE = Size(vocab=31, dim=16, width=24, heads=2, most=5, dropout=0.0)
TOKENS = torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 4 + [0] * 5])


def signal(n: Tensor, dim: int) -> Tensor:
    """T2T's `get_timing_signal_1d`: all sines, then all cosines."""
    half = dim // 2
    angle = n.double()[..., None] * 10_000.0 ** -(torch.arange(half).double() / (half - 1))
    return torch.cat([angle.sin(), angle.cos()], -1)


def block(x: Tensor, w: Weights, name: str, seen: Tensor, post_norm: bool) -> Tensor:
    def attend(x: Tensor) -> Tensor:
        q, k, v = (linear(x, w, f"{name}.mixer.{part}") for part in "qkv")
        return linear(attention(q, k, v, 2, 2, seen), w, f"{name}.mixer.out")

    def transition(x: Tensor) -> Tensor:
        return linear(linear(x, w, f"{name}.ffn.up").clamp_min(0), w, f"{name}.ffn.down")

    for part, f in (("mixer", attend), ("ffn", transition)):
        norm = f"{name}.{part}_norm"
        x = layer_norm(x + f(x), w, norm, 1e-6) if post_norm else x + f(layer_norm(x, w, norm, 1e-6))
    return x


class Told(NamedTuple):
    """What the twin says: logits, N and R of every token, and the state after every step."""

    logits: Tensor
    count: Tensor
    rest: Tensor
    states: list[Tensor]


def twin(model: LoopedLM, size: Size, steps: int, real: Tensor) -> Told:
    """`universal_transformer_act` with flags as it keeps them, or Graves' sum, or no halting at all."""
    w, halt = weights_of(model), size.halt
    seen = causal(real) if size.attention == "causal" else real[:, None, :] & real[:, :, None]
    s = w["embed.weight"][TOKENS] * size.dim**0.5
    total, rest, count = (torch.zeros(TOKENS.shape).double() for _ in range(3))
    answer, states = torch.zeros_like(s), []
    for n in range(steps):
        depth = w["loop.mark.table.weight"][n] * size.dim**0.5 if size.learned_steps else None
        u = s + signal(torch.arange(TOKENS.shape[1]), size.dim)
        u = u + (signal(torch.tensor(n), size.dim) if depth is None else depth)
        moved = u
        for i in range(size.layers):
            moved = block(moved, w, f"loop.layers.{i}", seen, size.post_norm)
        if isinstance(halt, Last):
            s = answer = moved
            states.append(s)
            continue
        p = linear(moved if isinstance(halt, ACT) else u, w, "loop.halt.score").squeeze(-1)
        p = 1 / (1 + (-p).exp())
        running = (total < 1).double() * real
        over = total + p > 0.99 if isinstance(halt, UniversalACT) or n + 1 < steps else running > 0
        new, running = over * running, ~over * running
        total = total + p * running
        rest = rest + new * (1 - total)
        total = torch.where(new > 0, 1, total)
        count = count + running + new
        weight = (p * running + new * rest)[..., None]
        mixes = isinstance(halt, UniversalACT) and halt.mix == "basic"
        answer = weight * moved + ((1 - weight) * answer if mixes else answer)
        stays = isinstance(halt, UniversalACT) and halt.freeze
        s = torch.where((running + new > 0)[..., None], moved, s) if stays else moved
        states.append(s)
    features = answer if size.post_norm else layer_norm(answer, w, "norm", 1e-6)
    return Told(features @ w["embed.weight"].T, count, rest, states)


HALTS: list[UniversalACT | ACT | Last] = [
    UniversalACT(),
    UniversalACT(mix="accumulated"),
    UniversalACT(mix="accumulated", freeze=True),
    UniversalACT(freeze=True),
    ACT(),
    Last(),
]


@pytest.mark.parametrize(
    ("halt", "change"),
    [
        *((halt, {}) for halt in HALTS),
        *((halt, {"learned_steps": False, "layers": 2}) for halt in (UniversalACT(), Last())),
        *((halt, {"post_norm": True}) for halt in (UniversalACT(freeze=True), ACT())),
    ],
)
@pytest.mark.parametrize("attention", ["causal", "full"])
def test_the_model_is_its_twin(
    attention: str, halt: UniversalACT | ACT | Last, change: dict[str, Any]
) -> None:
    size = SIZE.replace(attention=attention, halt=halt, **change)
    model, real = lively(universal(size)), REAL.bool()
    steps, states, tally = 6 if isinstance(halt, Last) else 5, [], Tally()
    if not isinstance(halt, Last):
        with torch.no_grad():  # so that tokens halt at different steps
            model.loop.halt.score.weight.mul_(0.3 if isinstance(halt, ACT) else 0.1)  # type: ignore[union-attr]
            model.loop.halt.score.bias.fill_(-0.5)  # type: ignore[union-attr]
    told = twin(model, size, steps, real)
    if not isinstance(halt, Last):
        assert told.count[real].min() < told.count[real].max()

    def watch(_: int, state: State) -> None:
        states.append(state.h)

    ctx = Context.padded(TOKENS, REAL)
    close(model(TOKENS, ctx=ctx)[real], told.logits[real])
    with torch.no_grad():  # here tokens leave
        close(model(TOKENS, ctx=ctx)[real], told.logits[real])
    model.features(TOKENS, ctx=ctx, watch=watch, tally=tally)
    for given, expected in zip(states, told.states, strict=True):
        close(given[real], expected[real])
    if not isinstance(halt, Last):
        close(tally.costs["ponder"], (told.count + told.rest)[real].mean())


@pytest.mark.parametrize("halt", [UniversalACT(), ACT()])
def test_the_ponder_cost_is_a_mean_over_all_tokens_whoever_leaves(halt: UniversalACT | ACT) -> None:
    model = lively(universal(SIZE.replace(halt=halt)))
    ctx = Context.padded(TOKENS, REAL)

    def ponder(tokens: Tensor, ctx: Context, steps: int | tuple[int, ...]) -> Tensor:
        tally = Tally()
        model.features(tokens, Plan(steps), ctx, tally=tally)
        return tally.costs["ponder"]

    with torch.no_grad():  # tokens that are done leave
        early = ponder(TOKENS, ctx, 5)
    close(early, ponder(TOKENS, ctx, 5).double())
    rows = torch.arange(3)[:, None]
    alone = [ponder(TOKENS[row], ctx.take(row), n) for row, n in zip(rows, (5, 1, 2), strict=True)]
    share = REAL.sum(1) / REAL.sum()
    close(ponder(TOKENS, ctx, (5, 1, 2)), (torch.stack(alone) * share).sum().double())


def test_signals_begin_as_large_as_embeddings() -> None:
    model = universal(SIZE.replace(dim=256, vocab=999)).build()
    assert model.loop is not None
    still = torch.zeros(1, 2, 256)
    step = model.loop.mark(still, torch.tensor([3]), Context.counting(TOKENS[:1, :2]))
    table = step - signal(torch.arange(2), 256)
    embedded = model.encode(torch.arange(999)[None], Context.counting(torch.arange(999)[None])).e
    assert abs(table.std() - 1) < 0.15
    assert abs(embedded.std() - 1) < 0.05
    assert torch.all(model.loop.halt.score.bias == 1)


def test_the_ponder_cost_teaches_the_halting_unit() -> None:
    model, tally = lively(universal(SIZE)), Tally()
    model.features(TOKENS, tally=tally)
    tally.costs["ponder"].backward()
    assert model.loop.halt.score.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("halt", "rest"), [(UniversalACT(mix="accumulated"), 0.7616), (ACT(), 0.0)])
def test_the_last_step_forces_nothing_but_graves_does(halt: UniversalACT | ACT, rest: float) -> None:
    model = lively(universal(SIZE.replace(halt=halt, most=2)))
    with torch.no_grad():
        model.loop.halt.score.weight.zero_()  # type: ignore[union-attr]
        model.loop.halt.score.bias.fill_(-2.0)  # type: ignore[union-attr]
    states: list[State] = []
    model.features(TOKENS, watch=lambda _, state: states.append(state))
    torch.testing.assert_close(states[-1].left, torch.full((3, 9), rest), rtol=0, atol=1e-4)


def test_an_encoder_sees_what_comes_after() -> None:
    changed = TOKENS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 31
    for sight, blind in (("causal", True), ("full", False)):
        model = lively(universal(SIZE.replace(attention=sight, halt=Last())))
        same = torch.allclose(model(TOKENS)[:, 0], model(changed)[:, 0], atol=1e-6)
        assert same is blind


def test_padding_changes_nothing_for_an_encoder() -> None:
    model = lively(universal(SIZE.replace(attention="full")))
    real = torch.ones_like(TOKENS)
    real[0, 6:] = 0
    with torch.no_grad():
        padded = model(TOKENS, ctx=Context.padded(TOKENS, real))[0, :6]
        torch.testing.assert_close(padded, model(TOKENS[:1, :6])[0], rtol=1e-4, atol=1e-4)
