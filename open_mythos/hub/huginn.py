"""Checkpoints of Huginn, Geiping et al. 2025 (arXiv 2502.05171), `tomg-group-umd/huginn-0125`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from open_mythos.hub.family import Settings, fail_unless_same, need
from open_mythos.hub.links import Link, link, nest
from open_mythos.hub.rotations import rotations
from open_mythos.loop.core import Loop
from open_mythos.loop.inject import Concat
from open_mythos.loop.schedule import LogNormalPoisson
from open_mythos.loop.start import Noise
from open_mythos.model import FinalNorm, Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import Block, Sandwich
from open_mythos.nn.ffn import SwiGLU
from open_mythos.nn.init import ScaledNormal
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.rope import Rope

NAME = "huginn"
FIXED = {
    "bias": False,
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "state_init": "like-init",
    "injection_type": "linear",
    "test_time_noise": 0,
}
STAGES = {"prelude": "prelude", "core_block": "loop.layers", "coda": "coda"}


def recognise(config: Settings) -> bool:
    return config.get("model_type") == "huginn_raven"


def to_model(config: Settings) -> Model:
    for name, value in FIXED.items():
        need(config, name, value, family=NAME)
    dim, mean, grad = config["n_embd"], config["mean_recurrence"], config["mean_backprop_depth"]
    block, norm = _block(config), RMSNorm(eps=config["norm_eps"])
    loop = Loop(
        layers=config["n_layers_in_recurrent_block"] * (block,),
        start=Noise(scale=dim**0.5),
        inject=Concat(),
        schedule=LogNormalPoisson(mean=float(max(mean, grad)), grad=grad, discard=1),
    )
    return Model(
        vocab=config.get("padded_vocab_size", config["vocab_size"]),
        dim=dim,
        context=config["block_size"],
        embed_scale=dim**0.5,
        prelude=config["n_layers_in_prelude"] * (block,),
        loop=loop,
        leave=FinalNorm(),
        coda=config["n_layers_in_coda"] * (block,),
        norm=norm,
        tied=config["tie_embeddings"],
        init=ScaledNormal(layers=config["effective_expected_depth"], up_as_out=True),
    )


def to_config(model: Model) -> dict[str, Any]:
    block = model.prelude[0] if model.prelude else None
    if model.loop is None or not isinstance(block, Sandwich) or not isinstance(block.mixer, GQA):
        raise ValueError("Huginn's code loops sandwich blocks behind a prelude; this model has others")
    config = FIXED | _sizes(model, model.loop, block, block.mixer) | _training(model, model.loop)
    fail_unless_same(model, to_model(config), "Huginn")
    return config


def links(model: Model) -> Sequence[Link]:
    return links_around(model, lambda block: _within(block, model.dim))


def links_around(model: Model, within: Callable[[Block], Sequence[Link]]) -> Sequence[Link]:
    """The names of everything, given those within a layer; retrofitted models (retrofit.py) have the same."""
    assert model.loop is not None
    found = [
        link("transformer.wte.weight", "embed.weight"),
        link("transformer.adapter.weight", "loop.inject.mix.weight"),
        link("transformer.ln_f.weight", "norm.weight"),
    ]
    if not model.tied:
        found.append(link("lm_head.weight", "head.weight"))
    stages = (model.prelude, model.loop.layers, model.coda)
    for (theirs, ours), blocks in zip(STAGES.items(), stages, strict=True):
        for i, block in enumerate(blocks):
            found += nest(within(block), f"transformer.{theirs}.{i}.", f"{ours}.{i}.")
    return found


def spare(config: Settings) -> dict[str, tuple[int, ...]]:
    vocab, dim = config.get("padded_vocab_size", config["vocab_size"]), config["n_embd"]
    width = dim // config["n_heads"]
    found: dict[str, tuple[int, ...]] = {"freqs_cis": (1, config["block_size"], 1, width // 2, 2)}
    return found | ({"lm_head.weight": (vocab, dim)} if config["tie_embeddings"] else {})


def constants(model: Model) -> dict[str, Tensor]:
    mixer = model.prelude[0].mixer
    assert isinstance(mixer, GQA)
    assert mixer.rope is not None
    return {"freqs_cis": rotations(mixer.rope.base, model.dim // mixer.heads, model.context)}


def _block(config: Settings) -> Block:
    heads = config["n_heads"]
    mixer = GQA(
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        rope=Rope(base=float(config["rope_base"])),
        qk_bias=config["qk_bias"],
    )
    return Sandwich(
        mixer=mixer, ffn=SwiGLU(width=config["intermediate_size"]), norm=RMSNorm(eps=config["norm_eps"])
    )


def _within(block: Block, dim: int) -> list[Link]:
    assert isinstance(block.mixer, GQA)
    found = [
        *(link(f"norm_{i + 1}.weight", f"norms.{i}.weight") for i in range(4)),
        link("attn.Wqkv.weight", tuple(f"mixer.{x}.weight" for x in "qkv")),
        link("attn.proj.weight", "mixer.out.weight"),
        link("mlp.fc.weight", "ffn.gate_up.weight"),
        link("mlp.proj.weight", "ffn.down.weight"),
    ]
    if block.mixer.qk_bias:
        shape = 2, 1, block.mixer.heads, dim // block.mixer.heads
        found.append(link("attn.qk_bias", ("mixer.q_bias", "mixer.k_bias"), shape))
    return found


def _sizes(model: Model, loop: Loop, block: Sandwich, mixer: GQA) -> dict[str, Any]:
    return {
        "architectures": ["RavenForCausalLM"],
        "model_type": "huginn_raven",
        "n_embd": model.dim,
        "n_heads": mixer.heads,
        "n_layers": len(model.prelude) + len(loop.layers) + len(model.coda),
        "block_size": model.context,
        "vocab_size": model.vocab,
        "padded_vocab_size": model.vocab,
        "padding_multiple": 1,
        "tie_embeddings": model.tied,
        "intermediate_size": getattr(block.ffn, "width", None),
        "norm_eps": getattr(block.norm, "eps", None),
        "n_layers_in_recurrent_block": len(loop.layers),
        "n_layers_in_prelude": len(model.prelude),
        "n_layers_in_coda": len(model.coda),
        "qk_bias": mixer.qk_bias,
        "rope_base": int(mixer.rope.base) if mixer.rope is not None else None,
        "num_key_value_heads": mixer.kv_heads or mixer.heads,
        "head_dim": model.dim // mixer.heads,
        "test_time_noise_type": "fixed",
        "activation_checkpoint_impl": "per-iteration",
    }


def _training(model: Model, loop: Loop) -> dict[str, Any]:
    mean = loop.schedule.mean_steps
    depth = len(model.prelude) + mean * len(loop.layers) + len(model.coda)
    std = (2 / (5 * model.dim)) ** 0.5
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
            "embed_scale": model.dim**0.5,
        },
    }
