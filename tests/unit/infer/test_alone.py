"""The verbs of one row on a CPU: the numbers of the plain ones, and else the plain ones themselves."""

from contextlib import nullcontext

import pytest
import torch

from open_mythos.infer.alone import AloneVerbs, apart
from open_mythos.infer.generate import generate
from open_mythos.loop.adapt import NormedStep
from open_mythos.loop.halt import ACT
from open_mythos.loop.inject import Add, Nothing
from open_mythos.loop.mark import StepSinusoid, Unmarked
from open_mythos.loop.schedule import Plan
from open_mythos.loop.update import Gate, Replace
from open_mythos.nn.block import PreNormBlock, Sandwich
from open_mythos.nn.cache import KVCache, Ring, Shared
from open_mythos.nn.context import Context
from open_mythos.nn.ffn import MoE
from open_mythos.nn.linear import LoRA
from open_mythos.nn.norm import LayerNorm
from open_mythos.nn.rope import Rope, Yarn
from open_mythos.nn.tally import Tally
from tests import tiny
from tests.lively import lively

EVERY = tiny.MODELS | tiny.ROUTED
MYTHOS = ["mythos-mla", "mythos-mla-act", "mythos-gqa-act"]
PROMPT, NEXT = [5, 9, 2, 40, 17], [3, 3, 60]


def changed(name="mythos-gqa-act", **loop):
    config = tiny.MODELS[name]
    return config.replace(loop=config.loop.replace(**loop))


def layer(block=None, **parts):
    """One of the loop's, with other parts."""
    config = tiny.MODELS["mythos-gqa-act"]
    first = config.loop.layers[0]
    fields = {"mixer": first.mixer, "ffn": first.ffn} | parts
    return changed(layers=((block or type(first))(**fields),))


VARIED = {
    "no signals": changed(mark=Unmarked(), inject=Nothing(), update=Replace()),
    "a relative signal": changed(mark=StepSinusoid(channels=8, relative=True), inject=Add()),
    "few steps told apart": changed(mark=StepSinusoid(channels=8, steps=2)),
    "a normed step, a gate": changed(adapt=NormedStep(), update=Gate()),
    "halting as released": changed(halt=ACT(threshold=0.6, as_released=True)),
    "all of the mass": changed(halt=ACT(threshold=1.0)),
    "no shared experts": layer(ffn=MoE(experts=4, chosen=3, width=16, shared=0)),
    "another norm": layer(norm=LayerNorm()),
    "scaled branches": layer(scale=0.5),
    "sandwich": layer(Sandwich),
    "maps that differ by step": layer(mixer=tiny.GROUPED.replace(linear=LoRA(rank=2, steps=3))),
    "odd halves": layer(mixer=tiny.LATENT.replace(nope_dim=5)),
    "pairs of halves": layer(mixer=tiny.GROUPED.replace(rope=Rope(pairs="halves"))),
    "latents with pairs of halves": layer(
        mixer=tiny.LATENT.replace(rope=Rope(pairs="halves", scaling=Yarn(factor=4.0, original=8)))
    ),
    "a bias": layer(mixer=tiny.GROUPED.replace(bias=True, out_bias=True)),
    "no positions": layer(mixer=tiny.GROUPED.replace(rope=None)),
    "a scaled stream": tiny.MODELS["mythos-gqa-act"].replace(embed_scale=3.0),
}


def taken(model, verbs, loops, prompt=PROMPT):
    """States and features of each next token, read by `verbs` after a prompt read by the model."""
    cache = KVCache(1, len(prompt) + len(NEXT))
    model.features(torch.tensor([prompt]), plan(model, loops), cache=cache)
    for position, token in enumerate(NEXT, len(prompt)):
        tokens = torch.tensor([[token]])
        ctx = Context.counting(tokens, position, cache)
        state = verbs.encode(tokens, ctx)
        if model.loop is not None:
            state = model.loop(state, ctx, plan(model, loops), take=verbs.step)
        yield *state, verbs.decode(state, ctx)


def agree(model, loops):
    for got, want in zip(taken(model, apart(model), loops), taken(model, model, loops), strict=True):
        for part, expected in zip(got, want, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-4)


