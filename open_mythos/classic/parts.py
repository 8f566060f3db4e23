"""The original's building blocks by name and call, each a thin shell around a module of the core.

    attention, block      part(x, freqs_cis, mask=None, kv_cache=None, cache_key="default")
    RecurrentBlock        part(h, e, freqs_cis, mask=None, n_loops=None, kv_cache=None)

A part made from a config owns its `core`; one that is read off a model (`model.recurrent.block.attn`) stands
before the model's own, so weights may be read and written through it. Where the core keeps several of the
original's weights in one tensor (experts, gate and up), the smaller ones are aliases: writes go through,
gradients stay with the whole. Hooks belong on the core's modules (`model.lm`), which are what runs. All are
saved and loaded under the original's names (shell.py).
"""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, final

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.classic.cache import DictCache, Entries, name_of
from open_mythos.classic.config import MythosConfig
from open_mythos.classic.shell import Part
from open_mythos.hub.original import (
    Joint,
    joints_of_block,
    joints_of_experts,
    joints_of_halting,
    joints_of_injection,
    joints_of_loop,
    joints_of_lora,
    joints_of_mixer,
)
from open_mythos.loop.adapt import DepthLoRA, LowRankAdaptation
from open_mythos.loop.core import LoopCore
from open_mythos.loop.halt import ACT, AdaptiveHalting
from open_mythos.loop.mark import step_sinusoid
from open_mythos.loop.schedule import Plan
from open_mythos.loop.state import State
from open_mythos.loop.update import LTI, LTIUpdate
from open_mythos.nn.attention import GroupedAttention, LatentAttention
from open_mythos.nn.block import PreNormBlock
from open_mythos.nn.cache import Place, Span
from open_mythos.nn.context import Context
from open_mythos.nn.linear import Projection
from open_mythos.nn.moe import MixtureOfExperts
from open_mythos.nn.norm import RootMeanSquareNorm
from open_mythos.nn.rope import Rope, rotate
from open_mythos.shapes import CacheEntry, Hidden, PerToken

RMSNorm = RootMeanSquareNorm
Table = Complex[Tensor, "S half"]  # one unit phasor per position and pair of channels
FIRST_LOOP = name_of(Place("loop"))
HIDDEN = -1e4  # additive masks hide what they lower by as much as this


def precompute_rope_freqs(dim: int, max_len: int, theta: float = 500000.0) -> Table:
    """exp(i p theta^(-2k/dim)) for positions p below `max_len`; complex64, angles taken in float64."""
    if not theta > 0:
        raise ValueError(f"theta should be positive, got {theta}")
    rate = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(max_len, dtype=torch.float64), rate)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def apply_rope(x: Float[Tensor, "B T H K"], freqs_cis: Table) -> Float[Tensor, "B T H K"]:
    """Turn adjacent pairs of channels by the first T rows of the table.

    Raises `RuntimeError` if the table has fewer than T rows.
    """
    if len(freqs_cis) < x.shape[1]:
        raise RuntimeError(f"a rotary table of {len(freqs_cis)} positions cannot turn {x.shape[1]} tokens")
    turn = freqs_cis[: x.shape[1]]
    return rotate(x.transpose(1, 2), turn.real[None, None], turn.imag[None, None], "adjacent").transpose(1, 2)


def loop_index_embedding(h: Hidden, loop_t: int, loop_dim: int, theta: float = 10000.0) -> Hidden:
    """h + [sin | cos] of the loop index on its first `loop_dim` channels.

    Raises `ValueError` if `h` has fewer.
    """
    if loop_dim > h.shape[-1]:
        raise ValueError(f"loop_dim={loop_dim} is more than the {h.shape[-1]} channels of h")
    step = torch.tensor([loop_t], device=h.device)
    return h + step_sinusoid(step, loop_dim, h.shape[-1], theta).to(h.dtype)


def _alias(weight: Float[Tensor, "O I"]) -> Projection:
    """A map whose weight is this very parameter, or the part of one that `weight` is."""
    with torch.device("meta"):
        made = Projection(weight.shape[1], weight.shape[0])
    made.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach())
    return made


def _inner(path: str) -> Any:
    """A property: what the core keeps at `path`."""
    return property(lambda part: attrgetter(path)(part.core))


