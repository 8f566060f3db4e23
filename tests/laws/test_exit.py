"""Who leaves the loop early has the answer of the step at which it left, and computes nothing more."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from open_mythos.loop import halt
from open_mythos.loop.exit import (
    Confidence,
    EntropyChange,
    PeakChange,
    ReadoutChange,
    SameToken,
    StateChange,
    StateTurn,
    Steps,
)
from open_mythos.loop.schedule import Plan
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.cache import KVCache, LastExited, PerLoop
from open_mythos.nn.context import Context
from open_mythos.nn.ffn import SwiGLU
from tests.lively import lively, work_of
from tests.tiny import MODELS, ROUTED

LOOPED = {name: config for name, config in (MODELS | ROUTED).items() if config.loop is not None}
ADAPTIVE = [name for name, config in LOOPED.items() if not isinstance(config.loop.halt, halt.Last)]
# Where tokens choose their depth, one that is made to leave is no longer there for the others to see.
PLAIN = [name for name in LOOPED if name not in ADAPTIVE and name not in ROUTED]
TOKENS = torch.arange(3 * 7).reshape(3, 7) * 11 % 61
RULES = [
    StateChange(threshold=0.6),
    StateChange(threshold=0.8, least=1, every=2),
    ReadoutChange(threshold=2.0),
    ReadoutChange(threshold=3.0, entropy=3.0, every=3),
    ReadoutChange(threshold=2.0, reverse=True),
    Confidence(entropy=2.5),
    Confidence(entropy=3.5, least=3),
]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def think(model, tokens, plan, ctx=None, rule=None, watch=None):
    """(state after the loop, logits)"""
    ctx = ctx or Context.counting(tokens)
    judge = None if rule is None else (rule, model.read)
    state = model.loop(model.encode(tokens, ctx), ctx, plan, watch, judge)
    return state, model.read(state, ctx)


def enough(rule, before, after, old, new):
    """The rules as their papers write them."""
    if isinstance(rule, StateChange):
        return (after - before).norm(dim=-1) / after.norm(dim=-1) < rule.threshold
    entropy = torch.distributions.Categorical(logits=new).entropy()
    if isinstance(rule, Confidence):
        return entropy < rule.entropy
    p, q = (new, old) if rule.reverse else (old, new)
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return (kl < rule.threshold) & (True if rule.entropy is None else entropy < rule.entropy)


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("cached", [False, True])
def test_a_prescribed_number_of_steps_is_the_plan_of_as_many(name, cached):
    model = lively(LOOPED[name])
    for steps in (1, 3):
        wanted = model(TOKENS, steps)
        for policy in (PerLoop(), LastExited()) if cached else (None,):
            cache = None if policy is None else KVCache(3, 7, policy)
            got = model(TOKENS, 6, cache=cache, exit=Steps(steps=steps))
            assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_answer_is_that_of_the_first_step_that_was_enough(name, rule):
    model = lively(LOOPED[name])
    ctx, states = Context.counting(TOKENS), []
    start = model.encode(TOKENS, ctx)
    model.loop(start, ctx, Plan(7), lambda n, state: states.append(state.h))
    before, answer, taken = start.h, start.h, torch.full(TOKENS.shape, 7, dtype=torch.int32)
    done, old = torch.zeros(TOKENS.shape, dtype=torch.bool), model.read(start, ctx)
    for n, h in enumerate(states, 1):
        answer = torch.where(done[..., None], answer, h)
        new = model.read(start._replace(answer=answer), ctx)
        if n >= rule.least and n % rule.every == 0:
            ends = enough(rule, before, h, old, new) & ~done
            taken, done = torch.where(ends, n, taken), done | ends
        before, old = h, new
    state, logits = think(model, TOKENS, Plan(7), rule=rule)
    assert torch.equal(state.taken, taken)
    assert_close(logits, new, atol=1e-4, rtol=1e-4)


def test_the_rules_above_really_stop_some_tokens_early_and_some_not():
    depths = {
        step
        for name in PLAIN[:3]
        for rule in RULES
        for step in think(lively(LOOPED[name]), TOKENS, Plan(7), rule=rule)[0].taken.unique().tolist()
    }
    assert len(depths) >= 5


# Where tokens choose their depth, one that declines a step rides along in the rectangle of the others.
@pytest.mark.parametrize("name", [name for name in LOOPED if name not in ROUTED])
def test_tokens_that_left_compute_nothing(name):
    """One token per row, as in decoding: the work done is the sum of the steps taken."""
    model = lively(LOOPED[name])
    rule = StateChange(threshold=0.7)
    for policy in (None, LastExited()):
        cache = None if policy is None else KVCache(3, 7, policy)
        if cache is not None:
            model(TOKENS[:, :4], 3, cache=cache)
        ctx = Context.counting(TOKENS[:, 4:5], 4 if cache else 0, cache)
        with work_of(model) as work:
            state, _ = think(model, TOKENS[:, 4:5], Plan(7), ctx, rule)
        assert sum(work) == int(state.taken.sum())
    with work_of(model) as work:
        think(model, TOKENS, Plan(7), Context.counting(TOKENS, 0, KVCache(3, 7)), rule)
    assert sum(work) == 3 * 7 * 7


@pytest.mark.parametrize("name", LOOPED)
def test_a_tail_of_finished_tokens_is_dropped_and_nothing_changes(name):
    model = lively(LOOPED[name])
    rule = StateChange(threshold=1.0, least=1)  # with it every model has such a tail
    kept, full = think(model, TOKENS, Plan(6), rule=rule, watch=lambda n, state: None)
    with work_of(model) as work:
        state, logits = think(model, TOKENS, Plan(6), rule=rule)
    assert_close(logits, full, atol=1e-5, rtol=1e-5)
    assert torch.equal(state.taken, kept.taken)
    # A token works until it and all that come after it in its row are done; no longer rectangle is needed.
    still = kept.taken.flip(1).cummax(1).values.flip(1)
    rectangles = [
        int((still > n).any(1).sum()) * (int((still > n).any(0).nonzero().max()) + 1)
        for n in range(int(still.max()))
    ]
    assert work == rectangles or name in ROUTED  # whose tokens are picked from all over the row
    assert sum(work) < 3 * 7 * 6


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_halting_leaves_early_and_nothing_changes(name):
    model = lively(LOOPED[name])
    model.loop.halt.score.weight.mul_(0.1)
    model.loop.halt.score.bias.fill_(1.5)
    with torch.enable_grad():
        whole = model(TOKENS, 6)  # with gradient nobody leaves
    with work_of(model) as work:
        _, logits = think(model, TOKENS, Plan(6))
    assert_close(logits, whole.detach(), atol=1e-5, rtol=1e-5)
    assert sum(work) < 3 * 7 * 6
    assert_close(model(TOKENS, 6, cache=KVCache(3, 7)), whole.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("rule", [None, StateChange(threshold=0.7), ReadoutChange(threshold=2.0)], ids=str)
def test_rows_of_any_depth_and_padding_think_as_they_would_alone(name, rule):
    model = lively(LOOPED[name])
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    depths = (2, 6, 4)
    state, logits = think(model, TOKENS, Plan(depths), Context.padded(TOKENS, real), rule)
    assert int(state.taken[real == 0].sum()) == 0
    for row, depth in enumerate(depths):
        mine = real[row].bool()
        alone, own = think(model, TOKENS[row, mine][None], Plan(depth), rule=rule)
        assert_close(logits[row, mine], own[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(state.taken[row, mine], alone.taken[0])


READERS = [
    ReadoutChange(threshold=0.5, least=1),
    EntropyChange(threshold=0.1, least=1),
    PeakChange(threshold=0.1, least=1),
    SameToken(times=1),
]


@pytest.mark.parametrize("name", ["huginn", "mythos-gqa-act", "recursions"])
@pytest.mark.parametrize("rule", READERS, ids=str)
def test_rows_without_frozen_steps_remember_nothing_of_others(name, rule):
    """The rows of a plan with frozen steps for some only; tokens leave in the frozen phase."""
    model = lively(LOOPED[name]).double()
    with torch.enable_grad():
        together = model(TOKENS, Plan((2, 6, 4), 2), exit=rule)
        for row, depth in enumerate((2, 6, 4)):
            alone = model(TOKENS[row : row + 1], Plan(depth, 2), exit=rule)
            assert_close(together[row], alone[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        ReadoutChange(threshold=0.3, least=1, together=True),
        EntropyChange(threshold=0.5, least=1, together=True),
        StateTurn(threshold=0.7, least=1, together=True),
        StateChange(threshold=0.9, least=1, together=True),
    ],
    ids=str,
)
def test_padding_has_no_say_in_when_a_row_leaves_together(rule):
    model, row = lively(LOOPED["huginn"]).double(), TOKENS[:1]
    padded = torch.cat([row, torch.full((1, 9), 3)], dim=1)
    real = torch.arange(16)[None] < 7
    alone_state, alone = think(model, row, Plan(6), rule=rule)
    state, logits = think(model, padded, Plan(6), Context.padded(padded, real.long()), rule)
    assert torch.equal(state.taken[:, :7], alone_state.taken)
    assert_close(logits[:, :7], alone, atol=1e-5, rtol=1e-5)
    assert int(alone_state.taken.max()) < 6


def test_a_mask_with_positions_a_cache_and_tokens_that_leave():
    model, causal = lively(LOOPED["mythos-gqa-act"]), torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    places, rule = torch.arange(7).expand(3, -1), StateChange(threshold=0.8, least=1)
    out = []
    for mask in (None, causal[:, :, 3:]):
        cache = KVCache(3, 7, LastExited())
        model(TOKENS[:, :3], Plan(6), cache=cache)
        ctx = Context.ragged(TOKENS[:, 3:], places[:, 3:], cache).but(mask=mask)
        state, logits = think(model, TOKENS[:, 3:], Plan(6), ctx, rule)
        out.append(logits)
    assert_close(*out, atol=1e-5, rtol=1e-5)
    assert int(state.taken[:, -1].min()) < 6


def test_padding_does_not_keep_a_row_waiting():
    model = lively(MODELS["parcae"])
    rule = StateChange(threshold=0.7, least=1)
    prompt = TOKENS[:1, :4]
    with work_of(model) as alone:
        think(model, prompt, Plan(9), rule=rule)
    for tokens, real in [
        (torch.cat([prompt, TOKENS[1:2, :2]], 1), [[1, 1, 1, 1, 0, 0]]),
        (torch.cat([TOKENS[1:2, :2], prompt], 1), [[0, 0, 1, 1, 1, 1]]),
    ]:
        ctx = Context.padded(tokens, torch.tensor(real))
        with work_of(model) as work:
            think(model, tokens, Plan(9), ctx, rule)
        assert len(work) == len(alone)


def test_where_tokens_look_ahead_only_whole_rows_leave():
    block = PreNorm(mixer=GQA(heads=4, attention="full"), ffn=SwiGLU(width=48))
    config = MODELS["huginn"]
    model = lively(config.replace(loop=config.loop.replace(layers=(block,))))
    rule = StateChange(threshold=0.9, least=1)
    kept, full = think(model, TOKENS, Plan(6), rule=rule, watch=lambda n, state: None)
    state, logits = think(model, TOKENS, Plan(6), rule=rule)
    # The last token is done before others are, in every row that is still thinking: a tail to be kept.
    before = kept.taken.amax(1, keepdim=True)
    tails = [kept.taken[before[:, 0] > n] <= n for n in range(1, 6)]
    assert any(len(tail) and bool(tail[:, -1].all()) for tail in tails)
    assert len(kept.taken.unique()) > 2
    assert len(kept.taken.amax(1).unique()) > 1
    assert torch.equal(state.taken, kept.taken)
    assert_close(logits, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rest", [halt.ACT(threshold=0.9), halt.ACT(threshold=0.9, as_released=True)], ids=str
)
def test_cutting_a_token_short_is_its_last_step(rest):
    """The halting mass that is left goes to the state at hand, as at the end of a plan."""
    config = MODELS["mythos-gqa-act"]
    model = lively(config.replace(loop=config.loop.replace(halt=rest)))
    assert_close(model(TOKENS, 6, exit=Steps(steps=2)), model(TOKENS, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grad", [1, 2, 5])
def test_a_plan_with_frozen_steps_judges_every_step_once(grad):
    model = lively(MODELS["huginn"])
    rule = StateChange(threshold=0.7)
    wanted, logits = think(model, TOKENS, Plan((5, 3, 4)), rule=rule)
    with torch.enable_grad():
        got, other = think(model, TOKENS, Plan((5, 3, 4), grad), rule=rule)
    assert torch.equal(got.taken, wanted.taken)
    # With gradient and without, norms are rounded otherwise.
    assert_close(other.detach(), logits, atol=1e-4, rtol=1e-4)
