"""Llama and its kin, and OLMo: the same logits as the code they come from, and both ways through a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from open_mythos.hub import llama
from open_mythos.hub.load import export, from_pretrained, recognise
from open_mythos.model import LoopedLM
from open_mythos.nn.cache import KVCache
from open_mythos.nn.context import Context

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SIZE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", "attention_bias": True},
    "llama-stretched": {"model_type": "llama", "rope_scaling": LLAMA3},
    "llama-interpolated": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-yarn": {"model_type": "llama", "rope_scaling": YARN},
    "llama-yarn-told": {
        "model_type": "llama",
        "rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2, "attention_factor": 1.3, "truncate": False},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-wide": {"model_type": "mistral", "sliding_window": 64},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "olmo": {"model_type": "olmo"},
    "olmo2": {"model_type": "olmo2"},
}


def tokens(length: int = 20) -> Tensor:
    return torch.randint(0, 53, (2, length), generator=torch.Generator().manual_seed(1))


def randomised(config: dict[str, Any]) -> LoopedLM:
    """A model whose every parameter, norms and biases too, matters."""
    model = recognise(config).to_model(config).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def by_the_equations(theirs: dict[str, Tensor], config: dict[str, Any], x: Tensor) -> Tensor:
    """The published forward pass of Llama, Qwen and OLMo in plain operations."""
    heads, groups, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    h = theirs["model.embed_tokens.weight"][x]
    for i in range(config["num_hidden_layers"]):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in theirs.items() if f"layers.{i}." in k}
        before, between, after = norms(w, config["model_type"], eps)
        n = before(h)
        q, k, v = (
            F.linear(n, w[f"self_attn.{p}_proj.weight"], w.get(f"self_attn.{p}_proj.bias")) for p in "qkv"
        )
        if config["model_type"] == "olmo2":
            q, k = norm(q, w["self_attn.q_norm.weight"], eps), norm(k, w["self_attn.k_norm.weight"], eps)
        q, k, v = (
            t.unflatten(-1, (c, -1)).transpose(1, 2) for t, c in ((q, heads), (k, groups), (v, groups))
        )
        if config["model_type"] == "qwen3":
            q, k = norm(q, w["self_attn.q_norm.weight"], eps), norm(k, w["self_attn.k_norm.weight"], eps)
        q, k = turned(q, config["rope_theta"]), turned(k, config["rope_theta"])
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        scores = (q @ k.mT) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = h + after[0](F.linear(mixed, w["self_attn.o_proj.weight"], w.get("self_attn.o_proj.bias")))
        n = between(h)
        gate, up = n @ w["mlp.gate_proj.weight"].T, n @ w["mlp.up_proj.weight"].T
        h = h + after[1]((F.silu(gate) * up) @ w["mlp.down_proj.weight"].T)
    head = theirs.get("lm_head.weight", theirs["model.embed_tokens.weight"])
    if config["model_type"] == "olmo":
        return bare(h) @ head.T
    return norm(h, theirs["model.norm.weight"], eps) @ head.T


def norms(w: dict[str, Tensor], kind: str, eps: float) -> tuple[Any, Any, tuple[Any, Any]]:
    """What a layer does before the attention, before the feed-forward, and after each."""

    def gained(name: str) -> Any:
        return lambda x: norm(x, w[f"{name}_layernorm.weight"], eps)

    if kind == "olmo2":
        return same, same, (gained("post_attention"), gained("post_feedforward"))
    before = (bare, bare) if kind == "olmo" else (gained("input"), gained("post_attention"))
    return *before, (same, same)


def same(x: Tensor) -> Tensor:
    return x


def bare(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 1e-5)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, base: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * base ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def theirs_of(model: LoopedLM, family: Any = llama) -> dict[str, Tensor]:
    """Their tensors, split by hand: the name table is what is being tested."""
    found = {}
    for x in family.links(model.config):
        whole = torch.cat([model.state_dict()[name] for name in x.ours])
        found |= dict(zip(x.theirs, whole.chunk(len(x.theirs)), strict=True))
    return found


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "llama-biased", "mistral", "qwen2", "qwen3", "olmo", "olmo2"]
)
def test_logits_follow_the_equations(name: str) -> None:
    config = SIZE | KINDS[name]
    model = randomised(config)
    want = by_the_equations(theirs_of(model, recognise(config)), config, tokens())
    torch.testing.assert_close(model(tokens()), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_folder_gives_back_the_model(name: str, tmp_path: Path) -> None:
    model = randomised(SIZE | KINDS[name])
    export(model, tmp_path, recognise(KINDS[name] | SIZE).NAME)
    again = from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(tokens()), model(tokens()))


@pytest.mark.parametrize("name", KINDS)
def test_transformers_agrees(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = randomised(SIZE | KINDS[name])
    export(model, tmp_path, recognise(KINDS[name] | SIZE).NAME)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(40)), theirs(tokens(40)).logits, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(again(tokens()), model(tokens()))


def test_cached_logits_are_the_same() -> None:
    model = randomised(SIZE | KINDS["llama-stretched"])
    cache, x = KVCache(2, 20), tokens()
    parts = [
        model(x[:, a:b], ctx=Context.counting(x[:, a:b], a, cache)) for a, b in ((0, 9), (9, 10), (10, 20))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window"),
        ({"model_type": "olmo", "clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_what_we_cannot_honour_is_refused(change: dict[str, Any], complaint: str) -> None:
    config = SIZE | KINDS["llama"] | change
    with pytest.raises(ValueError, match=complaint):
        recognise(config).to_model(config)


def test_old_checkpoints_may_hold_their_rotations(tmp_path: Path) -> None:
    model = randomised(SIZE | KINDS["llama"])
    tensors = {k: v.clone() for k, v in theirs_of(model).items()}
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = SIZE | KINDS["llama"] | {"transformers_version": "4.28.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(from_pretrained(tmp_path)(tokens()), model(tokens()))
