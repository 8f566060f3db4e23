"""Checkpoints of Llama and its kin: Llama 2 and 3, TinyLlama, SmolLM2, Mistral, Qwen2 and Qwen3.

They differ in little: Qwen2 adds biases to queries, keys and values, Qwen3 a norm to every query and key
head, Llama 3.1 slows its slow rotations down, as YaRN does for longer contexts. All rotate the two halves of
a head against each other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from open_mythos.hub.family import Settings, fail_unless_same, need
from open_mythos.hub.links import Link, link, nest
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import SwiGLU
from open_mythos.nn.rope import Interpolated, Llama3, Rope, Scaling, Yarn
from open_mythos.presets.baseline import Shape, llama

NAME = "llama"
KINDS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def recognise(config: Settings) -> bool:
    return config.get("model_type") in KINDS and "vocab_size" in config


def to_model(config: Settings) -> Model:
    check_settings(config, "Llama")
    shape, kind = shape_of(config, eps=1e-6), config["model_type"]
    return llama(shape.replace(bias=shape.bias or kind == "qwen2", head_norm=kind == "qwen3"))


def to_config(model: Model) -> dict[str, Any]:
    block = model.prelude[0] if model.prelude else None
    if (
        not isinstance(block, PreNorm)
        or not isinstance(block.mixer, GQA)
        or not isinstance(block.ffn, SwiGLU)
    ):
        raise ValueError(
            "Llama's code runs pre-norm blocks with grouped attention and SwiGLU; this model has others"
        )
    mixer, kind = block.mixer, _kind(block.mixer)
    config = {
        "model_type": kind,
        "architectures": [KINDS[kind]],
        "num_hidden_layers": len(model.prelude),
        "attention_bias": mixer.out_bias,
        "rms_norm_eps": getattr(model.norm, "eps", None),
        **shape_settings(model, mixer, block.ffn),
    }
    fail_unless_same(model, to_model(config), "Llama")
    return config


def links(model: Model) -> Sequence[Link]:
    found = [link("model.embed_tokens.weight", "embed.weight"), link("model.norm.weight", "norm.weight")]
    if not model.tied:
        found.append(link("lm_head.weight", "head.weight"))
    for i, block in enumerate(model.prelude):
        assert isinstance(block.mixer, GQA)
        norms = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm"}
        found += nest(layer_links(block.mixer, norms), f"model.layers.{i}.", f"prelude.{i}.")
    return found


def spare(config: Settings) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    if "transformers_version" in config:  # old ones also held their rotations; we write none
        places = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
        found = {f"{place}.self_attn.rotary_emb.inv_freq": (_width(config) // 2,) for place in places}
    return found | spare_head(config)


def constants(model: Model) -> dict[str, Tensor]:
    return {}


def check_settings(config: Settings, family: str) -> None:
    """Raise `ValueError` for what neither Llama's kin nor Ouro do here."""
    need(config, "hidden_act", "silu", "swish", family=family)
    need(config, "mlp_bias", False, family=family)
    windowed = config.get("use_sliding_window", config.get("model_type") == "mistral")
    if windowed and (config.get("sliding_window") or math.inf) < config.get("max_position_embeddings", 2048):
        need(config, "sliding_window", None, family=family)  # a wider one hides nothing


def shape_of(config: Settings, eps: float) -> Shape:
    """What Llama and its kin say alike; `eps` is the family's own where none is said."""
    rope, biased = rope_of(config), bool(config.get("attention_bias", False))
    return Shape(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=kv_heads(config),
        width=config["intermediate_size"],
        head_dim=head_dim(config),
        context=config.get("max_position_embeddings", 2048),
        base=rope.base,
        scaling=rope.scaling,
        eps=config.get("rms_norm_eps", eps),
        tied=config.get("tie_word_embeddings", False),
        bias=biased,
        out_bias=biased,
    )


def spare_head(config: Settings) -> dict[str, tuple[int, ...]]:
    """A head that is stored although the embedding serves as one."""
    tied = config.get("tie_word_embeddings", False)
    return {"lm_head.weight": (config["vocab_size"], config["hidden_size"])} if tied else {}


