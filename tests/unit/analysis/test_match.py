"""Matched baselines: equal in what was asked for, counted independently."""

import json
from pathlib import Path

import pytest
import torch

from open_mythos.analysis.match import cost, match
from open_mythos.cli.match import main
from open_mythos.model import Model
from open_mythos.nn.moe import MoE
from open_mythos.presets.baseline import Shape, llama
from open_mythos.presets.parcae import parcae, parcae_gpt
from open_mythos.presets.saunshi import Size, saunshi

LOOPED = saunshi(Size(vocab=64, dim=32, width=96, heads=4, k=2, loops=3, untied=1, context=64))
FIXED = llama(Shape(vocab=64, dim=32, layers=8, heads=4, kv_heads=2, width=96, context=64))


def test_cost_is_what_the_model_does() -> None:
    """By hand: 8 unrolled layers of 12 + 2 x 96 / 32 products, attention over 64 columns, the head."""
    linear = 8 * (4 * 32 * 32 + 2 * 32 * 96) + 32 * 64
    attention = 8 * 2 * 64 * 32
    assert cost(LOOPED).flops == 2 * (linear + attention)
    assert cost(LOOPED).training == 3 * cost(LOOPED).flops
    assert cost(LOOPED).memory == 8 * 2 * 32 * 2
    assert cost(LOOPED).params == sum(p.numel() for p in LOOPED.build().parameters())


def test_frozen_steps_are_not_paid_for_twice() -> None:
    assert LOOPED.loop is not None
    truncated = LOOPED.override("loop.schedule.grad=1")
    turn = (cost(LOOPED).flops - cost(LOOPED.override("loop.schedule.steps=2")).flops) * 2
    assert cost(LOOPED).training - cost(truncated).training == pytest.approx(2 * turn)


@pytest.mark.parametrize("on", [("params",), ("flops",), ("training",), ("memory",), ("params", "memory")])
@pytest.mark.parametrize("model", [LOOPED, FIXED], ids=["looped", "fixed"])
def test_the_match_is_equal_in_what_was_asked_for(model: object, on: tuple[str, ...]) -> None:
    try:
        found = match(model, on, loops=2)  # type: ignore[arg-type]
    except ValueError:
        assert on == ("params", "memory")
        return
    assert (found.model.loop is None) != (model.loop is None)  # type: ignore[attr-defined]
    ours, theirs = cost(found.model), cost(model)  # type: ignore[arg-type]
    assert all(abs(getattr(ours, what) / getattr(theirs, what) - 1) <= 0.02 for what in on)
    assert found.model.build()(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 64)


@pytest.mark.parametrize("layers", [5, 6, 7, 12])
def test_a_loop_remembers_as_much_whatever_its_turns(layers: int) -> None:
    """Layers that are no multiple of the loop's turns go before and after it, one each at least."""
    found = match(FIXED.replace(prelude=layers * FIXED.prelude[:1]), ("memory",), loops=3).model
    assert found.loop is not None
    assert len(found.prelude) + 3 * len(found.loop.layers) + len(found.coda) == layers


def test_few_layers_loop_without_ends_and_fewer_not_at_all() -> None:
    found = match(FIXED.replace(prelude=2 * FIXED.prelude[:1]), ("memory",), loops=2).model
    assert found.loop is not None
    assert (found.prelude, len(found.loop.layers), found.coda) == ((), 1, ())
    with pytest.raises(ValueError, match=r"\+100% in memory: a loop of 2 uses its layers 2 times; try fewer"):
        match(FIXED.replace(prelude=FIXED.prelude[:1]), ("memory",), loops=2)


def test_the_twin_in_flops_is_the_unrolled_model() -> None:
    """Of other ends than its loop, layer by layer; and it remembers as much."""
    assert LOOPED.loop is not None
    thin = LOOPED.prelude[0].replace(ffn=LOOPED.prelude[0].ffn.replace(width=41))
    model = LOOPED.replace(prelude=(thin,), coda=(thin,))
    for on in (("flops",), ("flops", "memory")):
        assert match(model, on).model.prelude == (thin, *3 * LOOPED.loop.layers, thin)


def test_where_experts_rest_everything_can_be_equal() -> None:
    """Fewer experts in each of more layers: the same parameters, FLOPs and cache."""
    assert LOOPED.loop is not None
    ffn = MoE(experts=64, chosen=4, width=100, shared=0)
    layer = LOOPED.prelude[0].replace(ffn=ffn)
    loop = LOOPED.loop.replace(layers=2 * (layer,))
    model = LOOPED.replace(dim=128, prelude=(layer,), loop=loop, coda=(layer,))
    found = match(model, ("params", "flops", "memory"))
    assert found.cost == cost(found.model)
    assert found.cost.off(cost(model), ("params", "flops", "memory")) <= 0.02
    assert found.experts is not None
    assert 4 <= found.experts < 64


def test_the_twin_of_parcae_is_the_papers_baseline() -> None:
    """Layer by layer: every second one has a table of value embeddings."""
    assert match(parcae("140m"), ("params",)).model == parcae_gpt("140m")


@pytest.mark.parametrize("on", ["params", "flops"])
def test_layers_of_several_kinds_keep_their_order(on: str) -> None:
    """A thin prelude and coda around a wide loop, and attention of two kinds."""
    assert LOOPED.loop is not None
    inner = LOOPED.loop.layers[0]
    thin = inner.replace(ffn=inner.ffn.replace(width=41))
    lean = inner.replace(mixer=inner.mixer.replace(kv_heads=2))
    model = LOOPED.replace(prelude=(thin,), loop=LOOPED.loop.replace(layers=(lean, inner)), coda=(thin,))
    found = match(model, (on,))
    kinds = [layer.mixer.kv_heads or layer.mixer.heads for layer in found.model.prelude]
    widths = [layer.ffn.width for layer in found.model.prelude]
    assert {2, 4} == set(kinds)
    assert widths[0] == widths[-1] == round(found.width * 41 / 96)
    assert max(widths) == found.width
    assert cost(found.model).off(cost(model), [on]) <= 0.02
    assert len(widths) == found.layers


def test_what_cannot_be_equal_is_said() -> None:
    with pytest.raises(
        ValueError, match=r"within 2% in params and flops; the nearest .* works, and remembers, once"
    ):
        match(LOOPED, ("params", "flops"))


def test_unknown_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match="params, flops, training, memory; got speed"):
        match(LOOPED, ("speed",))


def test_the_command_writes_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LOOPED.save(tmp_path / "mine.json")
    assert main([str(tmp_path / "mine.json"), "--on", "flops", "--out", str(tmp_path / "twin.json")]) == 0
    assert json.loads((tmp_path / "twin.json").read_text())["loop"] is None
    assert "FLOPs per token" in capsys.readouterr().out


def test_the_command_gives_a_model_for_each_where_none_is_equal_in_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "looped.json", tmp_path / "twin.json"
    LOOPED.save(config)
    assert main([str(config), "--on", "params,flops", "--out", str(out)]) == 0
    assert "per parameter" in capsys.readouterr().out
    for what in ("params", "flops"):
        twin = Model.load(tmp_path / f"twin-{what}.json")
        assert cost(twin).off(cost(LOOPED), (what,)) <= 0.02
    with pytest.raises(ValueError, match="params, flops"):
        main([str(config), "--on", "params,beauty"])
