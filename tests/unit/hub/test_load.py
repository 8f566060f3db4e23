"""Checkpoints come back as they went, in one file or many, and what does not fit is named."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_mythos.cli.named import trained
from open_mythos.hub import load, parcae, weights
from open_mythos.hub.load import Pretrained, described, export, from_pretrained, save_pretrained
from open_mythos.loop.schedule import Fixed, LogNormalPoisson, Poisson
from open_mythos.model import LoopedLM
from open_mythos.presets.chen import CLASSIFIERS
from open_mythos.presets.huginn import Size, assemble
from tests.tiny import MODELS

TOKENS = torch.arange(12).view(2, 6)


def same(a: Pretrained, b: Pretrained) -> None:
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def huginn() -> LoopedLM:
    return assemble(Size(32, 4, 48, 1, 2, 1), vocab=61, context=64, mean=4, grad=2).build()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    export(huginn(), tmp_path, "huginn")
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_every_model_survives_our_format(name: str, tmp_path: Path) -> None:
    lm = MODELS[name].build()
    save_pretrained(lm, tmp_path)
    again = from_pretrained(tmp_path)
    same(lm, again)
    assert torch.equal(lm.eval()(TOKENS), again(TOKENS))
    assert not again.training
    if lm.config.tied:
        assert again.head.weight is again.embed.weight
        assert "head.weight" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["chen-graph", "chen-logic"])
def test_a_classifier_survives_our_format(name: str, tmp_path: Path) -> None:
    model = CLASSIFIERS[name].build().eval()
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    pair = {"pair": torch.tensor([[0, 3], [5, 1]])} if name == "chen-graph" else {}
    same(model, again)
    assert torch.equal(model(TOKENS % 9, 2, **pair), again(TOKENS % 9, 2, **pair))
    assert again.core.head.weight is again.core.embed.weight
    assert "core.head.weight" not in load_file(tmp_path / "model.safetensors")
    assert described(tmp_path) == model.config.core
    with pytest.raises(ValueError, match="holds a classifier"):
        trained(tmp_path)
    with pytest.raises(ValueError, match="llama's code cannot run a ChenClassifier"):
        export(model, tmp_path, "llama")


def test_shards(tmp_path: Path) -> None:
    lm = MODELS["mythos-gqa-act"].build()
    weights.write(tmp_path, lm.state_dict().items(), limit=20_000)
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not list(tmp_path.glob("*.new"))
    found = weights.Weights(tmp_path)
    for name, tensor in lm.state_dict().items():
        assert torch.equal(found.read(name), tensor)
    shards[0].unlink()
    with pytest.raises(ValueError, match="lacks model-0000"):
        [weights.Weights(tmp_path).read(name) for name in lm.state_dict()]


def test_pytorchs_own_format_and_a_head_without_its_embedding(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    want = from_pretrained(saved)
    del tensors["transformer.wte.weight"]  # it is the head's
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    same(from_pretrained(saved), want)
    export(want, saved / "both", "huginn", torch_file=True)
    assert torch.load(saved / "both" / "pytorch_model.bin", weights_only=True).keys() >= tensors.keys()


def test_a_head_that_is_not_the_embedding_is_not_dropped(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight and transformer\.wte\.weight differ"):
        from_pretrained(saved)


def test_code_in_a_pickle_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": subprocess.Popen}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="plain tensors"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    ("held", "complaint"),
    [
        ([torch.zeros(2)], "holds a list, not named tensors"),
        ({"model": {"a": torch.zeros(2)}, "epoch": 3}, "'model' is a dict"),
        ({"a": torch.zeros(2), 3: torch.zeros(2)}, "3 is a Tensor"),
    ],
)
def test_a_file_of_more_than_named_tensors_is_refused(held: object, complaint: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=complaint) as told:
        weights.Weights(tmp_path)
    assert "torch.save(model.state_dict(), path)" in str(told.value)


def test_one_file_is_read_by_its_own_name(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    torch.save(tensors, saved / "any.pt")
    for found in weights.Weights(saved / "any.pt"), weights.Weights(saved / "model.safetensors"):
        assert set(found.names) == set(tensors)
        assert torch.equal(found.read("transformer.adapter.weight"), tensors["transformer.adapter.weight"])


def test_type_and_place(saved: Path) -> None:
    lm = from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert from_pretrained(saved).embed.weight.dtype == torch.float32
    assert from_pretrained(saved, device="meta").embed.weight.is_meta


def test_missing_and_unknown_names_are_told_with_the_closest(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["transformer.adaptor.weight"] = tensors.pop("transformer.adapter.weight")
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks transformer.adapter.weight \(closest.*adaptor.*unknown"):
        from_pretrained(saved)


def test_a_tensor_of_another_size_is_told(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    for shape in (3, 4), (64, 32):  # the second has the right count
        tensors["transformer.adapter.weight"] = torch.zeros(shape)
        save_file(tensors, saved / "model.safetensors")
        with pytest.raises(ValueError, match=r"transformer.adapter.weight should have the shape \(32, 64\)"):
            from_pretrained(saved)


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ("{", "not an index of shards"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "not a file beside it"),
        ('{"weight_map": {"transformer.adapter.weight": "one.safetensors"}}', "one.safetensors lacks"),
    ],
)
def test_an_index_that_cannot_be_followed_is_told(saved: Path, index: str, complaint: str) -> None:
    save_file({"another": torch.zeros(3)}, saved / "one.safetensors")
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=complaint):
        weights.Weights(saved).read("transformer.adapter.weight")


def test_settings_that_we_do_not_have_are_told(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"nonlin_name": "GELU"}))
    with pytest.raises(ValueError, match="nonlin_name='GELU'; supported is 'SiLU'"):
        from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "n_heads"}))
    with pytest.raises(ValueError, match=r"config\.json lacks 'n_heads', which a huginn model needs"):
        from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"no family known here .*'mamba'"):
        from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    ("scheme", "method", "schedule"),
    [
        ("poisson-truncated-full", "per-sequence", Poisson(mean=3.0, grad=2)),
        ("poisson-truncated-full", "per-batch", Poisson(mean=3.0, grad=2, per="batch", on_top=True)),
        ("poisson-full", "per-sequence", Poisson(mean=3.0)),
        ("poisson-lognormal-filling", "per-batch", LogNormalPoisson(mean=3.0, grad=2)),
        ("fixed", "per-batch", Fixed(steps=3, grad=2)),
    ],
)
def test_parcaes_ways_to_draw_depths(scheme: str, method: str, schedule: object) -> None:
    config = parcae.to_config(MODELS["parcae"])
    given = config | {"sampling_scheme": scheme, "recurrent_iteration_method": method}
    model = parcae.to_model(given)
    assert model.loop is not None
    assert model.loop.schedule == schedule
    assert parcae.to_config(model)["sampling_scheme"] == scheme


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampling_scheme", "poisson-fill"),
        ("sampling_scheme", "poisson-unbounded"),
        ("sampling_scheme", "poisson-truncated-full-curriculum-1000"),
        ("recurrent_iteration_method", "per-token"),
        ("init_strategy", "takase-scaled"),  # which scales the logits
    ],
)
def test_what_parcae_may_do_and_we_do_not_is_told(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='{value}'; supported is"):
        parcae.to_model(parcae.to_config(MODELS["parcae"]) | {name: value})


def test_a_head_of_its_own_lies_on_its_side_without_a_loop(tmp_path: Path) -> None:
    """As in the released code: logits = features @ lm_head, and with a loop features @ lm_head.T."""
    for looped, tables in ((True, MODELS["parcae"]), (False, MODELS["parcae"].replace(loop=None))):
        stripped = tables if looped else tables.replace(enter=None, leave=None, coda=())
        lm = stripped.replace(tied=False).build().eval()
        export(lm, tmp_path, "parcae")
        head = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
        theirs = lm.features(TOKENS) @ (head.mT if looped else head)
        torch.testing.assert_close(theirs, lm(TOKENS))
        same(from_pretrained(tmp_path).eval(), lm)


def test_a_model_that_their_code_cannot_run_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sandwich"):
        export(MODELS["parcae"].build(), tmp_path, "huginn")
    changed = assemble(Size(32, 4, 48, 1, 2, 1), vocab=61, context=64, mean=4, grad=2).replace(
        embed_scale=2.0
    )
    with pytest.raises(ValueError, match=r"model\.embed_scale is 2\.0"):
        export(changed.build(), tmp_path, "huginn")
    with pytest.raises(ValueError, match="no family 'raven'; there are open_mythos"):
        export(huginn(), tmp_path, "raven")


def test_a_name_that_is_neither_folder_nor_on_the_hub(tmp_path: Path) -> None:
    for name in ("nowhere", "./no/where", tmp_path / "nothing"):
        with pytest.raises(ValueError, match="no folder"):
            from_pretrained(name)


def test_without_the_hubs_client_a_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install"):
        from_pretrained("owner/name")


def test_offline_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("open_mythos.data.network.hub_in_reach", lambda: False)
    with pytest.raises(ValueError, match="cannot be reached; go online, or name a folder"):
        from_pretrained("owner/name-that-nobody-has-cached")


def test_the_model_is_filled_one_tensor_at_a_time(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_out: list[weakref.ref[torch.Tensor]] = []
    read = weights.Weights.read

    def watched(self: weights.Weights, name: str) -> torch.Tensor:
        assert sum(ref() is not None for ref in handed_out) <= 1
        handed_out.append(weakref.ref(tensor := read(self, name)))
        return tensor

    monkeypatch.setattr(load.Weights, "read", watched)
    from_pretrained(saved)
    assert len(handed_out) > 20
