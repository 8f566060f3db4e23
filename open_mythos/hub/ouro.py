"""Checkpoints of Ouro, Zhu et al. 2025 (arXiv 2510.25741): `ByteDance/Ouro-1.4B`, `-2.6B` and their
Thinking twins.

Their layers are Llama's with a second norm after each half, `total_ut_steps` is the number of steps, the
model's norm is passed after every one of them, and `early_exit_gate` is the gate of `loop.halt.ExitGate`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from open_mythos.hub.family import Settings, fail_unless_same, need
from open_mythos.hub.links import Link, link, nest
from open_mythos.hub.llama import (
    check_settings,
    head_dim,
    kv_heads,
    layer_links,
    rope_of,
    shape_settings,
    spare_head,
)
from open_mythos.loop.adapt import NormedStep
from open_mythos.loop.halt import ExitGate
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import BothNorm
from open_mythos.nn.ffn import SwiGLU
from open_mythos.presets.ouro import Size, ouro

NAME = "ouro"
NORMS = {
    "input_layernorm": "norms.0",
    "input_layernorm_2": "norms.1",
    "post_attention_layernorm": "norms.2",
    "post_attention_layernorm_2": "norms.3",
}


def recognise(config: Settings) -> bool:
    return config.get("model_type") == "ouro"


def to_model(config: Settings) -> Model:
    check_settings(config, "Ouro")
    need(config, "attention_bias", False, family="Ouro")
    need(config, "early_exit_step", None, family="Ouro")
    rope = rope_of(config)
    if rope.scaling is not None:
        raise ValueError("this Ouro checkpoint stretches its rotation, which none that was published does")
    threshold = config.get("early_exit_threshold")
    return ouro(
        Size(
            layers=config["num_hidden_layers"],
            vocab=config["vocab_size"],
            dim=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=kv_heads(config),
            head_dim=head_dim(config),
            width=config["intermediate_size"],
            steps=config.get("total_ut_steps", 4),
            context=config.get("max_position_embeddings", 65_536),
            base=rope.base,
            eps=config.get("rms_norm_eps", 1e-6),
            threshold=1.0 if threshold is None else float(threshold),
            tied=config.get("tie_word_embeddings", False),
        )
    )


def to_config(model: Model) -> dict[str, Any]:
    loop = model.loop
    block = loop.layers[0] if loop is not None else None
    if loop is None or not isinstance(block, BothNorm) or not isinstance(block.mixer, GQA):
        raise ValueError("Ouro's code runs a loop of blocks with norms on both sides and grouped attention")
    if not isinstance(block.ffn, SwiGLU) or not isinstance(loop.adapt, NormedStep):
        raise ValueError("Ouro's code runs SwiGLU feed-forwards and its norm after every loop")
    config = {
        "model_type": "ouro",
        "architectures": ["OuroForCausalLM"],
        "num_hidden_layers": len(loop.layers),
        "total_ut_steps": loop.schedule.mean_steps,
        "early_exit_threshold": loop.halt.threshold if isinstance(loop.halt, ExitGate) else 1.0,
        "rms_norm_eps": getattr(loop.adapt.norm, "eps", None),
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * len(loop.layers),
        **shape_settings(model, block.mixer, block.ffn),
    }
    fail_unless_same(model, to_model(config), "Ouro")
    return config


def links(model: Model) -> Sequence[Link]:
    assert model.loop is not None
    found = [
        link("model.embed_tokens.weight", "embed.weight"),
        link("model.norm.weight", "loop.adapt.norm.weight"),
        link("model.early_exit_gate.weight", "loop.halt.score.weight"),
        link("model.early_exit_gate.bias", "loop.halt.score.bias"),
    ]
    if not model.tied:
        found.append(link("lm_head.weight", "head.weight"))
    for i, block in enumerate(model.loop.layers):
        assert isinstance(block.mixer, GQA)
        found += nest(layer_links(block.mixer, NORMS), f"model.layers.{i}.", f"loop.layers.{i}.")
    return found


def spare(config: Settings) -> dict[str, tuple[int, ...]]:
    return spare_head(config)


def constants(model: Model) -> dict[str, Tensor]:
    return {}
