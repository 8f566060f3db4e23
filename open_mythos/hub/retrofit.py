"""Checkpoints of retrofitted recurrence, McLeish et al. 2025 (arXiv 2511.07384): `smcleish/Recurrent-*` on
the Hub, made of TinyLlama, Llama 3.2 and OLMo 2.

Files and names are Huginn's, but the layers are those of the model that was cut: Llama's with a norm before
each half, or OLMo 2's with a norm behind each and norms of queries and keys. They read `rope_theta` and the
like where Huginn reads `rope_base`, which tells the two apart. Which layers they are, their config.json does
not say (their folders hold different code instead), so it is read off the tensors, and told in ours.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from open_mythos.hub.family import Settings, fail_unless_same, need
from open_mythos.hub.huginn import FIXED, links_around
from open_mythos.hub.links import Link, link
from open_mythos.hub.llama import shape_of, shape_settings
from open_mythos.hub.weights import Weights
from open_mythos.loop.core import Loop
from open_mythos.loop.schedule import LogNormalPoisson
from open_mythos.loop.start import Noise, Zeros
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import Block, BranchNorm, PreNorm
from open_mythos.nn.ffn import SwiGLU
from open_mythos.presets.baseline import llama
from open_mythos.presets.olmo import olmo2
from open_mythos.presets.retrofit import Cut, retrofit

NAME = "retrofit"
LAYERS = "layers_of"  # in config.json, ours alone
KINDS = {"llama": llama, "olmo2": olmo2}


def recognise(config: Settings) -> bool:
    turns = "rope_theta" in config or "rope_parameters" in config
    return config.get("model_type") == "huginn_raven" and turns


def completed(config: Settings, weights: Weights) -> Settings:
    """With the kind of layers that these tensors are of. Raises `ValueError` for any other."""
    layer = "transformer.core_block.0"
    if f"{layer}.norm_3.weight" in weights:
        raise ValueError(
            "this checkpoint has four norms per layer; retrofitted models can be read with the two of Llama "
            "or OLMo 2"
        )
    return {**config, LAYERS: "olmo2" if f"{layer}.attn.q_norm.weight" in weights else "llama"}


def to_model(config: Settings) -> Model:
    for name, value in (FIXED | {"qk_bias": False, "initial_state_mode": "random"}).items():
        need(config, name, value, family=NAME)
    if config.get(LAYERS) not in KINDS:
        raise ValueError(
            f"whose layers a {NAME} checkpoint has is told by its tensors, or by {LAYERS} as "
            f"{' or '.join(KINDS)} in config.json, got {config.get(LAYERS)!r}"
        )
    if config[LAYERS] == "llama":
        need(config, "head_dim", config["n_embd"] // config["n_heads"], family=NAME)
    mean, grad = config["mean_recurrence"], config["mean_backprop_depth"]
    cut = Cut(
        prelude=config["n_layers_in_prelude"],
        core=config["n_layers_in_recurrent_block"],
        coda=config["n_layers_in_coda"],
    )
    shape = shape_of(_as_llamas(config, cut.prelude + cut.core + cut.coda), eps=config["norm_eps"])
    made = retrofit(KINDS[config[LAYERS]](shape), cut)
    assert made.loop is not None
    std, scale = (float(config["init_values"][name]) for name in ("std", "embed_scale"))
    start = Noise(std=std, scale=scale) if std > 0 else Zeros()
    schedule = LogNormalPoisson(mean=float(mean), grad=min(grad, mean))
    return made.replace(
        embed_scale=scale, loop=made.loop.replace(start=start, schedule=schedule), tied=shape.tied
    )


def to_config(model: Model) -> dict[str, Any]:
    loop = model.loop
    block = loop.layers[0] if loop is not None else None
    if (
        loop is None
        or not isinstance(block, (PreNorm, BranchNorm))
        or not isinstance(block.mixer, GQA)
        or not isinstance(block.ffn, SwiGLU)
        or not isinstance(loop.start, (Noise, Zeros))
    ):
        raise ValueError(
            "the code of retrofitted models loops layers of Llama or OLMo 2, with grouped attention and "
            "SwiGLU, from noise or zero; this model has others"
        )
    config = {
        **FIXED,
        LAYERS: "llama" if isinstance(block, PreNorm) else "olmo2",
        "norm_eps": getattr(block.norm, "eps", None),
        **_sizes(model, loop, block.mixer, block.ffn),
        **_training(model, loop, loop.start),
    }
    fail_unless_same(model, to_model(config), "Retrofit")
    return config


def links(model: Model) -> Sequence[Link]:
    return links_around(model, _within)


def spare(config: Settings) -> dict[str, tuple[int, ...]]:
    return {"lm_head.weight": (_vocab(config), config["n_embd"])} if config["tie_embeddings"] else {}


def constants(model: Model) -> dict[str, Tensor]:
    return {}


def _vocab(config: Settings) -> int:
    return int(config.get("padded_vocab_size", config["vocab_size"]))


def _as_llamas(config: Settings, layers: int) -> Settings:
    """The same settings under the names that Llama's config.json has for them."""
    return {
        **config,
        "vocab_size": _vocab(config),
        "hidden_size": config["n_embd"],
        "num_hidden_layers": layers,
        "num_attention_heads": config["n_heads"],
        "max_position_embeddings": config.get("max_position_embeddings", config["block_size"]),
        "rms_norm_eps": config["norm_eps"],
        "tie_word_embeddings": config["tie_embeddings"],
        "attention_bias": False,
    }


