"""`MythosConfig`: the original's flat settings, turned into a `Model` of the core.

Names, order and defaults are those of the package open-mythos 0.5.0; two fields are new and come last. In
the letters of `loop.core` an OpenMythos is

    mark StepSinusoid    inject NormedAdd    layers one PreNorm block with MoE
    adapt DepthLoRA      update LTI          halt ACT

`released=True` repeats what the package did where that was wrong; docs/compatibility.md lists it.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isinf
from numbers import Integral, Real
from typing import Any

from open_mythos.loop.adapt import Adaptation, DepthLoRA, Unadapted
from open_mythos.loop.core import Loop
from open_mythos.loop.halt import ACT, Halting, Last
from open_mythos.loop.inject import NormedAdd
from open_mythos.loop.mark import StepSinusoid
from open_mythos.loop.schedule import Fixed
from open_mythos.loop.update import LTI
from open_mythos.model import Model
from open_mythos.nn.attention import GQA, MLA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import FFN, SwiGLU
from open_mythos.nn.moe import MoE
from open_mythos.nn.rope import Rope

MAY_BE_ZERO = {"prelude_layers", "coda_layers", "n_shared_experts", "lora_rank"}
MLA_ONLY = {"kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"}
CHOICES = {"attn_type": ("gqa", "mla"), "halting": ("act", "last")}


@dataclass
class MythosConfig:
    """The hyperparameters of an `OpenMythos`.

    Raises `ValueError` for unknown fields and for values that no model can be built from.
    """

    vocab_size: int = 32000
    dim: int = 2048
    n_heads: int = 16
    n_kv_heads: int = 4  # GQA only
    max_seq_len: int = 4096  # tokens a sequence may have
    max_loop_iters: int = 16  # loops unless told otherwise; more are always allowed
    prelude_layers: int = 2
    coda_layers: int = 2
    attn_type: str = "mla"  # or "gqa"
    kv_lora_rank: int = 512  # MLA only, as the next four
    q_lora_rank: int = 1536
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    n_experts: int = 64
    n_shared_experts: int = 2  # each as wide as all the chosen experts together
    n_experts_per_tok: int = 4
    expert_dim: int = 512
    act_threshold: float = 0.99
    rope_theta: float = 500000.0
    lora_rank: int = 16  # 0 for a loop without the depth-wise adapter
    max_output_tokens: int = 4096  # for servers; `generate` is bound by max_seq_len only
    dropout: float = 0.0
    released: bool = False  # behave as open-mythos 0.5.0 did where it was wrong
    halting: str = "act"  # or "last": every loop counts, and the last state is the answer

    def __new__(cls, *values: Any, **given: Any) -> "MythosConfig":
        for name in given:
            if name not in cls.__dataclass_fields__:
                close = difflib.get_close_matches(name, cls.__dataclass_fields__, n=1)
                hint = (
                    f"did you mean {close[0]!r}?"
                    if close
                    else f"it has {', '.join(cls.__dataclass_fields__)}"
                )
                raise ValueError(f"MythosConfig has no field {name!r}; {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.check()

    @classmethod
    def of(cls, settings: "MythosConfig | Mapping[str, Any] | object", **changes: Any) -> "MythosConfig":
        """From another config, a mapping of its fields, or the original package's own config object."""
        if settings is None or not (isinstance(settings, Mapping) or hasattr(settings, "__dict__")):
            raise TypeError(
                f"expected a MythosConfig or a mapping of its fields, got {type(settings).__name__}"
            )
        known = settings if isinstance(settings, Mapping) else vars(settings)
        return cls(**{**known, **changes})

    def check(self) -> None:
        """Raise `ValueError` unless a model can be built from these settings."""
        for name, choices in CHOICES.items():
            _one_of(name, getattr(self, name), choices)
        for field in fields(self):
            if field.type is int and not (field.name in MLA_ONLY and self.attn_type != "mla"):
                _whole(field.name, getattr(self, field.name), 0 if field.name in MAY_BE_ZERO else 1)
        for name, low, high in (
            ("act_threshold", 0, 1),
            ("rope_theta", 0, float("inf")),
            ("dropout", -1e-9, 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, Real) or not low < float(value) <= high or isinf(value):
                raise ValueError(f"{name} should lie between {max(low, 0)} and {high}, got {value!r}")
        if not isinstance(self.released, bool):
            raise ValueError(f"released should be True or False, got {self.released!r}")
        self._check_heads()
        if self.n_experts_per_tok > self.n_experts:
            raise ValueError(
                f"n_experts_per_tok={self.n_experts_per_tok} is more than n_experts={self.n_experts} experts"
            )

    def _check_heads(self) -> None:
        if self.attn_type == "mla":
            width, name = self.qk_rope_head_dim, "qk_rope_head_dim"
        else:
            if self.dim % self.n_heads:
                raise ValueError(f"dim={self.dim} should be a multiple of n_heads={self.n_heads}")
            if self.n_heads % self.n_kv_heads:
                raise ValueError(
                    f"n_heads={self.n_heads} should be a multiple of n_kv_heads={self.n_kv_heads}"
                )
            width, name = self.dim // self.n_heads, "dim / n_heads"
        if width % 2:
            raise ValueError(
                f"rotary embedding turns pairs of channels, so {name} should be even, got {width}"
            )

    def model(self) -> Model:
        """The same architecture as a config of the core."""
        self.check()
        dense = self.block(moe=False)
        return Model(
            vocab=self.vocab_size,
            dim=self.dim,
            context=self.max_seq_len,
            prelude=(dense,) * self.prelude_layers,
            loop=self.loop(),
            coda=(dense,) * self.coda_layers,
        )

    def loop(self) -> Loop:
        return Loop(
            layers=(self.block(moe=True),),
            mark=StepSinusoid(relative=not self.released),
            inject=NormedAdd(),
            adapt=self._adapt(),
            update=LTI(),
            halt=self._halt(),
            schedule=Fixed(steps=self.max_loop_iters),
        )

    def block(self, moe: bool) -> PreNorm:
        ffn: FFN = self.experts() if moe else SwiGLU(width=self.dim * 4 // 3)
        return PreNorm(mixer=self.mixer(), ffn=ffn, dropout=self.dropout)

    def mixer(self) -> GQA | MLA:
        rope = Rope(base=float(self.rope_theta))
        if self.attn_type == "gqa":
            return GQA(heads=self.n_heads, kv_heads=self.n_kv_heads, rope=rope, dropout=self.dropout)
        return MLA(
            heads=self.n_heads,
            q_rank=self.q_lora_rank,
            kv_rank=self.kv_lora_rank,
            rope_dim=self.qk_rope_head_dim,
            nope_dim=self.qk_nope_head_dim,
            value_dim=self.v_head_dim,
            rope=rope,
            dropout=self.dropout,
        )

    def experts(self) -> MoE:
        return MoE(
            experts=self.n_experts,
            chosen=self.n_experts_per_tok,
            width=self.expert_dim,
            shared=self.n_shared_experts,
        )

    def _adapt(self) -> Adaptation:
        if not self.lora_rank:
            return Unadapted()
        # The package meant N(0, 1) and then shrank the scales with all other tables.
        return DepthLoRA(rank=self.lora_rank, steps=self.max_loop_iters, scale=0.02 if self.released else 1.0)

    def _halt(self) -> Halting:
        if self.halting == "last":
            return Last()
        return ACT(threshold=self.act_threshold, as_released=self.released)


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value).lower(), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} should be {' or '.join(map(repr, choices))}, got {value!r}{hint}")


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} should be a whole number of at least {least}, got {value!r}")
