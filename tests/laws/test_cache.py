"""A cache changes nothing: wherever a prompt is cut, whoever shares the batch, however deep each row goes.

And where a policy forgets on purpose, it forgets exactly what it says: whoever looks at a step that a token
never took sees its latest step before that one.
"""

from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from open_mythos.loop.exit import StateChange
from open_mythos.loop.keys import FirstStep
from open_mythos.loop.schedule import Plan
from open_mythos.nn.cache import GrowingCache, KVCache, LastExited, PerLoop, Ring, Shared
from open_mythos.nn.context import Context
from tests.lively import lively
from tests.tiny import MODELS, ROUTED

EVERY = MODELS | ROUTED
LOOPED = {name: config for name, config in EVERY.items() if config.loop is not None}
POLICIES = [PerLoop(), Shared(), Ring(slots=2), Ring(slots=3)]
TOKENS = torch.arange(3 * 9).reshape(3, 9) * 7 % 61


class DictCache:
    """The definition: a vector per (layer, row, position, slot); a look finds the latest at or before."""

    def __init__(self, policy):
        self.policy, self.exact = policy, policy.exact
        self.held = defaultdict(dict)

    def _slots(self, place, batch):
        steps = [place.step] * batch if isinstance(place.step, int) else place.step
        return [self.policy.slot(step) if place.stage == "loop" else 0 for step in steps]

    def extend(self, place, new, span):
        rows = range(len(new)) if span.rows is None else span.rows.tolist()
        out = new.new_zeros(*new.shape[:-2], span.end, new.shape[-1])
        for b, (row, slot) in enumerate(zip(rows, self._slots(place, len(new)), strict=True)):
            for t, position in enumerate(span.positions[b].tolist()):
                if position >= 0:
                    self.held[place.stage, place.layer, place.part, row, position][slot] = new[b, ..., t, :]
            for position in range(span.end):
                seen = self.held[place.stage, place.layer, place.part, row, position]
                if best := [s for s in seen if s <= slot]:
                    out[b, ..., position, :] = seen[max(best)]
        return out

    def settle(self, layers, taken, span):
        rows = range(len(span.positions)) if span.rows is None else span.rows.tolist()
        where = {(row, p) for b, row in enumerate(rows) for p in span.positions[b].tolist()}
        for (stage, layer, _, row, position), seen in self.held.items():
            if stage == "loop" and layer < layers and (row, position) in where:
                for slot in [s for s in seen if s >= taken]:
                    del seen[slot]


def plan(model, steps=3):
    return None if model.loop is None else Plan(steps)


@torch.no_grad()
def in_pieces(model, tokens, cuts, cache, steps=3):
    parts = [
        model(tokens[:, a:b], plan(model, steps), ctx=Context.counting(tokens[:, a:b], a, cache))
        for a, b in pairwise([0, *cuts, tokens.shape[1]])
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("cuts", [[8], [1, 3, 4]], ids=str)
def test_a_prompt_may_be_cut_anywhere(name, cuts):
    model = lively(EVERY[name])
    with torch.no_grad():
        whole = model(TOKENS, plan(model))
    assert_close(in_pieces(model, TOKENS, cuts, KVCache(3, 9)), whole, atol=1e-4, rtol=1e-4)
    assert_close(in_pieces(model, TOKENS, cuts, GrowingCache()), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, LastExited()) for name in LOOPED), *(("mythos-mla-act", policy) for policy in POLICIES)],
    ids=str,
)
def test_each_policy_keeps_what_it_says(name, policy):
    """Rows of their own length and depth; deeper and shallower later; under a rule that lets tokens leave."""
    model = lively(LOOPED[name])
    torch.manual_seed(1)
    caches = KVCache(3, 14, policy), DictCache(policy)
    lengths = [0, 0, 0]
    for new, depths, rule in [
        ([3, 5, 1], (2, 4, 3), None),
        ([1, 1, 1], (4, 1, 3), None),
        ([1, 1, 1], (6, 6, 6), StateChange(threshold=0.7, least=1)),
        ([4, 0, 3], (6, 2, 6), StateChange(threshold=0.7, least=1)),
        ([1, 1, 1], (6, 3, 6), StateChange(threshold=0.7, least=1)),
        ([1, 1, 1], (1, 7, 2), None),
    ]:
        width = max(new)
        tokens = torch.randint(61, (3, width))
        columns = torch.arange(width).expand(3, -1)
        real = columns < torch.tensor(new)[:, None]
        positions = torch.where(real, columns + torch.tensor(lengths)[:, None], -1)
        outs = []
        for cache in caches:
            ctx = Context.ragged(tokens, positions, cache)
            with torch.no_grad():
                outs.append(model(tokens, Plan(depths), ctx=ctx, exit=rule)[real])
        assert_close(outs[0], outs[1], atol=1e-4, rtol=1e-4)
        lengths = [length + n for length, n in zip(lengths, new, strict=True)]