class Expert(nn.Module):
    """down(silu(gate(x)) * up(x)) for x (..., dim)."""

    def __init__(self, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate, self.up = Projection(dim, expert_dim), Projection(dim, expert_dim)
        self.down = Projection(expert_dim, dim)

    @classmethod
    def alias(cls, gate_up: Tensor, down: Tensor) -> "Expert":
        """An expert whose weights are these very numbers: gate and up (2, F, D) or one below the other."""
        gate, up = gate_up if gate_up.ndim == 3 else gate_up.chunk(2)
        with torch.device("meta"):
            expert = cls(gate.shape[1], gate.shape[0])
        expert.gate, expert.up, expert.down = _alias(gate), _alias(up), _alias(down)
        return expert

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class MoEFFN(Part):
    """Routed experts, a few per token, and shared ones that are always on."""

    def __init__(self, cfg: MythosConfig, core: MixtureOfExperts | None = None) -> None:
        super().__init__(core or cfg.experts().build(cfg.dim))
        self.n_experts, self.n_shared, self.topk = cfg.n_experts, cfg.n_shared_experts, cfg.n_experts_per_tok

    def joints(self) -> Iterator[tuple[str, Joint]]:
        return joints_of_experts("core.", "", self.core.config)

    @property
    def router(self) -> Projection:
        """Its scores choose the experts."""
        return _alias(self.core.router)

    @property
    def router_bias(self) -> Tensor:
        """Moves the choice of experts, not their weights; `core.rebalance` updates it in training."""
        bias: Tensor = self.core.bias
        return bias

    @router_bias.setter
    def router_bias(self, bias: Tensor) -> None:
        self.core.bias.copy_(bias)

    @property
    def routed_experts(self) -> nn.ModuleList:
        pairs = zip(self.core.gate_up, self.core.down, strict=True)
        return nn.ModuleList(Expert.alias(gate_up, down) for gate_up, down in pairs)

    @property
    def shared_experts(self) -> nn.ModuleList:
        if self.core.shared_gate_up is None or self.core.shared_down is None:
            return nn.ModuleList()
        pairs = self.core.shared_gate_up.weight.unflatten(0, (2, self.n_shared, -1)).transpose(0, 1)
        downs = self.core.shared_down.weight.chunk(self.n_shared, dim=1)
        return nn.ModuleList(Expert.alias(pair, down) for pair, down in zip(pairs, downs, strict=True))

    def forward(self, x: Hidden) -> Hidden:
        nowhere = Context(torch.zeros(x.shape[:2], dtype=torch.long, device=x.device))
        y: Tensor = self.core(x, nowhere)
        return y


class GQAttention(Part):
    """Grouped-query attention; remembers {"k", "v"}."""

    wq, wk, wv, wo = (_inner(name) for name in ("q", "k", "v", "out"))

    def __init__(self, cfg: MythosConfig, core: GroupedAttention | None = None) -> None:
        super().__init__(core or MythosConfig.of(cfg, attn_type="gqa").mixer().build(cfg.dim))
        self.n_heads, self.n_kv_heads = cfg.n_heads, cfg.n_kv_heads
        self.head_dim, self.groups = cfg.dim // cfg.n_heads, cfg.n_heads // cfg.n_kv_heads

    def joints(self) -> Iterator[tuple[str, Joint]]:
        return joints_of_mixer("core.", "", self.core.config)

    def forward(
        self,
        x: Hidden,
        freqs_cis: Table,
        mask: Tensor | None = None,
        kv_cache: Entries | None = None,
        cache_key: str = "default",
    ) -> Hidden:
        y: Tensor = self.core(x, _context(self.core, x, freqs_cis, mask, kv_cache, cache_key))
        return y


class MLAttention(Part):
    """Multi-head latent attention; remembers {"c_kv", "k_rope"}.

    The latent is kept normalised, and one rotary key serves all heads. The original's `q_up_nope` and
    `q_up_rope` are one map here, head by head: `q_up`.
    """

    q_down, q_norm, q_up, kv_down, kv_norm, kv_up, wo = (
        _inner(name) for name in ("q_down", "q_norm", "q_up", "kv_down", "kv_norm", "kv_up", "out")
    )

    def __init__(self, cfg: MythosConfig, core: LatentAttention | None = None) -> None:
        super().__init__(core or MythosConfig.of(cfg, attn_type="mla").mixer().build(cfg.dim))
        self.n_heads, self.kv_lora_rank, self.v_dim = cfg.n_heads, cfg.kv_lora_rank, cfg.v_head_dim
        self.qk_nope_dim, self.qk_rope_dim = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
        self.q_head_dim = self.qk_nope_dim + self.qk_rope_dim

    def joints(self) -> Iterator[tuple[str, Joint]]:
        return joints_of_mixer("core.", "", self.core.config)

    def forward(
        self,
        x: Hidden,
        freqs_cis: Table,
        mask: Tensor | None = None,
        kv_cache: Entries | None = None,
        cache_key: str = "default",
    ) -> Hidden:
        y: Tensor = self.core(x, _context(self.core, x, freqs_cis, mask, kv_cache, cache_key))
        return y


class TransformerBlock(Part):
    """Pre-norm attention, then a dense feed-forward or, with `use_moe`, a mixture of experts."""

    attn_norm, ffn_norm = _inner("mixer_norm"), _inner("ffn_norm")

    def __init__(self, cfg: MythosConfig, use_moe: bool = False, core: PreNormBlock | None = None) -> None:
        super().__init__(core or cfg.block(use_moe).build(cfg.dim))
        self.cfg = cfg

    def joints(self) -> Iterator[tuple[str, Joint]]:
        return joints_of_block("core.", "", self.core.config)

    @property
    def attn(self) -> GQAttention | MLAttention:
        kind = MLAttention if self.cfg.attn_type == "mla" else GQAttention
        return kind(self.cfg, self.core.mixer)

    @property
    def ffn(self) -> MoEFFN | Expert:
        ffn = self.core.ffn
        if isinstance(ffn, MixtureOfExperts):
            return MoEFFN(self.cfg, ffn)
        return Expert.alias(ffn.gate_up.weight, ffn.down.weight)  # its `down` is the block's own

    def forward(
        self,
        x: Hidden,
        freqs_cis: Table,
        mask: Tensor | None = None,
        kv_cache: Entries | None = None,
        cache_key: str = "default",
    ) -> Hidden:
        y: Tensor = self.core(x, _context(self.core.mixer, x, freqs_cis, mask, kv_cache, cache_key))
        return y


class LTIInjection(Part):
    """A h + B e + y, with A strictly inside (0, 1) at any parameter value."""

    log_A, log_dt, B = _inner("log_a"), _inner("log_dt"), _inner("b")  # noqa: N815 (the original's names)

    def __init__(self, dim: int, core: LTIUpdate | None = None) -> None:
        super().__init__(core or LTI().build(dim))

    def joints(self) -> Iterator[tuple[str, Joint]]:
        return joints_of_injection("core.", "")

    def get_A(self) -> Float[Tensor, "D"]:  # noqa: N802 (the original's name)
        """The diagonal of A, float32."""
        return self.core.decay()

    def forward(self, h: Hidden, e: Hidden, transformer_out: Hidden) -> Hidden:
        y: Tensor = self.core(h, e, transformer_out)
        return y


class ACTHalting(Part):
    """The probability of halting, per token, float32."""

    halt = _inner("score")

    def __init__(self, dim: int, core: AdaptiveHalting | None = None) -> None:
        super().__init__(core or ACT().build(dim))

    def joints(self) -> Iterator[tuple[str, Joint]]:
        return joints_of_halting("core.", "")

    def forward(self, h: Hidden) -> PerToken:
        return self.core.share(h)


class LoRAAdapter(Part):
    """delta(x, t) = (down(x) * scale[t]) B; loops past the last scale go on with that one."""

    down = _inner("down")

    def __init__(self, dim: int, rank: int, max_loops: int, core: LowRankAdaptation | None = None) -> None:
        super().__init__(core or DepthLoRA(rank=rank, steps=max_loops).build(dim))

    def joints(self) -> Iterator[tuple[str, Joint]]:
        return joints_of_lora("core.", "")

    @property
    def B(self) -> Tensor:  # noqa: N802 (the original's name)
        weight: Tensor = self.core.up.weight
        return weight.T

    @B.setter
    def B(self, weight: Tensor) -> None:  # noqa: N802
        with torch.no_grad():
            self.core.up.weight.copy_(weight.T)

    @property
    def scale(self) -> nn.Embedding:
        """A row per loop."""
        rows: nn.Parameter = self.core.scale
        with torch.device("meta"):
            table = nn.Embedding(rows.shape[0], rows.shape[1])
        table.weight = rows
        return table

    def forward(self, x: Float[Tensor, "... D"], loop_t: int) -> Float[Tensor, "... D"]:
        """Raises `IndexError` for a negative loop."""
        if loop_t < 0:
            raise IndexError(f"loops are counted from 0, got loop_t={loop_t}")
        rows = x.reshape(1, -1, x.shape[-1])
        return self.core.delta(rows, torch.tensor([loop_t], device=x.device)).view(x.shape)


class RecurrentBlock(Part):
    """One block, looped: h = A h + B e + block(norm(mark(h) + e)), with halting."""

    norm = _inner("inject.norm")

    def __init__(self, cfg: MythosConfig, core: LoopCore | None = None) -> None:
        super().__init__(core or cfg.loop().build(cfg.dim))
        self.cfg, self.loop_dim = cfg, cfg.dim // 8

    def joints(self) -> Iterator[tuple[str, Joint]]:
        return joints_of_loop("core.", "", self.core.config)

    @property
    def block(self) -> TransformerBlock:
        return TransformerBlock(self.cfg, True, self.core.layers[0])

    @property
    def injection(self) -> LTIInjection:
        return LTIInjection(self.cfg.dim, self.core.update)

    @property
    def act(self) -> ACTHalting | None:
        """None for a config with halting="last"."""
        return ACTHalting(self.cfg.dim, self.core.halt) if self.cfg.halting == "act" else None

    @property
    def lora(self) -> LoRAAdapter | None:
        """None for a config with lora_rank=0."""
        cfg = self.cfg
        return (
            LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters, self.core.adapt)
            if cfg.lora_rank
            else None
        )

    def forward(
        self,
        h: Hidden,
        e: Hidden,
        freqs_cis: Table,
        mask: Tensor | None = None,
        n_loops: int | None = None,
        kv_cache: Entries | None = None,
    ) -> Hidden:
        """The answer after `n_loops` loops (by default max_loop_iters). Raises `ValueError` below one."""
        steps = self.cfg.max_loop_iters if n_loops is None else n_loops
        ctx = _context(self.core.layers[0].mixer, h, freqs_cis, mask, kv_cache)
        answer: Tensor = self.core(State.begin(e, h), ctx, Plan(steps)).answer
        return answer