def unbalanced(model):
    """The biases of its routers matter."""
    for name, bias in model.named_buffers():
        if name.endswith("ffn.bias"):
            bias.normal_()
    return model


def plan(model, loops):
    return None if model.loop is None else Plan(loops)


@pytest.mark.parametrize("loops", [1, 3, 5])
@pytest.mark.parametrize("config", [*EVERY.values(), *VARIED.values()], ids=[*EVERY, *VARIED])
@torch.inference_mode()
def test_they_say_what_the_plain_ones_say(config, loops):
    model = unbalanced(lively(config))
    assert isinstance(apart(model), AloneVerbs)
    agree(model, loops)


@pytest.mark.parametrize("bias", [-1e4, -20.0, 20.0, 1e4])
@torch.inference_mode()
def test_halting_that_is_quite_sure(bias):
    model = lively(tiny.MODELS["mythos-gqa-act"])
    torch.nn.init.constant_(model.loop.halt.score.bias, bias)
    agree(model, 4)


@pytest.mark.parametrize("name", [*MYTHOS, "retrofit"])
def test_no_block_is_called_once_the_prompt_is_read(name, monkeypatch):
    model, calls = lively(tiny.MODELS[name]), []
    plain = PreNormBlock.forward
    monkeypatch.setattr(PreNormBlock, "forward", lambda *given: calls.append(1) or plain(*given))
    generate(model, [PROMPT], max_new_tokens=5, loops=3)
    config = model.config
    assert len(calls) == len(config.prelude) + 3 * len(config.loop.layers) + len(config.coda)


LAYER = [f"layers.0{part}" for part in ("", ".mixer", ".mixer.q", ".ffn", ".ffn.shared_down", ".ffn_norm")]
INNER = ["inject.norm", "adapt.up", "halt.score"]


@pytest.mark.parametrize("part", [*LAYER, *INNER, "mark", "inject", "adapt", "update", "halt"])
def test_a_part_that_somebody_listens_to_is_called(part):
    model, calls = lively(tiny.MODELS["mythos-gqa-act"]), []
    want = generate(model, [PROMPT], max_new_tokens=4, loops=3)
    model.loop.get_submodule(part).register_forward_hook(lambda *given: calls.append(1))
    assert generate(model, [PROMPT], max_new_tokens=4, loops=3) == want
    assert len(calls) == 4 * 3


def listened_to(model):
    """Whose blocks are called, all of them."""
    for block in [*model.prelude, *model.loop.layers, *model.coda]:
        block.register_forward_hook(lambda *given: None)
    return model


class Doubled(torch.nn.Module):
    """Somebody's own map, which wants the context as every map of a layer gets it."""

    def __init__(self, map_):
        super().__init__()
        self.map = map_

    def forward(self, x, ctx):
        return 2 * self.map(x, ctx) + ctx.positions[..., None]


@pytest.mark.parametrize("part", ["mixer.k", "mixer.out", "ffn.down"])
@torch.inference_mode()
def test_somebodys_own_map_gets_what_it_wants(part):
    model = lively(tiny.MODELS["mythos-gqa-act"])
    block = model.prelude[0]
    owner, name = part.split(".")
    setattr(getattr(block, owner), name, Doubled(block.get_submodule(part)))
    agree(model, 3)


CALLS = {  # rows, context from (tokens, cache), what goes on meanwhile
    "more rows": (2, lambda tokens, cache: Context.counting(tokens, 5, cache), nullcontext),
    "rows out of step": (2, lambda t, cache: Context.ragged(t, torch.tensor([[5], [4]]), cache), nullcontext),
    "its own position": (1, lambda t, cache: Context.ragged(t, torch.tensor([[5]]), cache), nullcontext),
    "another cache": (1, lambda tokens, cache: Context.counting(tokens, 0), nullcontext),
    "a tally": (1, lambda t, cache: Context.counting(t, 5, cache).with_tally(Tally()), nullcontext),
    "a gradient": (1, lambda tokens, cache: Context.counting(tokens, 5, cache), torch.enable_grad),
}


