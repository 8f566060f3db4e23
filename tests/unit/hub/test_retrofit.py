"""Retrofitted models: their tensors and config.json, written by hand, give the logits of their equations."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_mythos.hub import huginn, retrofit
from open_mythos.hub.load import described, export, from_pretrained, recognise
from open_mythos.loop.start import Noise, Zeros
from open_mythos.model import Model
from open_mythos.presets import preset
from tests.by_hand import attention, causal, close, linear, rms_norm, silu
from tests.tiny import MODELS

DIM, HEADS, GROUPS, WIDTH, VOCAB = 32, 4, 2, 48, 61
CONFIG: dict[str, Any] = {
    "architectures": ["RavenForCausalLM"],
    "model_type": "huginn_raven",
    "bias": False,
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "state_init": "like-init",
    "injection_type": "linear",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "init_values": {"std": 0.0087, "out_proj": 0.0005, "embedding": 0.0087, "embed_scale": 1.0},
    "sampling_scheme": "poisson-lognormal-filling",
    "n_embd": DIM,
    "n_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM // HEADS,
    "intermediate_size": WIDTH,
    "n_layers": 6,
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 3,
    "n_layers_in_coda": 2,
    "vocab_size": VOCAB,
    "padded_vocab_size": VOCAB,
    "block_size": 4096,
    "max_position_embeddings": 64,
    "mean_recurrence": 3,
    "mean_backprop_depth": 8,
    "effective_expected_depth": 132,
    "norm_eps": 1e-5,
    "qk_bias": False,
    "rope_base": 500000.0,  # left over from Huginn, and read by nobody
    "rope_theta": 1000.0,
    "test_time_noise": 0,
    "test_time_noise_type": "fixed",
    "tie_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCALED = {"std": 0.02, "out_proj": 0.001, "embedding": 0.02, "embed_scale": 3.0}
KINDS: dict[str, dict[str, Any]] = {
    "tinyllama": {},
    "llama-3.2": {"rope_scaling": LLAMA3},
    "olmo-2": {"norm_eps": 1e-6, "rope_theta": 500000.0},
    "olmo-2 with wide heads": {"head_dim": 12},
    "tied and scaled": {"tie_embeddings": True, "init_values": SCALED},
}
TOKENS = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
START = torch.randn(2, 20, DIM, generator=torch.Generator().manual_seed(2))


def theirs(kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config.json and the tensors beside it, as their code saves them."""
    config = CONFIG | KINDS[kind]
    heads, groups = HEADS * config["head_dim"], GROUPS * config["head_dim"]
    layer = {
        "norm_1": (DIM,),
        "norm_2": (DIM,),
        "attn.Wqkv": (heads + 2 * groups, DIM),
        "attn.proj": (DIM, heads),
        "mlp.fc": (2 * WIDTH, DIM),
        "mlp.proj": (DIM, WIDTH),
    }
    if kind.startswith("olmo"):
        layer |= {"attn.q_norm": (heads,), "attn.k_norm": (groups,)}
    shapes = {"wte": (VOCAB, DIM), "adapter": (DIM, 2 * DIM), "ln_f": (DIM,)}
    for stage, count in (("prelude", 1), ("core_block", 3), ("coda", 2)):
        shapes |= {f"{stage}.{i}.{name}": shape for i in range(count) for name, shape in layer.items()}
    shapes = {f"transformer.{name}.weight": shape for name, shape in shapes.items()}
    if not config["tie_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, DIM)
    rng = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return config, {k: 1 + 0.3 * t if t.ndim == 1 else 0.2 * t for k, t in drawn.items()}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config, tensors = theirs(getattr(request, "param", "tinyllama"))
    return saved(tmp_path, config, tensors)


def saved(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def by_their_equations(kind: str, steps: int) -> Tensor:
    """In float64, from their names."""
    config, tensors = theirs(kind)
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}
    scale = config["init_values"]["embed_scale"]
    x = layer(w["wte.weight"][TOKENS] * scale, w, "prelude.0", config)
    h = START.double()
    for _ in range(steps):
        h = linear(torch.cat([h, x], -1), w, "adapter")
        for i in range(3):
            h = layer(h, w, f"core_block.{i}", config)
    for i in range(2):
        h = layer(h, w, f"coda.{i}", config)
    head = w["wte.weight"] if config["tie_embeddings"] else w["lm_head.weight"]
    return rms_norm(h, w, "ln_f", config["norm_eps"]) @ head.T


def layer(x: Tensor, w: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    eps, behind = config["norm_eps"], f"{name}.attn.q_norm.weight" in w  # OLMo 2 norms what a half gives

    def half(f: Any, norm: str) -> Tensor:
        return rms_norm(f(x), w, norm, eps) if behind else f(rms_norm(x, w, norm, eps))

    x = x + half(lambda n: mixed(n, w, f"{name}.attn", config), f"{name}.norm_1")
    return x + half(lambda n: fed(n, w, f"{name}.mlp"), f"{name}.norm_2")


def fed(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    gate, up = linear(x, w, f"{name}.fc").chunk(2, -1)
    return linear(silu(gate) * up, w, f"{name}.proj")


def mixed(x: Tensor, w: dict[str, Tensor], name: str, config: dict[str, Any]) -> Tensor:
    width = config["head_dim"]
    q, k, v = linear(x, w, f"{name}.Wqkv").split([HEADS * width, GROUPS * width, GROUPS * width], -1)
    if f"{name}.q_norm.weight" in w:
        q = rms_norm(q, w, f"{name}.q_norm", config["norm_eps"])
        k = rms_norm(k, w, f"{name}.k_norm", config["norm_eps"])
    q, k = (torch.cat([turned(head, config) for head in t.split(width, -1)], -1) for t in (q, k))
    seen = causal(torch.ones(TOKENS.shape, dtype=torch.bool))
    return linear(attention(q, k, v, HEADS, GROUPS, seen), w, f"{name}.proj")


def turned(x: Tensor, config: dict[str, Any]) -> Tensor:
    """One head by its positions, half against half, the slow channels as Llama 3.2 has them."""
    half, out = x.shape[-1] // 2, x.clone()
    for i in range(half):
        rate = config["rope_theta"] ** (-i / half)
        if "rope_scaling" in config:
            wavelength = 2 * math.pi / rate
            if wavelength > 16 / 1:
                rate = rate / 32
            elif wavelength > 16 / 4:
                blend = (16 / wavelength - 1) / (4 - 1)
                rate = (1 - blend) * rate / 32 + blend * rate
        angle = torch.arange(x.shape[1]).double() * rate
        a, b = x[..., i], x[..., i + half]
        out[..., i], out[..., i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("folder", "kind"), [(kind, kind) for kind in KINDS], indirect=["folder"], ids=KINDS)
def test_logits_are_those_of_their_equations(folder: Path, kind: str, steps: int) -> None:
    with torch.no_grad():
        close(from_pretrained(folder)(TOKENS, steps, start=START), by_their_equations(kind, steps))


@pytest.mark.parametrize(("folder", "kind"), [(kind, kind) for kind in KINDS], indirect=["folder"], ids=KINDS)
def test_a_folder_goes_back_as_it_came(folder: Path, kind: str) -> None:
    lm = from_pretrained(folder)
    export(lm, folder / "back", "retrofit")
    config, tensors = theirs(kind)
    written = load_file(folder / "back" / "model.safetensors")
    assert written.keys() - tensors.keys() <= {"lm_head.weight"}  # where tied, beside the embedding
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor), name
    told = json.loads((folder / "back" / "config.json").read_text())
    free = {"block_size", "rope_base", "effective_expected_depth", "init_values", "mean_backprop_depth"}
    for name in config.keys() - free:
        assert told[name] == config[name], name
    for name in ("std", "embed_scale"):
        assert told["init_values"][name] == config["init_values"][name]
    assert "tie_word_embeddings" not in told  # their RavenConfig would be handed it twice
    assert from_pretrained(folder / "back").config == lm.config


@pytest.mark.parametrize("folder", ["olmo-2"], indirect=True)
def test_a_model_can_be_described_without_its_weights(folder: Path) -> None:
    assert described(folder) == from_pretrained(folder).config
    with pytest.raises(ValueError, match="told by its tensors, or by layers_of as llama or olmo2"):
        recognise(CONFIG).to_model(CONFIG)


def test_start_and_depth_are_those_of_the_config(folder: Path) -> None:
    lm = from_pretrained(folder)
    loop = lm.config.loop
    assert loop is not None
    assert loop.start == Noise(std=0.0087)
    assert lm.steps == 3  # and not the eight that could carry gradient
    assert loop.schedule.grad == 3  # type: ignore[union-attr]
    config, tensors = theirs("tinyllama")
    config["init_values"] = config["init_values"] | {"std": 0.0}
    lm = from_pretrained(saved(folder / "zero", config, tensors))
    assert lm.config.loop is not None
    assert isinstance(lm.config.loop.start, Zeros)
    assert retrofit.to_config(lm.config)["init_values"]["std"] == 0


def test_huginn_is_told_apart() -> None:
    assert recognise(CONFIG) is retrofit
    assert recognise(huginn.to_config(preset("huginn-3.5b"))) is huginn


def test_layers_with_more_norms_are_refused(folder: Path) -> None:
    config, tensors = theirs("tinyllama")
    tensors |= {
        f"transformer.core_block.{i}.norm_{n}.weight": torch.ones(DIM) for i in range(3) for n in (3, 4)
    }
    with pytest.raises(ValueError, match="four norms per layer"):
        from_pretrained(saved(folder, config, tensors))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", True),
        ("qk_bias", True),
        ("nonlin_name", "GELU"),
        ("state_init", "zero"),
        ("injection_type", "add"),
        ("initial_state_mode", "embed-init"),
        ("test_time_noise", 0.1),
        ("head_dim", 12),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
    ],
)
def test_settings_that_we_do_not_have_are_told(folder: Path, name: str, value: object) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {name: value}))
    with pytest.raises(ValueError, match="dynamic" if name == "rope_scaling" else f"{name}="):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "llama-3.2-1b", "llama-3.2-1b-shallow", "olmo2-1b"])
def test_the_published_sizes_have_their_names(name: str) -> None:
    model = preset(f"retrofit-{name}")
    config = retrofit.to_config(model)
    assert config["init_values"]["std"] == 0.008703882797784892
    assert not config["tie_embeddings"]
    assert ("rope_scaling" in config) == name.startswith("llama")
    names = {theirs for x in retrofit.links(model) for theirs in x.theirs}
    assert len(names) == 4 + config["n_layers"] * (8 if name.startswith("olmo") else 6)


def test_models_that_their_code_cannot_run_are_not_exported(tmp_path: Path) -> None:
    model = MODELS["retrofit"]

    def complains(other: Model, what: str) -> None:
        with pytest.raises(ValueError, match=what):
            export(other.build(), tmp_path, "retrofit")

    complains(MODELS["parcae"], "loops layers of Llama or OLMo 2")
    complains(model.replace(embed_scale=2.0), r"model\.loop\.start\.scale is 1\.0")
    complains(model.replace(coda=MODELS["relaxed"].loop.layers[:1]), r"model\.coda")  # type: ignore[union-attr]
    export(model.build(), tmp_path, "retrofit")