@final
class _Forgetful:
    """A cache that keeps nothing, and every token in the loop: what they may look at was handed in whole."""

    exact = True

    def extend(self, place: Place, new: CacheEntry, span: Span) -> CacheEntry:
        return new

    def settle(self, layers: int, taken: int, span: Span) -> None:
        """Nothing to tell."""


def _context(
    mixer: GroupedAttention | LatentAttention,
    x: Hidden,
    freqs_cis: Table,
    mask: Tensor | None,
    kv_cache: Entries | None,
    key: str | None = None,
) -> Context:
    """The core's context, with the rotation and the sight that the caller handed in already worked out."""
    tokens, (kv_rank, width) = x.shape[1], _widths(mixer)
    cache = _Forgetful() if kv_cache is None else DictCache(kv_cache, kv_rank, key)
    past = cache.length(key or FIRST_LOOP) if isinstance(cache, DictCache) else 0
    turn = _turn(freqs_cis, past, tokens)
    memo: dict[object, Tensor] = {
        _rope(mixer).key(width): torch.stack([turn.real, turn.imag])[:, None, None],  # 2 1 1 T half
        ("sight", "causal"): _visible(mask, tokens, past, x.device),
    }
    positions = torch.arange(past, past + tokens, device=x.device).expand(x.shape[:2])
    return Context(positions, None, past + tokens, cache=cache, memo=memo)


