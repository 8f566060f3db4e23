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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_mythos.loop.adapt import DepthLoRA
from open_mythos.loop.core import Loop
from open_mythos.loop.halt import ACT
from open_mythos.model import Model
from open_mythos.nn.attention import MLA, Mixer
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
WRAPPERS = ["module.", "_orig_mod.", "model."]  # of DataParallel, of a compiler, of a training script
Weights = dict[str, Tensor]


class Joint(NamedTuple):
    """How one weight of the core is made of the original's, and taken apart again."""

    names: list[str]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


class Joints(NamedTuple):
    """Of a module: how each of its core's weights is made, and what of the original's it can do without."""

    joints: dict[str, Joint]
    idle: Callable[[str, object], bool] = lambda name, weight: False


def plain_weights(state: object) -> dict[str, Tensor]:
    """Weights by the original's names, out of what people save: also a training script's checkpoint with its
    weights under "model", and names that a wrapper put its own before.

    Raises `ValueError` for what is no mapping of names to tensors.
    """
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(weight, Tensor) for weight in state.values()):
        raise ValueError(
            f"expected a mapping of names to tensors, as state_dict() gives it; got {_kinds(state)}"
        )
    weights: dict[str, Tensor] = dict(state)
    for wrapper in WRAPPERS * 2:
        if weights and all(name.startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): weight for name, weight in weights.items()}
    return weights


def to_core(state: Mapping[str, Tensor], config: Model) -> Weights:
    """The core's weights. Raises `ValueError` for missing, unknown and misshapen ones."""
    joints, idle = joints_of(config)
    if "embed.weight" in state:  # the two are one tensor; the package loads the head's last, if it is there
        tied = state.get("head.weight", state["embed.weight"])
        state = {**state, "embed.weight": tied, "head.weight": tied}
    wanted = {name for joint in joints.values() for name in joint.names}
    given = {name for name in state if name in wanted or not idle(name, state[name])}
    missing, unknown = sorted(wanted - given), sorted(given - wanted)
    if missing:
        raise ValueError(
            f"these weights are missing: {_some(missing)}; is the config the one they were made with?"
        )
    if unknown:
        raise ValueError(f"this config has no place for {_some(unknown)}; is it the one they were made with?")
    _check_shapes(state, config)
    return {name: joint.join([state[part] for part in joint.names]) for name, joint in joints.items()}


def joints_of(config: Model, prefix: str = "") -> Joints:
    """A whole model's; `prefix` stands before its core's names."""
    no_act = config.loop is not None and not isinstance(config.loop.halt, ACT)

    def idle(name: str, weight: object) -> bool:
        """Rotary tables, an adapter of rank 0, and the weights of a halting that the config does not use."""
        nothing = ".lora." in name and isinstance(weight, Tensor) and weight.numel() == 0
        return name in TABLES or nothing or (no_act and ".act." in name)

    return Joints({prefix + name: joint for name, joint in _joints(config)}, idle)


def name_back(state: dict[str, Any], prefix: str, joints: Mapping[str, Joint]) -> None:
    """In `state`, the core's weights under `prefix` become the original's."""
    for mine, joint in joints.items():
        parts = joint.split(state.pop(prefix + mine))
        state |= {prefix + name: part.contiguous() for name, part in zip(joint.names, parts, strict=True)}


def adopt(
    state: dict[str, Any], prefix: str, wanted: Joints, held: Mapping[str, Tensor], missing: list[str]
) -> list[str]:
    """In `state`, the original's weights under `prefix` become the core's; what one of these needs and is not
    given is `missing`, and stays as it is `held`. Returns complaints about shapes."""
    complaints = []
    for mine, joint in wanted.joints.items():
        here = [name for name in joint.names if isinstance(state.get(prefix + name), Tensor)]
        given = {name: state.pop(prefix + name) for name in here}
        if not given:
            continue
        missing += (prefix + name for name in joint.names if name not in given)
        if held[mine].is_meta and len(given) < len(joint.names):  # there are no numbers to complete it with
            continue
        whole = dict(zip(joint.names, joint.split(held[mine].detach()), strict=True))
        misfits = [name for name, weight in given.items() if weight.shape != whole[name].shape]
        complaints += [
            f"{prefix}{name} has shape {tuple(given[name].shape)}, but here it is {tuple(whole[name].shape)}"
            for name in misfits
        ]
        if not misfits:
            state[prefix + mine] = joint.join([(whole | given)[name] for name in joint.names])
    for name in [name for name in state if name.startswith(prefix)]:
        if wanted.idle(name.removeprefix(prefix), state[name]):
            del state[name]
    return complaints


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
            yield from joints_of_block(f"{stage}.{i}.", f"{stage}.{i}.", block)
    if config.loop is not None:
        yield from joints_of_loop("loop.", "recurrent.", config.loop)


def joints_of_loop(to: str, of: str, loop: Loop) -> Iterator[tuple[str, Joint]]:
    yield from joints_of_block(f"{to}layers.0.", f"{of}block.", loop.layers[0])
    yield from _same(f"{to}inject.", of, {"norm.weight": "norm.weight"})
    yield from joints_of_injection(f"{to}update.", f"{of}injection.")
    if isinstance(loop.halt, ACT):
        yield from joints_of_halting(f"{to}halt.", f"{of}act.")
    if isinstance(loop.adapt, DepthLoRA):
        yield from joints_of_lora(f"{to}adapt.", f"{of}lora.")


def joints_of_injection(to: str, of: str) -> Iterator[tuple[str, Joint]]:
    return _same(to, of, {"log_a": "log_A", "log_dt": "log_dt", "b": "B"})


def joints_of_halting(to: str, of: str) -> Iterator[tuple[str, Joint]]:
    return _same(f"{to}score.", f"{of}halt.", {"weight": "weight", "bias": "bias"})


def joints_of_lora(to: str, of: str) -> Iterator[tuple[str, Joint]]:
    yield from _same(to, of, {"down.weight": "down.weight", "scale": "scale.weight"})
    yield f"{to}up.weight", Joint([f"{of}B"], lambda parts: parts[0].T.contiguous(), lambda whole: [whole.T])


def joints_of_block(to: str, of: str, block: Block) -> Iterator[tuple[str, Joint]]:
    yield from _same(to, of, {"mixer_norm.weight": "attn_norm.weight", "ffn_norm.weight": "ffn_norm.weight"})
    yield from joints_of_mixer(f"{to}mixer.", f"{of}attn.", block.mixer)
    if isinstance(block.ffn, MoE):
        yield from joints_of_experts(f"{to}ffn.", f"{of}ffn.", block.ffn)
    else:
        yield f"{to}ffn.gate_up.weight", _stacked([f"{of}ffn.gate.weight", f"{of}ffn.up.weight"])
        yield from _same(f"{to}ffn.", f"{of}ffn.", {"down.weight": "down.weight"})


def joints_of_mixer(to: str, of: str, mixer: Mixer) -> Iterator[tuple[str, Joint]]:
    if isinstance(mixer, MLA):
        yield from _same(to, of, LATENT)
        yield f"{to}q_up.weight", _by_head([f"{of}q_up_nope.weight", f"{of}q_up_rope.weight"], mixer)
    else:
        yield from _same(to, of, GROUPED)


def joints_of_experts(to: str, of: str, moe: MoE) -> Iterator[tuple[str, Joint]]:
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


def _kinds(state: object) -> str:
    if not isinstance(state, Mapping):
        return type(state).__name__
    odd = next(name for name, weight in state.items() if not isinstance(weight, Tensor))
    return f"{type(state[odd]).__name__} under {odd!r}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
