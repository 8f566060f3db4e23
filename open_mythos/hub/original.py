"""The weights of the package open-mythos 0.5.0, to the core's and back.

    original                                              core
    routed_experts.N.{gate, up}, .down                    one stack (E, 2F, D), (E, D, F)
    shared_experts.N.*                                    one wide SwiGLU: all gates, then all ups
    ffn.{gate, up}                                        gate_up
    attn.q_up_nope (H nope, R), q_up_rope (H rope, R)     q_up, head by head nope then rope
    recurrent.lora.B (r, D)                               adapt.up (D, r)
    freqs_cis, freqs_cis_mla                              nothing: angles are made when needed

Every core weight is a `Joint` of original ones; one table serves both directions.
Law: tests/numerics/test_original.py.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from open_mythos.loop.adapt import DepthLoRA
from open_mythos.loop.core import Loop
from open_mythos.loop.halt import ACT
from open_mythos.model import Model
from open_mythos.nn.attention import MLA
from open_mythos.nn.block import Block
from open_mythos.nn.moe import MoE

GROUPED = {
    "q.weight": "wq.weight",
    "k.weight": "wk.weight",
    "v.weight": "wv.weight",
    "out.weight": "wo.weight",
}
LATENT = {
    f"{name}.weight": f"{name}.weight" for name in ("q_down", "q_norm", "kv_down", "kv_norm", "kv_up")
} | {"out.weight": "wo.weight"}
TABLES = ("freqs_cis", "freqs_cis_mla")
Weights = dict[str, Tensor]


class Joint(NamedTuple):
    """How one weight of the core is made of the original's, and taken apart again."""

    names: list[str]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


def is_original(state: Mapping[str, object]) -> bool:
    return "recurrent.norm.weight" in state


def to_core(state: Mapping[str, Tensor], config: Model, strict: bool = True) -> Weights:
    """The core's weights. Raises `ValueError` for misshapen ones, and for missing or unknown ones unless not
    `strict`: then what is whole is returned, and what is unknown under its own name."""
    joints = dict(_joints(config))
    wanted = {name for joint in joints.values() for name in joint.names}
    given = {name for name in state if name in wanted or not _is_idle(name, state[name], config)}
    missing, unknown = sorted(wanted - given), sorted(given - wanted)
    if missing and strict:
        raise ValueError(
            f"these weights are missing: {_some(missing)}; is the config the one they were made with?"
        )
    if unknown and strict:
        raise ValueError(f"this config has no place for {_some(unknown)}; is it the one they were made with?")
    _check_shapes(state, config)
    there = {name: joint for name, joint in joints.items() if given.issuperset(joint.names)}
    weights = {name: joint.join([state[part] for part in joint.names]) for name, joint in there.items()}
    return weights | {name: state[name] for name in unknown}


def _is_idle(name: str, weight: Tensor, config: Model) -> bool:
    """Whether nothing is lost without it: the rotary tables, an adapter of rank 0, and the weights of a
    halting that the config does not use."""
    no_act = config.loop is not None and not isinstance(config.loop.halt, ACT)
    return name in TABLES or weight.numel() == 0 or (no_act and ".act." in name)


def from_core(weights: Mapping[str, Tensor], config: Model) -> Weights:
    """The original's weights, without its rotary tables."""
    state: Weights = {}
    for name, joint in _joints(config):
        parts = joint.split(weights[name].detach())
        state |= {part: tensor.clone().contiguous() for part, tensor in zip(joint.names, parts, strict=True)}
    return state


def rope_tables(head_dim: int, rope_dim: int, length: int, base: float) -> Weights:
    """The original's two buffers, with float32 angles as it has them."""
    return {name: _table(dim, length, base) for name, dim in zip(TABLES, (head_dim, rope_dim), strict=True)}


def _table(dim: int, length: int, base: float) -> Tensor:
    rate = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    angle = torch.outer(torch.arange(length, dtype=torch.float32), rate)
    return torch.polar(torch.ones_like(angle), angle)


def _joints(config: Model) -> Iterator[tuple[str, Joint]]:
    """Every weight of the core."""
    yield from _same(
        "", "", {"embed.weight": "embed.weight", "head.weight": "head.weight", "norm.weight": "norm.weight"}
    )
    for stage, blocks in (("prelude", config.prelude), ("coda", config.coda)):
        for i, block in enumerate(blocks):
            yield from _block(f"{stage}.{i}.", f"{stage}.{i}.", block)
    if config.loop is not None:
        yield from _block("loop.layers.0.", "recurrent.block.", config.loop.layers[0])
        yield from _loop(config.loop)