def _widths(mixer: GroupedAttention | LatentAttention) -> tuple[int, int]:
    """Of the remembered latent, if there is one, and of what is rotated."""
    if isinstance(mixer, LatentAttention):
        return mixer.config.kv_rank, mixer.config.rope_dim
    return 0, mixer.width


def _rope(mixer: GroupedAttention | LatentAttention) -> Rope:
    assert mixer.config.rope is not None
    return mixer.config.rope


def _turn(freqs_cis: Table, past: int, tokens: int) -> Complex[Tensor, "T half"]:
    """The table's rows for these tokens: all of them, or those after what is remembered."""
    turn = freqs_cis if len(freqs_cis) == tokens else freqs_cis[past : past + tokens]
    if len(turn) < tokens:
        raise ValueError(
            f"the rotary table has {len(freqs_cis)} positions; for {tokens} tokens after {past} remembered "
            f"ones give all {past + tokens}, or exactly the last {tokens}"
        )
    return turn


def _visible(mask: Tensor | None, tokens: int, past: int, device: torch.device) -> Bool[Tensor, "#B 1 T S"]:
    """True where a query may look: everywhere without a mask."""
    shape = 1, 1, tokens, past + tokens
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask <= HIDDEN)).all()):
            raise ValueError(
                "an additive mask should hold 0 where a token may look and -inf where it may not"
            )
        mask = mask == 0
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.shape[-2] == 1:  # it says which keys are there, for every query
        mask = mask.expand(-1, -1, tokens, -1)
    if mask.shape[-2:] == (tokens, tokens) and past:  # it speaks of the new tokens; all may look back
        mask = F.pad(mask, (past, 0), value=True)
    if mask.ndim != 4 or mask.shape[-2:] != shape[-2:]:
        raise ValueError(f"the mask should be (1, 1, {tokens}, {past + tokens}), got {tuple(mask.shape)}")
    return mask
