"""Mixture-of-recursions: who is chosen, what that costs, and that the shorter batch is the same function."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from open_mythos.loop import route
from open_mythos.loop.schedule import Plan
from open_mythos.loop.state import State
from open_mythos.model import LoopedLM
from open_mythos.nn.attention import GroupedAttention
from open_mythos.nn.cache import KVCache, LastExited
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Tally
from open_mythos.presets.baseline import Shape
from open_mythos.presets.recursions import Size, recursions
from tests.lively import lively, work_of

SHAPE = Shape(vocab=37, dim=16, layers=8, heads=4, kv_heads=2, width=20)
TOKENS = torch.randint(0, 37, (3, 12), generator=torch.Generator().manual_seed(0))


def model(tokens_choose: bool, share_keys: bool = False) -> LoopedLM:
    size = Size(shape=SHAPE, tokens_choose=tokens_choose, share_keys=share_keys)
    return lively(recursions(size).override("loop.route.alpha=1.0"))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def who_runs(lm: LoopedLM, ctx: Context | None = None) -> Tensor:
    """N B T: which tokens took each step."""
    seen: list[Tensor] = []

    def watch(step: int, state: State) -> None:
        seen.append(state.left > 0)

    # The last step ends everybody, so one more is asked for than there are.
    lm.features(TOKENS, plan=Plan(lm.steps + 1), ctx=ctx, watch=watch)
    return torch.stack(seen[:-1])


def test_capacity_falls_and_the_left_out_stay_out() -> None:
    ran = who_runs(model(False).train())
    assert ran.sum(2).tolist() == [[12] * 3, [8] * 3, [4] * 3]
    assert not (ran[1:] & ~ran[:-1]).any()
    assert ran.sum() / TOKENS.numel() == pytest.approx(route.ExpertChoice().turns(3))


def test_not_causal_it_ranks_in_eval_mode_too() -> None:
    lm = model(False)
    assert not torch.equal(who_runs(lm.eval()), who_runs(lm.train()))
    lm.loop.route.config = lm.loop.route.config.replace(causal=False)
    assert torch.equal(who_runs(lm.eval()), who_runs(lm.train()))
    assert not lm.eval().loop.route.may_leave


def test_a_token_takes_every_depth_as_often() -> None:
    assert [route.TokenChoice(depths=3).turns(n) for n in (1, 2, 3, 9)] == pytest.approx([1, 5 / 3, 2, 2])


def test_padding_is_not_chosen_and_does_not_count() -> None:
    real = torch.ones_like(TOKENS)
    real[0, :6] = 0
    ran = who_runs(model(False).train(), Context.padded(TOKENS, real))
    assert not ran[:, 0, :6].any()
    assert ran.sum(2)[:, 0].tolist() == [6, 4, 2]


@pytest.mark.parametrize("tokens_choose", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_shorter_batch_is_the_masked_one(
    tokens_choose: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model(tokens_choose).train(training)
    short = lm(TOKENS)
    grads = torch.autograd.grad(short.square().sum(), list(lm.parameters()), allow_unused=True)

    def masked(x, base, gate, chosen, ctx, layers):  # type: ignore[no-untyped-def]
        both = chosen[:, None, None, :] & torch.ones(12, 12, dtype=torch.bool).tril()
        both = both | torch.eye(12, dtype=torch.bool)
        y = layers(x, replace(ctx, mask=both, start=None, memo={}))
        return torch.where(chosen[..., None], base + gate[..., None] * y, x)

    monkeypatch.setattr(route, "run_chosen", masked)
    long = lm(TOKENS)
    close(short, long)
    for a, b in zip(
        grads, torch.autograd.grad(long.square().sum(), list(lm.parameters()), allow_unused=True), strict=True
    ):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("tokens_choose", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_shared_keys_are_those_of_the_first_step(
    tokens_choose: bool, training: bool, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against layers that themselves remember, and all tokens computed at every step."""
    lm = model(tokens_choose, share_keys=True).train(training)
    ctx = Context.counting(TOKENS)
    ctx = replace(ctx, documents=torch.arange(12).expand(3, -1) // 5) if documents else ctx
    short = lm(TOKENS, ctx=ctx)
    grads = torch.autograd.grad(short.square().sum(), list(lm.parameters()), allow_unused=True)

    assert lm.loop is not None
    held: dict[int, tuple[Tensor, Tensor]] = {}
    inside = {id(layer.mixer) for layer in lm.loop.layers}

    def remember(self, k, v, ctx):  # type: ignore[no-untyped-def]
        return held.setdefault(id(self), (k, v)) if id(self) in inside else (k, v)

    def all_of_them(x, base, gate, chosen, ctx, layers):  # type: ignore[no-untyped-def]
        y = layers(x, replace(ctx, lender=None))
        return torch.where(chosen[..., None], base + gate[..., None] * y, x)

    monkeypatch.setattr(GroupedAttention, "_remember", remember)
    monkeypatch.setattr(route, "run_chosen", all_of_them)
    long = lm(TOKENS, ctx=replace(ctx, memo={}))
    close(short, long)
    slow = torch.autograd.grad(long.square().sum(), list(lm.parameters()), allow_unused=True)
    for a, b in zip(grads, slow, strict=True):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


def test_shared_keys_take_one_slot_of_the_cache_and_fewer_queries() -> None:
    """As the paper counts: 1 / steps of the memory, and queries of the chosen tokens alone."""
    sizes = {}
    for share in (False, True):
        lm, cache = model(False, share), KVCache(3, 12)
        lm(TOKENS, cache=cache)
        sizes[share] = sum(
            held.numel() for (stage, _, _, part), held in cache._held.items() if stage == "loop" and part < 2
        )
    assert sizes[False] == 3 * sizes[True]
    lm = model(False, share_keys=True).train()
    with work_of(lm) as work:
        lm(TOKENS)
    assert work == [36, 24, 12]


def test_the_capacities_warm_up_along_a_cosine() -> None:
    config = recursions(Size(shape=SHAPE, warmup=0.5))
    lm, counts = lively(config).train(), {}
    for done in (0.0, 0.25, 0.5, 1.0):
        ctx = replace(Context.counting(TOKENS), progress=torch.tensor(done))
        counts[done] = who_runs(lm, ctx).sum(2)[:, 0].tolist()
    # Half way down: 1, (1 + 2/3) / 2 and (1 + 1/3) / 2 of twelve tokens.
    assert counts == {0.0: [12, 12, 12], 0.25: [12, 10, 8], 0.5: [12, 8, 4], 1.0: [12, 8, 4]}
    with pytest.raises(ValueError, match="warm-up is a share of training"):
        route.ExpertChoice(warmup=2.0)


@pytest.mark.parametrize("tokens_choose", [False, True])
@pytest.mark.parametrize("policy", [None, LastExited()])
def test_a_cache_changes_nothing(tokens_choose: bool, policy: LastExited | None) -> None:
    lm, cache, parts = model(tokens_choose), KVCache(3, 12, policy), []
    with torch.no_grad():
        for a, b in ((0, 5), (5, 6), (6, 11), (11, 12)):
            parts.append(lm(TOKENS[:, a:b], ctx=Context.counting(TOKENS[:, a:b], a, cache)))
        close(torch.cat(parts, 1), lm(TOKENS))


@pytest.mark.parametrize("tokens_choose", [False, True])
def test_eval_mode_does_not_look_ahead(tokens_choose: bool) -> None:
    lm, changed = model(tokens_choose), TOKENS.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 37
    close(lm(TOKENS)[:, :8], lm(changed)[:, :8])


@pytest.mark.parametrize("tokens_choose", [False, True])
def test_the_router_is_taught(tokens_choose: bool) -> None:
    lm, tally = model(tokens_choose).train(), Tally()
    lm(TOKENS, tally=tally)
    (gradient,) = torch.autograd.grad(tally.costs["route"], lm.loop.route.score.weight)  # type: ignore[union-attr]
    assert gradient.abs().sum() > 0


def test_training_lets_the_threshold_find_the_best() -> None:
    """After learning from the auxiliary loss alone, eval mode mostly takes those whom ranking would."""
    lm = recursions(Size(shape=SHAPE)).override("loop.route.balance=1.0").build()
    assert lm.loop is not None
    optimizer = torch.optim.Adam(lm.loop.route.parameters(), lr=3e-2)
    for _ in range(60):
        tally = Tally()
        lm.train()(TOKENS, tally=tally)
        optimizer.zero_grad()
        tally.costs["route"].backward()
        optimizer.step()
    with torch.no_grad():
        agree = who_runs(lm.train()) == who_runs(lm.eval())
    assert agree.float().mean() > 0.8
