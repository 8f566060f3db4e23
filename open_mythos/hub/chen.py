"""The state dicts that the code of Chen 2026 saves (arXiv 2603.21676): `graph_model.pt`, `logic_model.pt` and
`family_model.pt` of its repository, those of its sweeps, and those of its baselines with ACT.

Such a file holds tensors and no settings, so `completed` reads the model off their names and shapes:

    thinking_block.*           the gated model
    halt.*, io.*               the baseline with ACT, whose input and output are apart
    source_role_emb            graphs, with the library's encoder layer; without it sequences
    rope.cos_cache (T, K/2)    of sequences the context and the width of a head

Two things shapes do not tell: the heads of a graph model (`nhead`; in their scripts d_model / 32), and how
many steps a gated model takes unless told otherwise (`n_thinking_steps`; in their scripts 5 on graphs, 10 on
logic, 8 on families). They are asked for, in a config.json beside the file or as `settings`, under the names
of their constructors' arguments. Tokens are numbered as in their scripts, not as by our puzzles.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_mythos.hub.family import Settings, fail_unless_same, need
from open_mythos.hub.links import Link, link, nest
from open_mythos.hub.rotations import rotations
from open_mythos.hub.weights import Weights
from open_mythos.loop.halt import UniversalACT
from open_mythos.loop.mark import StepTable
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import MLP
from open_mythos.nn.rope import Rope
from open_mythos.presets.chen import Classifier, Size, chen

NAME = "chen"
BASE = 10_000.0
NODES = 20  # the most of a graph, in all their scripts; no tensor has a row for each
TOLD = ("nhead", "n_thinking_steps", "max_nodes", "dropout", "eps")
LIBRARY = {
    "self_attn.out_proj": "mixer.out",
    "linear1": "ffn.up",
    "linear2": "ffn.down",
    "norm1": "mixer_norm",
    "norm2": "ffn_norm",
}
OWN = {"ffn.0": "ffn.up", "ffn.3": "ffn.down", "norm1": "mixer_norm", "norm2": "ffn_norm"}
GATED = {f"{x}_proj": f"mixer.{x}" for x in ("q", "k", "v", "out")} | OWN
HALTING = {"q": "mixer.q", "k": "mixer.k", "v": "mixer.v", "o": "mixer.out"} | OWN


class Kind(NamedTuple):
    """Which of their four models, and where it keeps its parts."""

    graph: bool
    act: bool

    @property
    def io(self) -> str:
        return "io." if self.act else ""

    @property
    def loop(self) -> str:
        return "" if self.act else "thinking_block."

    @property
    def layer(self) -> str:
        return self.loop + ("layer." if self.graph or self.act else "")


def recognise(config: Settings) -> bool:
    return config.get("model_type") == NAME


def completed(told: Settings, weights: Weights) -> Settings:
    """What the tensors say, and what was told beyond that.

    Raises `ValueError` for another family's file, for what has to be told and was not, and for what was told
    that is unknown or against the tensors.
    """
    read = _read(weights)
    for name, value in told.items():
        if name not in read and name not in TOLD:
            raise ValueError(f"Chen's models have no {name!r} to set; they have {', '.join((*read, *TOLD))}")
        if read.get(name, value) != value:
            raise ValueError(f"{weights.path} was told {name}={value!r}, but its tensors say {read[name]!r}")
    asked = ["nhead"] * read["graph"] + ["n_thinking_steps"] * (not read["act"])
    if asked := [name for name in asked if name not in read and name not in told]:
        theirs = {"nhead": max(1, read["d_model"] // 32), "n_thinking_steps": 5 if read["graph"] else 8}
        example = {name: theirs[name] for name in asked}
        raise ValueError(
            f"the tensors of {weights.path} do not tell {' and '.join(asked)}; say it in a config.json "
            f"beside it or as settings, such as {example}"
        )
    return {**read, **told}


def to_model(config: Settings) -> Classifier:
    need(config, "eps", 0.01, family=NAME)
    graph, act, dropout = config["graph"], config["act"], config.get("dropout", 0.1)
    table = config["max_thinking_steps"]
    steps = table if act else config["n_thinking_steps"]
    if not 1 <= steps <= table:
        raise ValueError(f"n_thinking_steps lies in 1..{table}, the rows of depth_emb; got {steps}")
    size = Size(
        vocab=config["vocab_size"],
        dim=config["d_model"],
        heads=config["nhead"],
        width=config["dim_ff"],
        activation="relu" if graph else "gelu",
        table=table,
        low=steps,
        high=steps,
        scale=None if graph or act else 1e-4,
        rope=None if graph else Rope(base=BASE, pairs="halves"),
        dropout=dropout,
        context=config.get("max_nodes", NODES) if graph else config["max_seq_len"],
        act=act,
    )
    return Classifier(core=chen(size), roles=2 if graph else 0, dropout=dropout)


def to_config(model: Classifier) -> dict[str, Any]:
    loop = model.core.loop
    block = loop.layers[0] if loop is not None else None
    if loop is None or not isinstance(block, PreNorm) or not isinstance(block.mixer, GQA):
        raise ValueError("Chen's code loops a pre-norm block of attention; this classifier has another core")
    if not isinstance(block.ffn, MLP) or not isinstance(loop.mark, StepTable):
        raise ValueError("Chen's code runs a feed-forward of two maps, and marks steps by a table")
    kind = _kind(model)
    config = {
        "model_type": NAME,
        "graph": kind.graph,
        "act": kind.act,
        "vocab_size": model.core.vocab,
        "d_model": model.core.dim,
        "nhead": block.mixer.heads,
        "dim_ff": block.ffn.width,
        "dropout": model.dropout,
        "max_thinking_steps": loop.mark.steps,
        "max_nodes" if kind.graph else "max_seq_len": model.core.context,
    }
    if not kind.act:
        config["n_thinking_steps"] = loop.schedule.mean_steps
    fail_unless_same(model, to_model(config), "Chen")
    return config


def links(model: Classifier) -> Sequence[Link]:
    kind = _kind(model)
    outside = _maps({"emb_norm": "core.enter", **{f"head.{i}": f"verdict.{i}" for i in (0, 1, 4)}})
    outside.append(link("token_emb.weight", "core.embed.weight"))
    if kind.graph:
        outside.append(link(("source_role_emb", "target_role_emb"), "roles", (2 * model.core.dim,)))
    last = {"halt": "halt.score"} if kind.act else {"gate_proj": "update.gate"}
    inside = [link("depth_emb.weight", "mark.table.weight"), *_maps(last)]
    return [
        *nest(outside, kind.io, ""),
        *nest(inside, kind.loop, "core.loop."),
        *nest(_layer(kind), kind.layer, "core.loop.layers.0."),
    ]


def spare(config: Settings) -> dict[str, tuple[int, ...]]:
    if config["graph"]:
        return {}
    half, context = config["d_model"] // config["nhead"] // 2, config["max_seq_len"]
    shapes = {"inv_freq": (half,), "cos_cache": (context, half), "sin_cache": (context, half)}
    return {f"{Kind(False, config['act']).io}rope.{name}": shape for name, shape in shapes.items()}


def constants(model: Classifier) -> dict[str, Tensor]:
    assert model.core.loop is not None
    kind, mixer = _kind(model), model.core.loop.layers[0].mixer
    assert isinstance(mixer, GQA)
    tables = {} if kind.graph else _rotations(model.core.dim // mixer.heads, model.core.context)
    return {f"{kind.io}rope.{name}": table for name, table in tables.items()}


def _kind(model: Classifier) -> Kind:
    loop = model.core.loop
    return Kind(graph=model.roles > 0, act=loop is not None and isinstance(loop.halt, UniversalACT))


def _layer(kind: Kind) -> list[Link]:
    if kind.graph:
        joint = [
            link(f"self_attn.in_proj_{part}", tuple(f"mixer.{x}.{part}" for x in "qkv"))
            for part in ("weight", "bias")
        ]
        return [*joint, *_maps(LIBRARY)]
    if kind.act:
        return _maps(HALTING)
    return [*_maps(GATED), link("ls1.gamma", "mixer_scale"), link("ls2.gamma", "ffn_scale")]


def _maps(names: Mapping[str, str]) -> list[Link]:
    """Weights and biases, by the names of their modules and of ours."""
    return [
        link(f"{theirs}.{part}", f"{ours}.{part}")
        for theirs, ours in names.items()
        for part in ("weight", "bias")
    ]


def _read(weights: Weights) -> dict[str, Any]:
    """What names and shapes say. Raises `ValueError` for a file that is not one of theirs."""
    act = "halt.weight" in weights
    if not act and "thinking_block.depth_emb.weight" not in weights:
        raise ValueError(
            f"{weights.path} does not say what it is: without a config.json only models of Chen's are known, "
            "by a thinking_block.depth_emb.weight or a halt.weight; name a folder with a config.json"
        )
    kind = Kind(graph=("io." if act else "") + "source_role_emb" in weights, act=act)
    vocab, dim = _shape(weights, f"{kind.io}token_emb.weight")
    width, _ = _shape(weights, kind.layer + ("linear1.weight" if kind.graph else "ffn.0.weight"))
    steps, _ = _shape(weights, f"{kind.loop}depth_emb.weight")
    sizes = {"vocab_size": vocab, "d_model": dim, "dim_ff": width, "max_thinking_steps": steps}
    if not kind.graph:
        context, half = _shape(weights, f"{kind.io}rope.cos_cache")
        _check_rotations(weights, kind.io, 2 * half, context)
        sizes |= {"max_seq_len": context, "nhead": dim // max(1, 2 * half)}
    return {"model_type": NAME, "graph": kind.graph, "act": kind.act, **sizes}


def _shape(weights: Weights, name: str) -> tuple[int, int]:
    shape = weights.read(name).shape if name in weights else ()
    if len(shape) != 2:
        raise ValueError(f"{weights.path} looks like a model of Chen's, but has no matrix {name}")
    return shape[0], shape[1]


def _check_rotations(weights: Weights, io: str, width: int, context: int) -> None:
    """Raise `ValueError` unless theirs, by which their code would turn, are those that we make."""
    for name, ours in _rotations(width, context).items():
        theirs = weights.read(f"{io}rope.{name}").float() if f"{io}rope.{name}" in weights else None
        if theirs is None or theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-2):
            raise ValueError(f"{weights.path} has another {io}rope.{name} than that of base {BASE:,.0f}")


def _rotations(width: int, context: int) -> dict[str, Tensor]:
    cos, sin = rotations(BASE, width, context)[0, :, 0].unbind(-1)
    rates = BASE ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    return {"inv_freq": rates, "cos_cache": cos.contiguous(), "sin_cache": sin.contiguous()}
