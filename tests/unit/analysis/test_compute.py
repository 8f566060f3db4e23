"""What a model costs, against sums done by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from open_mythos.analysis.compute import cache_bytes, flops, parameters
from open_mythos.loop.core import Loop
from open_mythos.loop.schedule import Fixed, Plan
from open_mythos.model import Model
from open_mythos.nn.attention import GQA, MLA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.cache import Anchor, Deepest, Folded, KVCache, LastExited, PerLoop, Ring, Shared, Skip
from open_mythos.nn.context import Context
from open_mythos.nn.ffn import MoE, SwiGLU
from tests.tiny import MODELS

D, V, F = 32, 61, 48
ATTENTION = D * D + 2 * D * (D // 2) + D * D  # q, k and v in half the heads, out
DENSE = ATTENTION + 3 * D * F
EXPERT = 3 * D * 16


def model(ffn=SwiGLU(width=F), mixer=GQA(heads=4, kv_heads=2), tied=True, steps=5):  # noqa: B008
    block = PreNorm(mixer=GQA(heads=4, kv_heads=2), ffn=SwiGLU(width=F))
    loop = Loop(layers=(PreNorm(mixer=mixer, ffn=ffn),) * 2, schedule=Fixed(steps=steps))
    return Model(vocab=V, dim=D, prelude=(block,), loop=loop, coda=(block,) * 3, tied=tied)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_one_part(name):
    counted = parameters(MODELS[name])
    assert sum(counted.by_part.values()) == counted.total
    assert counted.total == sum(p.numel() for p in MODELS[name].build().parameters())
    assert 0 < counted.active <= counted.total
    assert counted.looped <= counted.total


def test_dense_parameters():
    counted = parameters(model())
    norms = 2 * D
    assert counted.by_part == {
        "embed": V * D,
        "prelude": DENSE + norms,
        "loop.layers": 2 * (DENSE + norms),
        "coda": 3 * (DENSE + norms),
        "norm": D,
    }
    assert counted.tables == V * D
    assert counted.matrices == 6 * DENSE
    assert counted.experts == 0
    assert counted.active == counted.total  # a tied table is the head as well
    assert counted.unrolled == counted.total + 4 * counted.looped
    assert parameters(model(), loops=1).unrolled == counted.total
    untied = parameters(model(tied=False))
    assert untied.by_part["head"] == V * D
    assert untied.active == untied.total - (V - 1) * D


def test_of_the_routed_experts_only_the_chosen_are_active():
    counted = parameters(model(MoE(experts=8, chosen=2, width=16, shared=1)))
    assert counted.experts == 2 * 8 * EXPERT
    assert counted.active == counted.total - 2 * 6 * EXPERT
    assert counted.unrolled == counted.active + 4 * (counted.looped - 2 * 6 * EXPERT)


@pytest.mark.parametrize("tied", [True, False])
def test_dense_flops(tied):
    counted = flops(model(tied=tied))
    assert counted.once == 2 * (4 * DENSE + V * D)
    assert counted.per_loop == 2 * (2 * DENSE)
    assert counted.once_attention == 4 * (2 * 2 * D)  # scores and their mixture, per layer and token seen
    assert counted.per_loop_attention == 2 * (2 * 2 * D)
    assert counted.token(5, context=100) == pytest.approx(
        2 * (4 * DENSE + V * D) + 10 * 2 * DENSE + 100 * 4 * D * (4 + 10)
    )


def test_flops_of_experts_count_the_chosen_and_the_shared():
    counted = flops(model(MoE(experts=8, chosen=2, width=16, shared=1)))
    router, weights = 8 * D, 2 * D
    expected = 2 * 2 * (ATTENTION + router + 2 * EXPERT + 2 * EXPERT + weights)
    assert counted.per_loop == pytest.approx(expected)


def test_a_model_without_a_loop():
    counted = flops(MODELS["fixed-depth"])
    assert counted.per_loop == counted.per_loop_attention == 0
    assert counted.once > 0
    assert parameters(MODELS["fixed-depth"]).looped == 0
    assert cache_bytes(MODELS["fixed-depth"], PerLoop()) > 0


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_model_at_any_depth(name):
    """A line through depths one and two and two lengths meets a third of both."""
    lm = MODELS[name].build().eval()
    tokens = torch.zeros(1, 96, dtype=torch.long, device="meta")
    plan = None if lm.loop is None else Plan(4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lm.to("meta")(tokens, plan)
    assert 96 * flops(MODELS[name]).token(4, context=96) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_context_shorter_than_what_is_counted_changes_nothing():
    assert flops(model().replace(context=8)) == flops(model())


def test_cache_bytes_of_each_policy():
    once, slot = 2 * D, 2 * 2 * D  # keys and values of a layer at half width, in 2 bytes; two looped layers
    dense = model()
    for policy, slots in [
        (PerLoop(), 5),
        (LastExited(), 5),
        (Shared(), 1),
        (Ring(slots=2), 2),
        (Anchor(steps=3), 4),
    ]:
        assert cache_bytes(dense, policy) == 4 * once + slots * slot
    assert cache_bytes(dense, PerLoop(), loops=9) == 4 * once + 9 * slot
    assert cache_bytes(dense, PerLoop(), dtype=torch.float32) == 2 * cache_bytes(dense, PerLoop())
    latent = MLA(heads=4, q_rank=12, kv_rank=10, rope_dim=4, nope_dim=6, value_dim=8)
    assert cache_bytes(model(mixer=latent), PerLoop()) == 4 * once + 5 * 2 * 2 * (10 + 4)


@pytest.mark.parametrize("name", MODELS)
def test_cache_bytes_are_those_of_a_real_cache(name):
    lm, tokens = MODELS[name].build().eval(), torch.zeros(2, 7, dtype=torch.long)
    layers = 1
    if lm.loop is not None:
        layers, lm.loop.lockstep = len(lm.loop.layers), True  # or tokens that halt leave earlier
    for policy in (
        *(PerLoop(), LastExited(), Shared(), Ring(slots=3), Anchor(steps=2), Skip(), Deepest()),
        Folded(layers=layers),
    ):
        for loops in (None, 1, 2, 5):
            cache = KVCache(2, 7, policy)
            plan = None if lm.loop is None else Plan(loops or lm.steps)
            with torch.no_grad():
                lm(tokens, plan, ctx=Context.counting(tokens, cache=cache))
            assert cache.nbytes == 2 * 8 * cache_bytes(MODELS[name], policy, loops, dtype=torch.float32)