@pytest.mark.parametrize("kind", CALLS)
@torch.no_grad()
def test_other_calls_go_to_the_plain_ones(kind, monkeypatch):
    rows, context, meanwhile = CALLS[kind]
    model, verbs, heard = lively(tiny.MODELS["mythos-mla-act"]), [], []
    for name in ("encode", "step", "decode"):
        plain = getattr(model, name)
        monkeypatch.setattr(
            model,
            name,
            lambda *given, name=name, plain=plain, **more: heard.append(name) or plain(*given, **more),
        )
    verbs, cache = apart(model), KVCache(rows, 8)
    prompt = torch.tensor([PROMPT] * rows)
    model.features(prompt, Plan(2), cache=cache)
    heard.clear()
    tokens = torch.full((rows, 1), 7)
    with meanwhile():
        ctx = context(tokens, cache)
        state = model.loop(verbs.encode(tokens, ctx), ctx, Plan(2), take=verbs.step)
        verbs.decode(state, ctx)
    assert heard == ["encode", "step", "step", "decode"]


@pytest.mark.parametrize("name", ["mythos-mla-act", "mythos-gqa-act", "huginn"])
@torch.inference_mode()
def test_under_autocast_a_row_is_computed_in_float32(name):
    model = lively(tiny.MODELS[name])
    whole = list(taken(model, apart(model), 3))
    with torch.autocast("cpu", torch.bfloat16):  # so that the prompt's part of the cache is rounded
        rounded = list(taken(model, apart(model), 3))
    for got, want in zip(rounded, whole, strict=True):
        assert all(a.dtype == b.dtype for a, b in zip(got, want, strict=True))
        torch.testing.assert_close(got[-1], want[-1], rtol=0.1, atol=0.1)
    tokens, caches = torch.tensor([PROMPT]), [KVCache(1, 8), KVCache(1, 8)]
    for cache in caches:
        model.features(tokens, Plan(3), cache=cache)
    one = tokens[:, :1]
    ctx, other = (Context.counting(one, 5, cache) for cache in caches)
    want = model.loop(model.encode(one, ctx), ctx, Plan(3))
    with torch.autocast("cpu", torch.bfloat16):
        verbs = apart(model)
        got = model.loop(verbs.encode(one, other), other, Plan(3), take=verbs.step)
    torch.testing.assert_close(got.h, want.h, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_a_step_that_nobody_took_is_taken_by_the_plain_verb():
    """It makes room in the cache, and what was there before is seen in it."""
    model = lively(tiny.MODELS["mythos-gqa-act"])
    tokens, cache = torch.tensor([PROMPT]), KVCache(1, 8)
    model.features(tokens, Plan(2), cache=cache)
    verbs, ctx = apart(model), Context.counting(tokens[:, :1], 5, cache)
    model.loop(verbs.encode(tokens[:, :1], ctx), ctx, Plan(4), take=verbs.step)
    assert {step for stage, _, step, _ in cache._held if stage == "loop"} == {0, 1, 2, 3}


@torch.inference_mode()
def test_a_full_cache_says_so():
    model, cache = lively(tiny.MODELS["mythos-mla"]), KVCache(1, len(PROMPT))
    model.features(torch.tensor([PROMPT]), cache=cache)
    one = torch.tensor([[1]])
    with pytest.raises(ValueError, match="cache holds 5 tokens"):
        apart(model).encode(one, Context.counting(one, len(PROMPT), cache))


@pytest.mark.parametrize("policy", [Shared(), Ring(slots=2)])
def test_steps_may_share_a_slot(policy):
    model = lively(tiny.MODELS["mythos-gqa-act"])
    given = {"max_new_tokens": 6, "loops": 4, "policy": policy}
    got = generate(model, [PROMPT], **given)
    assert got == generate(listened_to(model), [PROMPT], **given)


@torch.inference_mode()
def test_training_takes_the_plain_ones(monkeypatch):
    model, heard = lively(tiny.MODELS["mythos-gqa-act"]).train(), []
    plain = model.decode
    monkeypatch.setattr(model, "decode", lambda *given: heard.append(1) or plain(*given))
    list(taken(model, apart(model), 3))
    assert len(heard) == 1 + len(NEXT)  # and the prompt


def test_weights_of_another_precision_stay_whole():
    model = lively(tiny.MODELS["mythos-gqa-act"])
    assert apart(model.double()) is model
    assert apart(model.bfloat16()) is model
