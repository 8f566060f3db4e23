"""Checkpoints of Parcae and its GPT baselines, `SandyResearch/parcae-*`,
Prairie et al. 2026 (arXiv 2604.12946).

Their code makes a table of value embeddings for every second layer counted through the unrolled-once network,
and a gate for every second layer counted otherwise (looped: by the steps that carry gradient). Where both
counts agree, as in every published size, the layer uses them; where they do not, the tensors exist and
nobody reads them, so they are not part of our model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from open_mythos.hub.family import Settings, fail_unless_same, need
from open_mythos.hub.links import Link, link, nest
from open_mythos.hub.rotations import rotations
from open_mythos.loop.core import Loop
from open_mythos.loop.inject import Add, Concat, Diagonal, Injection
from open_mythos.loop.schedule import Fixed, LogNormalPoisson, Per, Poisson, Ramp, Schedule
from open_mythos.loop.start import Noise, Start, Zeros
from open_mythos.model import Matrix, Model
from open_mythos.nn.attention import GQA, ValueEmbedding
from open_mythos.nn.block import Block, PreNorm
from open_mythos.nn.ffn import FFN, MLP, SwiGLU
from open_mythos.nn.init import Init, Orthogonal, ScaledNormal
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.rope import Rope
from open_mythos.presets.parcae import QK_NORM, has_table

NAME = "parcae"
INJECTIONS: Mapping[str, Injection] = {"diagonal": Diagonal(), "linear": Concat(), "add": Add()}
ACTIVATIONS = {"ReLU2": "half_relu2", "GELU": "gelu", "SiLU": "silu", "ReLU": "relu"}
# Ways to fill weights that change nothing else; others scale the embedding or the logits as well.
STRATEGIES = ("scaled-zero", "scaled", "scaled-geiping", "scaled-stuck", "small", "takase")
SCHEMES = ("poisson-truncated-full", "poisson-full", "poisson-lognormal-filling", "fixed")
FIXED = {
    "use_abacus": False,
    "randomize_positions_from": None,
    "block_class_name": "TransformerPreNormBlock",
    "norm_class_name": "RMSNorm",
    "bias": False,
    "mup_model_scaling_factor": 1,
    "debias_attention": False,
    "center_attention": False,
    "clip_qkv": None,
    "logit_softcap": None,
}


def recognise(config: Settings) -> bool:
    return config.get("_class_name") in ("ParcaeConfig", "GPTConfig")


def to_model(config: Settings) -> Model:
    for name, value in FIXED.items():
        need(config, name, value, family="Parcae")
    need(config, "init_strategy", *STRATEGIES, family="Parcae")
    if _looped(config) and not config["tie_embeddings"]:
        need(config, "use_fused_head", "pytorch", None, "cce", family="untied Parcae")
    norm = RMSNorm(eps=config["norm_eps"])
    blocks = tuple(_block(config, used) for used in _used(config))
    model = Model(
        vocab=config["padded_vocab_size"],
        dim=config["n_embd"],
        context=config["block_size"],
        embed_scale=_embed_scale(config),
        prelude=blocks,
        norm=norm,
        tied=config["tie_embeddings"],
        init=_init(config),
    )
    if not _looped(config):
        return model
    p, r, _ = _layers(config)
    return model.replace(
        prelude=blocks[:p],
        enter=norm if config["prelude_norm"] else None,
        loop=_loop(config, blocks[p : p + r]),
        leave=Matrix(),
        coda=blocks[p + r :],
    )


def to_config(model: Model) -> dict[str, Any]:
    blocks = [*model.prelude, *(model.loop.layers if model.loop else ()), *model.coda]
    first = blocks[0] if blocks else None
    if not isinstance(first, PreNorm) or not isinstance(first.mixer, GQA):
        raise ValueError("Parcae's code runs pre-norm blocks with grouped attention; this model has others")
    config = _common(model, first, first.mixer) | (_looped_part(model) if model.loop else _plain_part(model))
    fail_unless_same(model, to_model(config), "Parcae")
    return config


def links(model: Model) -> Sequence[Link]:
    found = [link("transformer.wte.weight", "embed.weight"), link("transformer.ln_f.weight", "norm.weight")]
    if not model.tied:
        # Their code without a loop keeps a head of its own as (dim, vocabulary).
        found.append(link("lm_head.weight", "head.weight", turned=model.loop is None))
    if model.loop is None:
        return found + _stage(model.prelude, "transformer.h", "prelude", 0, model.dim)
    p, r = len(model.prelude), len(model.loop.layers)
    found += _stage(model.prelude, "transformer.prelude", "prelude", 0, model.dim)
    found += _stage(model.loop.layers, "transformer.core_block", "loop.layers", p, model.dim)
    found += _stage(model.coda, "transformer.coda", "coda", p + r, model.dim)
    found.append(link("transformer.C.weight", "readout.weight"))
    if model.enter is not None:
        found.append(link("transformer.ln_prelude.weight", "enter.weight"))
    if isinstance(model.loop.inject, Diagonal):
        pairs = {"A_log": "log_a", "dt_bias": "raw_dt", "B": "b"}
        found += nest([link(*pair) for pair in pairs.items()], "transformer.adapter.", "loop.inject.")
    if isinstance(model.loop.inject, Concat):
        found.append(link("transformer.adapter.adapter.weight", "loop.inject.mix.weight"))
    return found


def spare(config: Settings) -> dict[str, tuple[int, ...]]:
    heads, width, vocab = config["num_attention_heads"], _head_width(config), config["padded_vocab_size"]
    kv_heads = config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"freqs_cis": (1, config["block_size"], 1, width // 2, 2)}
    if config["tie_embeddings"]:
        found["lm_head.weight"] = (vocab, heads * width)
    used, tables, gates = _used(config), _tables(config), _gates(config)
    for i, place in enumerate(_places(config)):
        if tables[i] and not used[i]:
            found[f"value_embeds.{i}.weight"] = (vocab, kv_heads * width)
        if gates[i] and not used[i]:
            found[f"{place}.attn.ve_gate.weight"] = (kv_heads, 32)
    return found


def constants(model: Model) -> dict[str, Tensor]:
    """The table of rotations. (Their loader makes its own; a file without it is not theirs, though.)"""
    mixer = (*model.prelude, *model.coda)[0].mixer
    assert isinstance(mixer, GQA)
    base = 50_000.0 if mixer.rope is None else mixer.rope.base
    return {"freqs_cis": rotations(base, model.dim // mixer.heads, model.context)}


def _block(config: Settings, used: bool) -> Block:
    rope = config["rope_settings"]
    need(rope, "rope_condense_ratio", 1, family="Parcae")
    mixer = GQA(
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        rope=Rope(base=float(rope["rope_base"])) if rope["use_rope"] else None,
        qk_bias=config["qk_bias"],
        head_norm=QK_NORM if config["qk_norm"] else None,
        values=ValueEmbedding(vocab=config["padded_vocab_size"]) if used else None,
    )
    return PreNorm(mixer=mixer, ffn=_ffn(config), norm=RMSNorm(eps=config["norm_eps"]))


def _ffn(config: Settings) -> FFN:
    if need(config, "mlp_class_name", "BaseMLP", "GatedMLP", family="Parcae") == "GatedMLP":
        need(config, "nonlin_name", "SiLU", family="Parcae")
        return SwiGLU(width=config["intermediate_size"])
    name = need(config, "nonlin_name", *ACTIVATIONS, family="Parcae")
    return MLP(width=config["intermediate_size"], activation=ACTIVATIONS[name])  # type: ignore[arg-type]


def _loop(config: Settings, blocks: tuple[Block, ...]) -> Loop:
    for wide, narrow in (
        ("recurrent_embedding_dimension", "n_embd"),
        ("recurrent_intermediation_embedding_dimension", "intermediate_size"),
    ):
        need(config, wide, config[narrow], family="Parcae")
    need(config, "recurrent_num_attention_heads", None, config["num_attention_heads"], family="Parcae")
    injection = need(config, "injection_type", *INJECTIONS, family="Parcae")
    return Loop(layers=blocks, start=_start(config), inject=INJECTIONS[injection], schedule=_schedule(config))


def _start(config: Settings) -> Start:
    zero = need(config, "state_init", "like-init", "zero", family="Parcae") == "zero"
    return Zeros() if zero else Noise(scale=_embed_scale(config))


def _schedule(config: Settings) -> Schedule:
    """How their code draws depths. Its other schemes, curricula and depths per token are refused."""
    method = need(config, "recurrent_iteration_method", "per-sequence", "per-batch", family="Parcae")
    per: Per = "batch" if method == "per-batch" else "sequence"
    grad = config["mean_backprop_depth"]
    mean = max(config["mean_recurrence"], grad)
    match need(config, "sampling_scheme", *SCHEMES, family="Parcae"):
        case "fixed":
            return Fixed(steps=mean, grad=grad)
        case "poisson-full":  # every step has gradient
            return Poisson(mean=float(mean), per=per)
        case "poisson-lognormal-filling":  # Huginn's
            return LogNormalPoisson(mean=float(mean), grad=grad, per=per)
        case _:
            return Poisson(mean=float(mean), grad=grad, per=per, on_top=per == "batch")


def _scheme(schedule: Schedule) -> str:
    """Their nearest name for it."""
    schedule = schedule.of if isinstance(schedule, Ramp) else schedule
    if isinstance(schedule, Poisson):
        return "poisson-full" if schedule.grad is None else "poisson-truncated-full"
    return "poisson-lognormal-filling" if isinstance(schedule, LogNormalPoisson) else "fixed"


def _init(config: Settings) -> Init:
    if config["init_orthogonal"]:
        return Orthogonal()
    if not _looped(config):
        return ScaledNormal(layers=config["n_layer"])
    p, r, c = _layers(config)
    return ScaledNormal(layers=p + r * config["mean_recurrence"] + c)


def _embed_scale(config: Settings) -> float:
    return float(config["n_embd"] ** 0.5) if config["init_strategy"] == "takase" else 1.0


def _looped(config: Settings) -> bool:
    return bool(config["_class_name"] == "ParcaeConfig")


def _layers(config: Settings) -> tuple[int, int, int]:
    stages = ("prelude", "recurrent_block", "coda")
    p, r, c = (config[f"n_layers_in_{stage}"] for stage in stages)
    return p, r, c


def _places(config: Settings) -> list[str]:
    """Their name for each layer, counted once."""
    if not _looped(config):
        return [f"transformer.h.{i}" for i in range(config["n_layer"])]
    stages = zip(("prelude", "core_block", "coda"), _layers(config), strict=True)
    return [f"transformer.{stage}.{i}" for stage, count in stages for i in range(count)]


def _tables(config: Settings) -> list[bool]:
    count = len(_places(config))
    return [has_table(i, count) for i in range(count)]


def _gates(config: Settings) -> list[bool]:
    if not _looped(config):
        return _tables(config)
    p, r, c = _layers(config)
    unrolled = p + r * config["mean_recurrence"]
    ids = [*range(p + r), *range(unrolled, unrolled + c)]
    return [has_table(i, r * config["mean_backprop_depth"]) for i in ids]


def _used(config: Settings) -> list[bool]:
    return [table and gate for table, gate in zip(_tables(config), _gates(config), strict=True)]


def _head_width(config: Settings) -> int:
    return int(config["n_embd"] // config["num_attention_heads"])


def _stage(blocks: Sequence[Block], theirs: str, ours: str, first: int, dim: int) -> list[Link]:
    found: list[Link] = []
    for i, block in enumerate(blocks):
        found += nest(_within(block, dim), f"{theirs}.{i}.", f"{ours}.{i}.")
        if isinstance(block.mixer, GQA) and block.mixer.values is not None:
            found.append(link(f"value_embeds.{first + i}.weight", f"{ours}.{i}.mixer.values.table.weight"))
    return found


def _within(block: Block, dim: int) -> list[Link]:
    mixer = block.mixer
    assert isinstance(mixer, GQA)
    found = [
        link("norm_1.weight", "mixer_norm.weight"),
        *(link(f"attn.c_{x}.weight", f"mixer.{x}.weight") for x in "qkv"),
        link("attn.c_proj.weight", "mixer.out.weight"),
        link("norm_2.weight", "ffn_norm.weight"),
        link("mlp.fc.weight", "ffn.up.weight" if isinstance(block.ffn, MLP) else "ffn.gate_up.weight"),
        link("mlp.proj.weight", "ffn.down.weight"),
    ]
    if mixer.qk_bias:
        shape = 2, 1, mixer.heads, dim // mixer.heads
        found.append(link("attn.qk_bias", ("mixer.q_bias", "mixer.k_bias"), shape))
    if mixer.values is not None:
        found.append(link("attn.ve_gate.weight", "mixer.values.gate.weight"))
    return found


def _common(model: Model, block: PreNorm, mixer: GQA) -> dict[str, Any]:
    gated = not isinstance(block.ffn, MLP)
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    nonlin = names.get(block.ffn.activation) if isinstance(block.ffn, MLP) else "SiLU"
    return FIXED | {
        "name": "open_mythos",
        "hf_config": {},
        "block_size": model.context,
        "n_embd": model.dim,
        "intermediate_size": getattr(block.ffn, "width", None),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads or mixer.heads,
        "vocab_size": model.vocab,
        "padding_multiple": 64,
        "padded_vocab_size": model.vocab,
        "rope_settings": {
            "use_rope": mixer.rope is not None,
            "rope_condense_ratio": 1,
            "rope_base": 50_000 if mixer.rope is None else int(mixer.rope.base),
        },
        "attn_impl": "flash",
        "norm_eps": getattr(block.norm, "eps", None),
        "mlp_class_name": "GatedMLP" if gated else "BaseMLP",
        "nonlin_name": nonlin,
        "qk_bias": mixer.qk_bias,
        "init_strategy": _strategy(model),
        "init_orthogonal": isinstance(model.init, Orthogonal),
        "skip_initialization": False,
        "use_fused_head": "pytorch",
        "qk_norm": mixer.head_norm is not None,
        "activation_checkpoint_impl": "per-iteration" if model.loop else "per-block",
        "simple_ops": False,
        "strategy": "single",
        "tie_embeddings": model.tied,
    }


def _strategy(model: Model) -> str:
    if model.embed_scale != 1:
        return "takase"
    return "scaled-zero" if isinstance(model.init, Orthogonal) else "scaled"


def _plain_part(model: Model) -> dict[str, Any]:
    return {"n_layer": len(model.prelude), "_class_name": "GPTConfig"}


def _looped_part(model: Model) -> dict[str, Any]:
    assert model.loop is not None
    injections = {ours: theirs for theirs, ours in INJECTIONS.items()}
    schedule = model.loop.schedule
    mean, per = schedule.mean_steps, getattr(schedule, "per", "sequence")
    return {
        "injection_type": injections.get(model.loop.inject, "diagonal"),
        "n_layers_in_recurrent_block": len(model.loop.layers),
        "n_layers_in_prelude": len(model.prelude),
        "n_layers_in_coda": len(model.coda),
        "state_init": "zero" if isinstance(model.loop.start, Zeros) else "like-init",
        "recurrent_embedding_dimension": model.dim,
        "recurrent_intermediation_embedding_dimension": getattr(model.loop.layers[0].ffn, "width", None),
        "recurrent_num_attention_heads": None,
        "prelude_norm": model.enter is not None,
        "sampling_scheme": _scheme(schedule),
        "mean_recurrence": mean,
        "mean_backprop_depth": getattr(schedule, "grad", None) or mean,
        "lockstep_n": False,
        "lockstep_k": False,
        "curriculum_target": "forward",
        "recurrent_iteration_method": f"per-{per}",
        "model_class_name": "Parcae",
        "_is_recurrent_block_config": False,
        "_class_name": "ParcaeConfig",
    }