def _loop(loop: Loop) -> Iterator[tuple[str, Joint]]:
    yield from _same("loop.inject.", "recurrent.", {"norm.weight": "norm.weight"})
    yield from _same("loop.update.", "recurrent.injection.", {"log_a": "log_A", "log_dt": "log_dt", "b": "B"})
    if isinstance(loop.halt, ACT):
        yield from _same("loop.halt.score.", "recurrent.act.halt.", {"weight": "weight", "bias": "bias"})
    if isinstance(loop.adapt, DepthLoRA):
        names = {"down.weight": "down.weight", "scale": "scale.weight"}
        yield from _same("loop.adapt.", "recurrent.lora.", names)
        turned = Joint(["recurrent.lora.B"], lambda parts: parts[0].T.contiguous(), lambda whole: [whole.T])
        yield "loop.adapt.up.weight", turned


def _block(to: str, of: str, block: Block) -> Iterator[tuple[str, Joint]]:
    yield from _same(to, of, {"mixer_norm.weight": "attn_norm.weight", "ffn_norm.weight": "ffn_norm.weight"})
    mixer, ffn = block.mixer, block.ffn
    if isinstance(mixer, MLA):
        yield from _same(f"{to}mixer.", f"{of}attn.", LATENT)
        yield (
            f"{to}mixer.q_up.weight",
            _by_head([f"{of}attn.q_up_nope.weight", f"{of}attn.q_up_rope.weight"], mixer),
        )
    else:
        yield from _same(f"{to}mixer.", f"{of}attn.", GROUPED)
    if isinstance(ffn, MoE):
        yield from _experts(f"{to}ffn.", f"{of}ffn.", ffn)
    else:
        yield f"{to}ffn.gate_up.weight", _stacked([f"{of}ffn.gate.weight", f"{of}ffn.up.weight"])
        yield from _same(f"{to}ffn.", f"{of}ffn.", {"down.weight": "down.weight"})


def _experts(to: str, of: str, moe: MoE) -> Iterator[tuple[str, Joint]]:
    def names(kind: str, count: int, *parts: str) -> list[str]:
        return [f"{of}{kind}_experts.{n}.{part}.weight" for n in range(count) for part in parts]

    yield from _same(to, of, {"router": "router.weight", "bias": "router_bias"})
    pairs, downs = names("routed", moe.experts, "gate", "up"), names("routed", moe.experts, "down")
    yield f"{to}gate_up", _stacked(pairs, groups=moe.experts)
    yield f"{to}down", _stacked(downs, groups=moe.experts)
    if moe.shared:
        gates, ups = names("shared", moe.shared, "gate"), names("shared", moe.shared, "up")
        yield f"{to}shared_gate_up.weight", _stacked(gates + ups)
        yield f"{to}shared_down.weight", _stacked(names("shared", moe.shared, "down"), dim=1)


def _same(to: str, of: str, names: Mapping[str, str]) -> Iterator[tuple[str, Joint]]:
    """Weights that only change their name."""
    for mine, theirs in names.items():
        yield to + mine, Joint([of + theirs], lambda parts: parts[0].clone(), lambda whole: [whole])


def _stacked(names: list[str], groups: int | None = None, dim: int = 0) -> Joint:
    """Equal matrices one after the other along `dim`; with `groups`, as a batch of that many."""

    def join(parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts, dim)
        return whole if groups is None else whole.unflatten(0, (groups, -1))

    def split(whole: Tensor) -> list[Tensor]:
        return list((whole if groups is None else whole.flatten(0, 1)).chunk(len(names), dim))

    return Joint(names, join, split)


def _by_head(names: list[str], mla: MLA) -> Joint:
    """Two maps of all heads, woven into one: head by head its part of the first, then of the second."""

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (mla.heads, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(whole: Tensor) -> list[Tensor]:
        heads = whole.unflatten(0, (mla.heads, -1))
        return [part.flatten(0, 1) for part in heads.split([mla.nope_dim, mla.rope_dim], dim=1)]

    return Joint(names, join, split)


def _check_shapes(state: Mapping[str, Tensor], config: Model) -> None:
    with torch.device("meta"):
        made = from_core(config.build().state_dict(), config)
    for name, like in made.items():
        if name in state and state[name].shape != like.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, but this config makes it {tuple(like.shape)}"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
