"""Parcae and its GPT baseline against the released code."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from open_mythos.hub import parcae
from open_mythos.loop.schedule import Plan, Poisson, seeded
from tests.golden.folder import Golden, check_gradients, check_start, close, golden, gradients


@pytest.fixture(scope="module")
def looped() -> Golden:
    return golden("parcae/diagonal")


@pytest.fixture
def own() -> Golden:
    """For tests that change the model."""
    return golden("parcae/diagonal")


@pytest.mark.parametrize("start", ["zero", "rand"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_logits(looped: Golden, start: str, steps: int) -> None:
    h0 = looped.data["start.rand"] if start == "rand" else None
    logits = looped.lm(looped.data["input_ids"], Plan(steps), start=h0)
    close(logits, looped.data[f"logits.{start}.T{steps}"])


@pytest.mark.parametrize("start", ["zero", "rand"])
def test_states(looped: Golden, start: str) -> None:
    want, seen = looped.data[f"states.{start}"], []
    looped.lm.features(
        looped.data["input_ids"], Plan(8), start=want[0], watch=lambda n, state: seen.append((n, state))
    )
    assert [n for n, _ in seen] == list(range(8))
    for n, state in seen:
        close(state.h, want[n + 1])
        close(state.e, looped.data["e"])


def test_injection(looped: Golden) -> None:
    data, inject = looped.data, looped.lm.loop.inject
    close(inject(data["inject.x"], data["inject.e"]), data["inject.y"])
    close(F.softplus(inject.raw_dt), data["inject.dt"])
    close(inject.decay(), data["inject.decay"])


def test_training_with_a_depth_per_sequence(own: Golden) -> None:
    data, lm = own.data, own.lm.train()
    plan = Plan(tuple(data["train.depth_total"].tolist()), tuple(data["train.depth_grad"].tolist()))
    assert plan.split(4)[0] == tuple(data["train.depth_nograd"].tolist())
    logits = lm(data["input_ids"], plan, start=data["start.rand"])
    loss = F.cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), ignore_index=-100)
    loss.backward()
    close(logits, data["train.logits"])
    close(loss, data["train.loss"])
    check_gradients(lm, parcae, data, own.meta["grad_norms"])


def test_depths_are_drawn_as_theirs(looped: Golden) -> None:
    schedule = looped.lm.config.loop.schedule
    assert isinstance(schedule, Poisson)
    for step, want in enumerate(looped.data["sampler.per_sequence"].tolist()):
        assert schedule.draw(seeded(step), 8).split(8) == tuple(map(tuple, want))
    alike = schedule.replace(per="batch", on_top=True)
    for step, (frozen, live) in enumerate(looped.data["sampler.per_batch"].tolist()):
        assert alike.draw(seeded(step), 8).split(8) == (8 * (frozen,), 8 * (live,))


def test_fresh_weights(own: Golden) -> None:
    check_start(own.lm, parcae, own.meta["init_std"], own.meta["init_mean"])
    for ours, theirs in (("log_a", "A_log"), ("raw_dt", "dt_bias")):
        close(getattr(own.lm.loop.inject, ours), own.data[f"init.transformer.adapter.{theirs}"])


def test_value_embeddings_are_where_theirs_are(looped: Golden) -> None:
    names = [name for x in parcae.links(looped.lm.config) for name in x.theirs]
    assert {f"value_embeds.{i}.weight" for i in looped.meta["ve_tables"]} < set(names)
    assert {f"{gate}.weight" for gate in looped.meta["ve_gates"]} < set(names)


def test_baseline() -> None:
    data, lm = (found := golden("parcae/gpt")).data, found.lm.train()
    logits = lm(data["input_ids"])
    loss = F.cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), ignore_index=-100)
    loss.backward()
    close(logits, data["logits"])
    close(loss, data["train.loss"])
    got = gradients(lm, parcae)
    close(got["transformer.wte.weight"], data["train.grad.wte"])
    close(got["transformer.ln_f.weight"], data["train.grad.ln_f"])


@pytest.mark.parametrize("name", ["parcae/diagonal", "parcae/gpt"])
def test_what_we_export_is_what_was_published(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from open_mythos.hub.load import export, from_pretrained

    found = golden(name)
    export(found.lm, tmp_path, "parcae")
    want, got = (load_file(folder / "model.safetensors") for folder in (found.folder, tmp_path))
    assert want.keys() == got.keys()
    for key in want:
        torch.testing.assert_close(
            got[key], want[key], rtol=0, atol=1e-6 if key == "freqs_cis" else 0, msg=key
        )
    again = from_pretrained(tmp_path)
    assert again.config == found.lm.config