def _within(block: Block) -> list[Link]:
    assert isinstance(block.mixer, GQA)
    found = [
        link("norm_1.weight", "mixer_norm.weight"),
        link("norm_2.weight", "ffn_norm.weight"),
        link("attn.Wqkv.weight", tuple(f"mixer.{x}.weight" for x in "qkv")),
        link("attn.proj.weight", "mixer.out.weight"),
        link("mlp.fc.weight", "ffn.gate_up.weight"),
        link("mlp.proj.weight", "ffn.down.weight"),
    ]
    if block.mixer.head_norm is not None:
        found += [link(f"attn.{x}_norm.weight", f"mixer.{x}_norm.weight") for x in "qk"]
    return found


def _sizes(model: Model, loop: Loop, mixer: GQA, ffn: SwiGLU) -> dict[str, Any]:
    like = shape_settings(model, mixer, ffn)
    same = "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "rope_theta"
    stretched = {"rope_scaling": like["rope_scaling"]} if like["rope_scaling"] is not None else {}
    return {
        "architectures": ["RavenForCausalLM"],
        "model_type": "huginn_raven",
        **{name: like[name] for name in (*same, "vocab_size", "torch_dtype")},
        **stretched,
        "n_embd": model.dim,
        "n_heads": mixer.heads,
        "n_layers": len(model.prelude) + len(loop.layers) + len(model.coda),
        "n_layers_in_prelude": len(model.prelude),
        "n_layers_in_recurrent_block": len(loop.layers),
        "n_layers_in_coda": len(model.coda),
        "block_size": model.context,
        "padded_vocab_size": model.vocab,
        "padding_multiple": 1,
        "rope_base": like["rope_theta"],
        "tie_embeddings": model.tied,
        "qk_bias": mixer.qk_bias,
        "test_time_noise_type": "fixed",
        "activation_checkpoint_impl": "per-iteration",
    }


def _training(model: Model, loop: Loop, start: Noise | Zeros) -> dict[str, Any]:
    mean, usual = loop.schedule.mean_steps, math.sqrt(2 / (5 * model.dim))
    depth = len(model.prelude) + mean * len(loop.layers) + len(model.coda)
    std = 0.0 if isinstance(start, Zeros) else usual if start.std is None else start.std
    return {
        "init_strategy": "takase",
        "init_orthogonal": False,
        "mean_recurrence": mean,
        "sampling_scheme": "poisson-lognormal-filling",
        "mean_backprop_depth": getattr(loop.schedule, "grad", None) or mean,
        "effective_expected_depth": depth,
        "init_values": {
            "std": std,
            "out_proj": std / (2 * depth) ** 0.5,
            "embedding": std,
            "embed_scale": model.embed_scale,
        },
    }