@pytest.mark.parametrize("name", LOOPED)
def test_policies_agree_where_none_forgets(name):
    model = lively(LOOPED[name])
    exact = in_pieces(model, TOKENS, [4, 5], KVCache(3, 9))
    for policy in (LastExited(), Ring(slots=3), Ring(slots=8)):
        if name in ROUTED:  # tokens leave, and a smaller batch is rounded otherwise
            assert_close(in_pieces(model, TOKENS, [4, 5], KVCache(3, 9, policy)), exact, atol=1e-4, rtol=1e-4)
        elif model.config.loop.halt.to_dict()["is"] == "Last":
            assert torch.equal(in_pieces(model, TOKENS, [4, 5], KVCache(3, 9, policy)), exact)
    one = in_pieces(model, TOKENS, [4, 5], KVCache(3, 9, Ring(slots=1)))
    assert torch.equal(in_pieces(model, TOKENS, [4, 5], KVCache(3, 9, Shared())), one)
    # The first step's keys and values alone are kept anyhow: there is nothing to forget.
    assert torch.allclose(one, exact, atol=1e-3) == isinstance(model.config.loop.keys, FirstStep)


@pytest.mark.parametrize("name", EVERY)
def test_padding_on_either_side_changes_nothing(name):
    model = lively(EVERY[name])
    prompt, filler = TOKENS[:1, :5], torch.tensor([[60, 59, 58]])
    alone = model(prompt, plan(model))
    for tokens, real in [
        (torch.cat([filler, prompt], 1), [[0, 0, 0, 1, 1, 1, 1, 1]]),
        (torch.cat([prompt, filler], 1), [[1, 1, 1, 1, 1, 0, 0, 0]]),
    ]:
        mask = torch.tensor(real)
        for cache in (None, KVCache(1, 8)):
            got = model(tokens, plan(model), ctx=Context.padded(tokens, mask, cache))
            assert_close(got[mask.bool()], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_decoding_goes_on_after_left_padding(name):
    """A padded prompt, then one more token for each row, at positions of its own."""
    model = lively(EVERY[name])
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    tokens, cache = TOKENS[:, :4], KVCache(3, 6)
    with torch.no_grad():
        model(tokens, plan(model), ctx=Context.padded(tokens, real, cache))
        after = Context.ragged(TOKENS[:, 4:5], real.sum(1, keepdim=True), cache)
        got = model(TOKENS[:, 4:5], plan(model), ctx=after)
        for row in range(3):
            own = torch.cat([tokens[row][real[row].bool()], TOKENS[row, 4:5]])[None]
            assert_close(got[row, 0], model(own, plan(model))[0, -1], atol=1e-4, rtol=1e-4)


def test_only_the_rows_that_are_named_are_touched():
    model = lively(MODELS["mythos-mla"])
    cache = KVCache(4, 8)
    rows = torch.tensor([3, 1])
    with torch.no_grad():
        for part in (slice(0, 5), slice(5, 6)):
            ctx = Context.counting(TOKENS[:2, part], part.start, cache)
            got = model(TOKENS[:2, part], 3, ctx=Context(**{**vars(ctx), "rows": rows, "start": None}))
        assert_close(got[:, -1], model(TOKENS[:2, :6], 3)[:, -1], atol=1e-4, rtol=1e-4)
    held = next(iter(cache._held.values()))
    assert bool(held[rows].any())
    assert not bool(held[[0, 2]].any())


def test_kept_rows_go_on_as_if_alone():
    model = lively(MODELS["huginn"])
    cache = KVCache(3, 9)
    with torch.no_grad():
        model(TOKENS[:, :6], 3, cache=cache)
        cache.keep(torch.tensor([2, 0]))
        tokens = TOKENS[[2, 0], 6:7]
        got = model(tokens, 3, ctx=Context.counting(tokens, 6, cache))
        assert_close(got[:, 0], model(TOKENS[[2, 0], :7], 3)[:, -1], atol=1e-4, rtol=1e-4)


def test_a_cache_says_what_does_not_fit():
    model = lively(MODELS["mythos-gqa-act"])
    with pytest.raises(ValueError, match="holds 4 tokens per row, but 9"):
        model(TOKENS, 3, cache=KVCache(3, 4))
    with pytest.raises(ValueError, match="for 2 rows, the batch has 3"):
        model(TOKENS, 3, cache=KVCache(2, 9))
    with pytest.raises(ValueError, match="at least one row"):
        KVCache(0, 4)
    with pytest.raises(ValueError, match="at least one slot"):
        Ring(slots=0)
