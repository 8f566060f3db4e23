"""Huginn against the released code: states, gradients, caches, exits and generation."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from open_mythos.hub import huginn
from open_mythos.infer.generate import generate
from open_mythos.infer.speculate import speculate
from open_mythos.loop.exit import (
    EntropyChange,
    Exit,
    PeakChange,
    ReadoutChange,
    SameToken,
    StateChange,
    StateTurn,
    Steps,
)
from open_mythos.loop.schedule import LogNormalPoisson, Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.cache import (
    Anchor,
    Deepest,
    Folded,
    KVCache,
    LastExited,
    PerLoop,
    Policy,
    Ring,
    Shared,
    Skip,
)
from open_mythos.nn.context import Context
from open_mythos.presets.huginn import Size, assemble
from tests.golden.folder import Golden, check_gradients, check_start, close, golden

CACHES: dict[str, Policy] = {
    "full": PerLoop(),
    "compress-s4": Shared(),
    "compress-s8": Ring(slots=2),
    "compress-r2": Folded(layers=4, share=2),
    "compress-anchor": Anchor(steps=8),
}
LOOKUPS: dict[str, Policy] = {
    "full": Skip(),
    "skip": Skip(),
    "latest-m4": LastExited(),
    "available-m4": LastExited(),
    "always-last-m4": Deepest(),
    "latest-m4-compress-s4": Shared(),
}
RULES: dict[str, Exit] = {
    "kl": ReadoutChange(threshold=0.005, together=True),
    "minp_kl": PeakChange(threshold=0.0001, together=True),
    "entropy_diff": EntropyChange(threshold=0.005, together=True),
    "latent_diff": StateChange(threshold=0.1, together=True),
    "cosine": StateTurn(threshold=0.005, together=True),
    "argmax_stability": SameToken(times=3, together=True),
    "none": Steps(steps=16),
}


@pytest.fixture(scope="module")
def set_() -> Golden:
    return golden("huginn")


@pytest.fixture
def own() -> Golden:
    """For tests that change the model."""
    return golden("huginn")


def test_the_preset_is_that_model(set_: Golden) -> None:
    """So that what is shown here of the checkpoint's config holds for the preset, at any size."""
    size = Size(dim=48, heads=3, width=128, prelude=2, loop=4, coda=2)
    assert assemble(size, vocab=128, context=48, mean=8, grad=3) == set_.lm.config


@pytest.mark.parametrize("start", ["zero", "rand"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_logits_and_latents(set_: Golden, start: str, steps: int) -> None:
    data, lm, seen = set_.data, set_.lm, []
    h0 = data["start.rand"] if start == "rand" else None
    logits = lm(data["input_ids"], Plan(steps), start=h0, watch=lambda n, state: seen.append(state))
    close(logits, data[f"logits.{start}.T{steps}"])
    close(lm.norm(seen[-1].h), data[f"latents.{start}.T{steps}"])
    close(seen[-1].e, data["e"])


def test_states(set_: Golden) -> None:
    want, seen = set_.data["states.rand"], []
    set_.lm.features(
        set_.data["input_ids"], Plan(8), start=want[0], watch=lambda n, state: seen.append(state.h)
    )
    close(torch.stack(seen), want[1:])


def test_training(own: Golden) -> None:
    data, lm = own.data, own.lm.train()
    frozen, live = own.meta["train_steps"]
    logits = lm(data["input_ids"], Plan(frozen + live, live), start=data["start.rand"])
    loss = F.cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), ignore_index=-100)
    loss.backward()
    close(logits, data["train.logits"])
    close(loss, data["train.loss"])
    check_gradients(lm, huginn, data, own.meta["grad_norms"])


def test_depths_are_drawn_as_theirs(set_: Golden) -> None:
    schedule = set_.lm.config.loop.schedule
    assert isinstance(schedule, LogNormalPoisson)
    published = schedule.replace(mean=32.0, grad=8)
    for seed, want in enumerate(set_.data["sampler.mean32_bwd8"].tolist()):
        frozen, live = published.draw(torch.Generator().manual_seed(seed), 1).split(1)
        assert [*frozen, *live] == want


def test_fresh_weights(own: Golden) -> None:
    mean, spread = ({name: pair[i] for name, pair in own.meta["init_mean_std"].items()} for i in (0, 1))
    check_start(own.lm, huginn, spread, mean)


@pytest.mark.parametrize("policy", CACHES)
def test_cached_logits(set_: Golden, policy: str) -> None:
    tokens = set_.data["input_ids"][:1]
    cache = KVCache(1, 11, CACHES[policy])
    parts = [tokens[:, :5], *tokens[:, 5:].split(1, dim=1)]
    logits = [logits for _, logits, _ in walk(set_.lm, parts, cache, [8] * len(parts))]
    close(torch.cat(logits, 1), set_.data[f"cached_logits.{policy}"])


