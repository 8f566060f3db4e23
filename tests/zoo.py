"""Tiny models in which every member of every union occurs, beside the families of `tiny.py`.

The unions are asked for their members, so a new variant meets every law by being in its union; if it has
fields without a default, give them in NEEDS. Model i of MIXED takes the i-th member of every seam.
"""

from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from open_mythos.config import Config
from open_mythos.loop import halt, inject, mark, route, schedule, start
from open_mythos.loop.core import Loop
from open_mythos.model import FinalNorm, LoopedLM, Matrix, Model
from open_mythos.nn import attention, block, ffn, init, linear, norm, rope
from tests import tiny as tiny_models
from tests.tiny import DIM, EXPERTS, GROUPED, LATENT, MODELS, VOCAB, tiny

NEEDS: dict[str, dict[str, Any]] = {
    "GQA": {"heads": 4, "kv_heads": 2},
    "MLA": vars(LATENT),
    "SwiGLU": {"width": 48},
    "MLP": {"width": 48},
    "MoE": vars(EXPERTS),
    "LoRA": {"rank": 2, "steps": 2},
    "ScaledNormal": {"layers": 5},
    "StepTable": {"steps": 2},
    "DepthLoRA": {"rank": 3, "steps": 2},
    "DepthAttention": {"heads": 2, "steps": 2},
    "TokenChoice": {"depths": 3},
    "Fixed": {"steps": 3},
    "Uniform": {"low": 2, "high": 4},
    "Poisson": {"mean": 3},
    "LogNormalPoisson": {"mean": 3},
    "Ramp": {"of": schedule.Poisson(mean=3)},
} | {kind.__name__: {"mixer": GROUPED, "ffn": EXPERTS} for kind in get_args(block.Block)}


def every(union: object) -> list[Any]:
    """A config of each member. Raises `TypeError` for one that needs more than NEEDS has."""
    return [_toy(kind) for kind in get_args(union) if kind is not type(None)]


def _toy(kind: Any) -> Any:
    try:
        return kind(**NEEDS.get(kind.__name__, {}))
    except TypeError as error:
        raise TypeError(f"{error}; give {kind.__name__}'s fields in NEEDS of tests/zoo.py") from None


LINEARS = every(linear.Linear)
# Options that change how a variant works, beside its defaults.
MORE: dict[str, list[Any]] = {
    "mark": [mark.StepSinusoid(channels=9, relative=True), mark.PositionStep(steps=2)],
    "halt": [
        halt.ACT(threshold=0.8, as_released=True),
        halt.UniversalACT(mix="accumulated", freeze=True),
        halt.ExitGate(threshold=0.8),
    ],
}
SEAMS: dict[str, list[Any]] = {
    name: every(union) + MORE.get(name, [])
    for name, union in get_type_hints(Loop).items()
    if name not in ("layers", "route")
}
MIXERS: list[Any] = [
    *every(attention.Mixer),
    attention.GQA(heads=4, head_norm=attention.HeadNorm(), bias=True, rope=rope.Rope(pairs="halves")),
    LATENT.replace(linear=LINEARS[-1]),
    attention.GQA(heads=2, kv_heads=1, head_dim=12, rope=None, out_bias=True, linear=LINEARS[-1]),
    attention.GQA(heads=4, head_norm=attention.HeadNorm(steps=2, whole=True)),
]
FFNS: list[Any] = [
    *every(ffn.FFN),
    ffn.MLP(width=48, activation="silu", bias=True, linear=LINEARS[-1]),
    EXPERTS.replace(balance=0.1, shared=0),
]
BLOCKS: list[Any] = [*every(block.Block), block.PreNorm(mixer=GROUPED, ffn=EXPERTS, scale=0.5)]
NORMS, INITS, LEAVES = every(norm.Norm), every(init.Init), [FinalNorm(), Matrix(), None]


def mixed(i: int) -> Model:
    def pick(options: list[Any], shift: int = 0) -> Any:
        return options[(i + shift) % len(options)]

    seams = {name: pick(options) for name, options in SEAMS.items()}
    if isinstance(seams["inject"], inject.Nothing):
        seams["start"] = start.Embedded()  # or the loop would never see its input
    layer = pick(BLOCKS).replace(mixer=pick(MIXERS), ffn=pick(FFNS), norm=pick(NORMS))
    plain = block.PreNorm(mixer=GROUPED, ffn=ffn.SwiGLU(width=48), norm=pick(NORMS, 1))
    return Model(
        vocab=VOCAB,
        dim=DIM,
        prelude=(plain,),
        enter=pick([None, *NORMS]),
        loop=Loop(layers=(layer,), **seams),
        leave=pick(LEAVES),
        coda=(plain,),
        norm=pick(NORMS),
        tied=i % 2 == 0,
        init=pick(INITS),
    )


LONGEST = max(map(len, [*SEAMS.values(), MIXERS, FFNS, BLOCKS, INITS]))
MIXED = {f"mixed-{i}": mixed(i) for i in range(LONGEST)}
# Apart from the mixture: a token that no step takes has nothing for the other seams to act on.
ROUTED = tiny_models.ROUTED | {
    f"routed-{type(routing).__name__}": tiny(Loop(layers=(BLOCKS[0],), inject=inject.Add(), route=routing))
    for routing in every(route.Routing)
}
EVERY = MODELS | MIXED | ROUTED
LOOPED = {name: config for name, config in EVERY.items() if config.loop is not None}


def awake(config: Model, seed: int = 0) -> LoopedLM:
    """A model in which nothing is zero or one because it was just made; in eval mode."""
    torch.manual_seed(seed)
    model = config.build().eval()
    with torch.no_grad():
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            tensor.add_(0.15 * torch.randn_like(tensor))
    return model


def words(rows: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: LoopedLM) -> dict[str, Tensor]:
    """Those that there are, by parameter name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def parts(config: Config) -> list[Config]:
    """The config and everything nested in it."""
    values = [v for value in vars(config).values() for v in (value if isinstance(value, tuple) else (value,))]
    return [config] + [part for value in values if isinstance(value, Config) for part in parts(value)]


def close(given: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Equal up to rounding, for tensors and dicts of them."""
    torch.testing.assert_close(given, expected, rtol=10 * tolerance, atol=tolerance)
