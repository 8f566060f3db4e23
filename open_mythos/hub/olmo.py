"""Checkpoints of OLMo and OLMo 2: `allenai/OLMo-1B-hf`, `allenai/OLMo-2-0425-1B` and their like.

Names are Llama's. The first has no norm to store; the second has its norms behind the branches, under the
names `post_attention_layernorm` and `post_feedforward_layernorm`, and norms of queries and keys.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from open_mythos.hub.family import Settings, fail_unless_same, need
from open_mythos.hub.links import Link, link, nest
from open_mythos.hub.llama import check_settings, layer_links, shape_of, shape_settings, spare_head
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import BranchNorm
from open_mythos.nn.ffn import SwiGLU
from open_mythos.presets.olmo import olmo, olmo2

NAME = "olmo"
KINDS = {"olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM"}
NORMS = {"post_attention_layernorm": "mixer_norm", "post_feedforward_layernorm": "ffn_norm"}


def recognise(config: Settings) -> bool:
    return config.get("model_type") in KINDS


def to_model(config: Settings) -> Model:
    check_settings(config, "OLMo")
    need(config, "clip_qkv", None, family="OLMo")
    make = olmo if config["model_type"] == "olmo" else olmo2
    return make(shape_of(config, eps=1e-5))


def to_config(model: Model) -> dict[str, Any]:
    block = model.prelude[0] if model.prelude else None
    if block is None or not isinstance(block.mixer, GQA) or not isinstance(block.ffn, SwiGLU):
        raise ValueError("OLMo's code runs blocks of grouped attention and SwiGLU; this model has others")
    kind = "olmo2" if isinstance(block, BranchNorm) else "olmo"
    config = {
        "model_type": kind,
        "architectures": [KINDS[kind]],
        "num_hidden_layers": len(model.prelude),
        "attention_bias": block.mixer.out_bias,
        "rms_norm_eps": getattr(model.norm, "eps", None),
        **shape_settings(model, block.mixer, block.ffn),
    }
    if kind == "olmo":
        del config["rms_norm_eps"]  # theirs has none to choose
    fail_unless_same(model, to_model(config), "OLMo")
    return config


def links(model: Model) -> Sequence[Link]:
    found = [link("model.embed_tokens.weight", "embed.weight")]
    if not model.tied:
        found.append(link("lm_head.weight", "head.weight"))
    for i, block in enumerate(model.prelude):
        assert isinstance(block.mixer, GQA)
        norms = NORMS if isinstance(block, BranchNorm) else {}
        found += nest(layer_links(block.mixer, norms), f"model.layers.{i}.", f"prelude.{i}.")
    if model.prelude and isinstance(model.prelude[0], BranchNorm):
        found.append(link("model.norm.weight", "norm.weight"))
    return found


def spare(config: Settings) -> dict[str, tuple[int, ...]]:
    return spare_head(config)


def constants(model: Model) -> dict[str, Tensor]:
    return {}
