"""The dict cache: what it shows, what may be done to it, and that it changes nothing."""

import copy
import math

import pytest
import torch

from open_mythos.main import MythosConfig, OpenMythos
from tests.numerics.test_original import SMALL

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["gqa", "mla"])
def model(request):
    model = OpenMythos(MythosConfig(**SMALL, attn_type=request.param)).eval()
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


@pytest.fixture
def ids():
    return torch.randint(53, (2, 12))


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def pieces(model, ids, cuts, cache, **options):
    edges = zip([0, *cuts], [*cuts, ids.shape[1]], strict=True)
    return torch.cat([model(ids[:, a:b], kv_cache=cache, **options) for a, b in edges], dim=1)


@pytest.mark.parametrize("cuts", [[], [1], [11], [5, 6, 7], list(range(1, 12))])
def test_prompts_may_be_cut_anywhere(model, ids, cuts):
    close(pieces(model, ids, cuts, {}), model(ids))


def test_with_gradient_too(model, ids):
    with torch.enable_grad():
        cached = pieces(model, ids, [5, 9], {})
        close(cached, model(ids))
        cached[:, 5:].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_names_and_shapes_are_the_original_s(model, ids):
    cache = {}
    model(ids, n_loops=4, kv_cache=cache)
    loops = [f"recurrent_loop_{n}" for n in range(4)]
    assert list(cache) == ["prelude_0", "prelude_1", *loops, "coda_0"]
    shapes = {name: tuple(tensor.shape) for name, tensor in cache["coda_0"].items()}
    gqa = {"k": (2, 12, 2, 8), "v": (2, 12, 2, 8)}
    assert shapes == (gqa if model.cfg.attn_type == "gqa" else {"c_kv": (2, 12, 12), "k_rope": (2, 12, 1, 6)})


def test_a_shallow_copy_goes_its_own_way(model, ids):
    cache = {}
    model(ids[:, :8], kv_cache=cache)
    branch = dict(cache)
    other = (ids[:, 8:] + 1) % 53
    mine = model(ids[:, 8:10], kv_cache=cache)
    theirs = model(other[:, :2], kv_cache=branch)
    close(mine, model(ids[:, :10])[:, 8:])
    close(model(ids[:, 10:], kv_cache=cache), model(ids)[:, 10:])
    close(theirs, model(torch.cat([ids[:, :8], other[:, :2]], 1))[:, 8:])


@pytest.mark.parametrize("by", ["deepcopy", "clone", "cut", "reorder"])
def test_what_the_dict_shows_is_the_truth(model, ids, by):
    cache = {}
    model(ids[:, :9], kv_cache=cache)
    if by == "deepcopy":
        cache, before = copy.deepcopy(cache), ids[:, :9]
    elif by == "clone":
        cache, before = {k: {n: t.clone() for n, t in e.items()} for k, e in cache.items()}, ids[:, :9]
    elif by == "cut":
        for entry in cache.values():
            for name in entry:
                entry[name] = entry[name][:, :5]
        before = ids[:, :5]
    else:
        for entry in cache.values():
            for name in entry:
                entry[name] = entry[name].flip(0)
        before = ids[:, :9].flip(0)
    close(model(ids[:, 9:], kv_cache=cache), model(torch.cat([before, ids[:, 9:]], 1))[:, before.shape[1] :])


def test_buffers_double(model, ids):
    cache, made = {}, set()
    for at in range(12):
        model(ids[:, at : at + 1], kv_cache=cache)
        made.add(cache["coda_0"].held[0].data.data_ptr())
    assert len(made) <= 2 + math.log2(12)


def test_inference_mode_may_come_and_go(model, ids):
    cache = {}
    with torch.inference_mode():
        model(ids[:, :7], kv_cache=cache)
    second = model(ids[:, 7:10], kv_cache=cache)
    with torch.inference_mode():
        third = model(ids[:, 10:], kv_cache=cache)
    close(torch.cat([second, third], 1), model(ids)[:, 7:])


def test_deeper_than_before_sees_the_last_loop_there_was(model, ids):
    """The tokens of the first call have taken two loops; loops three and four see them as they were then."""
    cache = {}
    model(ids[:, :8], n_loops=2, kv_cache=cache)
    model(ids[:, 8:], n_loops=4, kv_cache=cache)
    name = "k" if model.cfg.attn_type == "gqa" else "c_kv"
    for n in (2, 3):
        close(cache[f"recurrent_loop_{n}"][name][:, :8], cache["recurrent_loop_1"][name][:, :8])
        assert cache[f"recurrent_loop_{n}"][name].shape[1] == 12
    # Shallow in between, and deep again.
    model(ids[:, :1], n_loops=1, kv_cache=cache)
    model(ids[:, :1], n_loops=4, kv_cache=cache)
    close(cache["recurrent_loop_3"][name][:, 12], cache["recurrent_loop_0"][name][:, 12])
    assert cache["recurrent_loop_3"][name].shape[1] == 14


def test_start_pos_is_inferred_or_checked(model, ids):
    cache = {}
    model(ids[:, :8], kv_cache=cache)
    with pytest.raises(ValueError, match="start_pos=3, but the cache holds 8 tokens"):
        model(ids[:, 8:], kv_cache=cache, start_pos=3)
    close(model(ids[:, 8:], kv_cache=cache, start_pos=8), model(ids)[:, 8:])


def test_misuse_is_told(model, ids):
    cache = {}
    model(ids[:, :8], kv_cache=cache)
    with pytest.raises(ValueError, match="batch of 2 rows, got 1"):
        model(ids[:1, 8:], kv_cache=cache)
    del cache["coda_0"]
    with pytest.raises(ValueError, match="holds 0 tokens for 'coda_0' where others hold"):
        model(ids[:, 8:], kv_cache=cache)