@pytest.mark.parametrize("policy", LOOKUPS)
def test_tokens_of_different_depths(set_: Golden, policy: str) -> None:
    tokens = set_.data["input_ids"][:1]
    depths = set_.data["varied.depths"].tolist()
    cache = KVCache(1, 11, LOOKUPS[policy])
    logits = [logits for _, logits, _ in walk(set_.lm, tokens.split(1, dim=1), cache, depths)]
    close(torch.cat(logits, 1), set_.data[f"varied.logits.{policy}"])


@pytest.mark.parametrize("rule", RULES)
def test_adaptive_exits(set_: Golden, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = set_.data[f"adaptive.{rule}.tokens"].tolist()
    steps = set_.data[f"adaptive.{rule}.steps"].tolist()
    cache, taken = KVCache(1, len(want), LastExited()), []
    tokens, measured = set_.data["input_ids"][:1], measurements(RULES[rule], monkeypatch)
    while tokens.shape[1] < len(want):
        fresh = tokens[:, -1:] if taken else tokens
        held = tokens.shape[1] - fresh.shape[1]
        depth, logits, _ = next(walk(set_.lm, [fresh], cache, [16], RULES[rule], held))
        taken.append(depth)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert taken == steps
    assert tokens[0].tolist() == want
    if rule != "none":  # which measures nothing
        told = set_.meta["adaptive"][rule.replace("_", "-")]["exit_values"]
        asked = [value for values in told for value in values[RULES[rule].least - 1 :]]
        assert measured == pytest.approx(asked, abs=1e-5)


def measurements(rule: Exit, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the rule measures from now on, of the last token."""
    found: list[float] = []
    if isinstance(rule, Steps):
        return found
    measure = type(rule).measure

    def measured(self: Exit, *given: object) -> Tensor:
        value = measure(self, *given)
        found.append(float(value[0, -1]))
        return value

    monkeypatch.setattr(type(rule), "measure", measured)
    return found


@pytest.mark.parametrize(
    ("name", "steps", "policy"),
    [("T8", 8, PerLoop()), ("hf_T8", 8, PerLoop()), ("T3", 3, PerLoop()), ("T8_s4", 8, Shared())],
)
def test_generation(set_: Golden, name: str, steps: int, policy: Policy) -> None:
    want, prompt = set_.data[f"gen.{name}"].tolist(), set_.data["input_ids"][0].tolist()
    count = len(want) - len(prompt)
    got = generate(set_.lm, [prompt], max_new_tokens=count, loops=steps, policy=policy)[0]
    assert prompt + got.tokens == want


def test_self_speculative_decoding(set_: Golden) -> None:
    want, prompt = set_.data["gen.spec_3to8"].tolist(), set_.data["input_ids"][0].tolist()
    got = speculate(set_.lm, prompt, max_new_tokens=len(want) - len(prompt), loops=8, draft_loops=3)
    assert prompt + got.tokens == want


def test_warm_start(set_: Golden) -> None:
    """Each token starts where the one before it ended, after the norm that follows the loop."""
    want, prompt = set_.data["gen.T8_warmstart"].tolist(), set_.data["input_ids"][0].tolist()
    got = generate(set_.lm, [prompt], max_new_tokens=len(want) - len(prompt), loops=8, warm=True)[0]
    assert prompt + got.tokens == want


def walk(
    lm: LoopedLM,
    parts: list[Tensor] | tuple[Tensor, ...],
    cache: KVCache,
    depths: list[int],
    rule: Exit | None = None,
    held: int = 0,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Steps taken, logits and states after each part of a text."""
    for part, depth in zip(parts, depths, strict=True):
        with torch.no_grad():
            ctx = Context.counting(part, held, cache)
            judge = None if rule is None else (rule, lm.read)
            state = lm.loop(lm.encode(part, ctx), ctx, Plan(depth), judge=judge)
            yield int(state.taken[0, -1]), lm.read(state, ctx), state.h
        held += part.shape[1]


def test_what_we_export_is_what_was_published(set_: Golden, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from open_mythos.hub.load import export, from_pretrained

    export(set_.lm, tmp_path, "huginn")
    want, got = (load_file(folder / "model.safetensors") for folder in (set_.folder, tmp_path))
    assert want.keys() == got.keys()
    for key in want:
        torch.testing.assert_close(
            got[key], want[key], rtol=0, atol=1e-6 if key == "freqs_cis" else 0, msg=key
        )
    assert from_pretrained(tmp_path).config == set_.lm.config