def layer_links(mixer: GQA, norms: Mapping[str, str]) -> list[Link]:
    """One layer's names; `norms` gives theirs and ours."""
    found = [link(f"{theirs}.weight", f"{ours}.weight") for theirs, ours in norms.items()]
    found += [link(f"self_attn.{x}_proj.weight", f"mixer.{x}.weight") for x in "qkv"]
    found.append(link("self_attn.o_proj.weight", "mixer.out.weight"))
    if mixer.bias:
        found += [link(f"self_attn.{x}_proj.bias", f"mixer.{x}.bias") for x in "qkv"]
    if mixer.out_bias:
        found.append(link("self_attn.o_proj.bias", "mixer.out.bias"))
    if mixer.head_norm is not None:
        found += [link(f"self_attn.{x}_norm.weight", f"mixer.{x}_norm.weight") for x in "qk"]
    found.append(link(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "ffn.gate_up.weight"))
    found.append(link("mlp.down_proj.weight", "ffn.down.weight"))
    return found


def kv_heads(config: Settings) -> int:
    given = config.get("num_key_value_heads")
    return int(config["num_attention_heads"] if given is None else given)


def head_dim(config: Settings) -> int | None:
    """None where it is the width divided by the heads, as `GQA` has it."""
    given = config.get("head_dim")
    return (
        None
        if given is None or given * config["num_attention_heads"] == config["hidden_size"]
        else int(given)
    )


def rope_of(config: Settings) -> Rope:
    """From `rope_theta` and `rope_scaling`, or from the `rope_parameters` of transformers 5."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = given.get("rope_theta", config.get("rope_theta")) or 10_000.0
    need(config, "partial_rotary_factor", 1.0, None, family="Llama")
    length = given.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    scaling = _stretched(given, int(length or 2048))
    return Rope(base=float(base), pairs="halves", scaling=scaling)


def _stretched(given: Settings, original: int) -> Scaling | None:
    match given.get("rope_type", given.get("type", "default")):
        case "default":
            return None
        case "linear":
            return Interpolated(factor=float(given["factor"]))
        case "llama3":
            low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
            return Llama3(factor=float(given["factor"]), low=low, high=high, original=original)
        case "yarn":
            return _yarn(given, original)
        case kind:
            raise ValueError(
                f"this checkpoint stretches its rotation by {kind!r}; supported are llama3, linear and yarn"
            )


def _yarn(given: Settings, original: int) -> Yarn:
    factor, gain = float(given["factor"]), given.get("attention_factor")
    scales = given.get("mscale"), given.get("mscale_all_dim")
    if gain is None and all(scales):  # DeepSeek's way to say it
        above, below = (0.1 * float(scale) * math.log(factor) + 1 for scale in scales if scale)
        gain = above / below
    return Yarn(
        factor=factor,
        original=original,
        fast=float(given.get("beta_fast") or 32),
        slow=float(given.get("beta_slow") or 1),
        gain=None if gain is None else float(gain),
        rounded=given.get("truncate", True),
    )


def shape_settings(model: Model, mixer: GQA, ffn: SwiGLU) -> dict[str, Any]:
    """The part of a config.json that Llama and Ouro share."""
    rope = mixer.rope or Rope()
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.dim,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads or mixer.heads,
        "head_dim": mixer.head_dim or model.dim // mixer.heads,
        "intermediate_size": ffn.width,
        "max_position_embeddings": model.context,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tied,
        "rope_theta": rope.base,
        "rope_scaling": _scaling(rope.scaling),
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }


def _scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    match scaling:
        case None:
            return None
        case Interpolated(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                "original_max_position_embeddings": scaling.original,
            }
        case Yarn():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original,
                "beta_fast": scaling.fast,
                "beta_slow": scaling.slow,
                "attention_factor": scaling.gain,
                "truncate": scaling.rounded,
            }


def _kind(mixer: GQA) -> str:
    if mixer.head_norm is not None:
        return "qwen3"
    return "qwen2" if mixer.bias and not mixer.out_bias else "llama"


def _width(config: Settings) -> int:
    return head_dim(config) or int(config["hidden_size"] // config["num_attention_heads"])
