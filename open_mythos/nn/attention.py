"""How tokens exchange information.

    GQA    heads share keys and values in groups       Ainslie et al. 2023 (arXiv 2305.13245)
           with as many groups as heads it is the attention of Vaswani et al. 2017 (arXiv 1706.03762)
    MLA    keys and values of all heads are read off one small latent per token
           DeepSeek-AI 2024 (arXiv 2405.04434), eqs. 9-19

MLA remembers the latent and one rotary key per token, for all heads together. With tokens to look back
on, it does not rebuild their keys and values: the map from latent to keys is absorbed into the
query and the one to values into the output (`absorbed`), unless so many tokens arrive at once that
rebuilding costs less. Law: both ways agree (tests/unit/nn/test_attention.py).
"""

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from open_mythos.config import Config
from open_mythos.nn.attend import attend, attend_latents
from open_mythos.nn.context import Context
from open_mythos.nn.ffn import check_dropout
from open_mythos.nn.linear import Linear, Plain
from open_mythos.nn.norm import RootMeanSquareNorm, rms_norm
from open_mythos.nn.precision import lowered
from open_mythos.nn.rope import Rope
from open_mythos.shapes import Hidden, Keys, Mixed, Queries, Values

Latents = Float[Tensor, "B S W"]  # per token: the latent of all heads, then their one rotary key
# Of each query, what meets the latent and what meets the rotary key.
Halves = tuple[Float[Tensor, "B H T nope"], Float[Tensor, "B H T rope"]]


class HeadNorm(Config):
    """Queries and keys are brought to unit scale per head, before or after rotation.

    Henry et al. 2020 (arXiv 2010.04245); after rotation and without weights in Parcae; over all heads
    together (`whole`) in OLMo 2 (arXiv 2501.00656). With `steps`, every step of a loop has gains of its own,
    and steps past the last go on with that one's.
    """

    eps: float = 1e-6
    weight: bool = True
    after_rotation: bool = False
    whole: bool = False
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"HeadNorm.steps must be at least 1, got {self.steps}")

    def build(self, heads: int, width: int) -> "HeadNormalisation":
        return HeadNormalisation(self, heads, width)


class ValueEmbedding(Config):
    """values += 2 sigmoid(W x[:gate]) * table[token], one gate per key/value head.

    Zhou et al. 2024 (arXiv 2410.17897), in the gated form of Parcae (arXiv 2604.12946).
    """

    vocab: int
    gate: int = 32


class GQA(Config):
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    rope: Rope | None = Rope()
    attention: Literal["causal", "full"] = "causal"
    bias: bool = False  # on queries, keys and values
    out_bias: bool = False
    qk_bias: bool = False
    head_norm: HeadNorm | None = None
    values: ValueEmbedding | None = None
    linear: Linear = Plain()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        if self.heads < 1 or kv_heads < 1 or self.heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {kv_heads}")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"GQA.head_dim must be at least 1, got {self.head_dim}")
        check_dropout(self)

    def build(self, dim: int) -> "GroupedAttention":
        return GroupedAttention(self, dim)


class MLA(Config):
    heads: int
    q_rank: int
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    rope: Rope = Rope()
    eps: float = 1e-6
    dropout: float = 0.0
    linear: Linear = Plain()

    def __post_init__(self) -> None:
        for name in ("heads", "q_rank", "kv_rank", "rope_dim", "nope_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"MLA.{name} must be at least 1, got {getattr(self, name)}")
        if self.rope_dim % 2:
            raise ValueError(f"MLA.rope_dim must be even to form pairs, got {self.rope_dim}")
        check_dropout(self)

    def build(self, dim: int) -> "LatentAttention":
        return LatentAttention(self, dim)


@final
class GroupedAttention(nn.Module):
    def __init__(self, config: GQA, dim: int) -> None:
        super().__init__()
        if config.head_dim is None and dim % config.heads:
            raise ValueError(f"dim={dim} is no multiple of heads={config.heads}; set head_dim or change one")
        self.config = config
        self.width = config.head_dim or dim // config.heads
        if config.rope is not None and self.width % 2:
            raise ValueError(f"rotary embedding turns pairs of channels; head_dim={self.width} is not even")
        self.kv_heads = config.kv_heads or config.heads
        build, norm = config.linear.build, config.head_norm
        self.q = build(dim, config.heads * self.width, bias=config.bias)
        self.k = build(dim, self.kv_heads * self.width, bias=config.bias)
        self.v = build(dim, self.kv_heads * self.width, bias=config.bias)
        self.out = build(config.heads * self.width, dim, bias=config.out_bias, residual=True)
        self.q_bias = nn.Parameter(torch.empty(config.heads, self.width)) if config.qk_bias else None
        self.k_bias = nn.Parameter(torch.empty(self.kv_heads, self.width)) if config.qk_bias else None
        self.q_norm = norm.build(config.heads, self.width) if norm else None
        self.k_norm = norm.build(self.kv_heads, self.width) if norm else None
        self.values = TokenValues(config.values, self.kv_heads, self.width) if config.values else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for bias in (self.q_bias, self.k_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        x = lowered(x)
        q = self._place(self._heads(self.q(x, ctx), self.q_bias), self.q_norm, ctx)
        k = self._place(self._heads(self.k(x, ctx), self.k_bias), self.k_norm, ctx)
        v = self._heads(self.v(x, ctx), None)
        if self.values is not None:
            v = v + self.values(x, ctx)
        k, v = self._remember(k, v, ctx)
        dropout = self.config.dropout if self.training else 0.0
        mixed = attend(q, k, v, ctx.sight(self.config.attention), dropout=dropout)
        return self.out(mixed.transpose(1, 2).flatten(-2), ctx)

    def _heads(self, x: Float[Tensor, "B T HK"], bias: Float[Tensor, "H K"] | None) -> Queries:
        heads = x.unflatten(-1, (-1, self.width))  # B T H K
        return (heads if bias is None else heads + bias.to(x.dtype)).transpose(1, 2)

    def _place(self, x: Queries, norm: "HeadNormalisation | None", ctx: Context) -> Queries:
        """Normalise and rotate, in the configured order."""
        late = norm is not None and norm.config.after_rotation
        x = x if norm is None or late else norm(x, ctx)
        x = x if self.config.rope is None else self.config.rope(x, ctx)
        return norm(x, ctx) if norm is not None and late else x

    def _remember(
        self, k: Float[Tensor, "B G T K"], v: Float[Tensor, "B G T Kv"], ctx: Context
    ) -> tuple[Keys, Values]:
        if ctx.cache is None:
            return k, v
        held_k, held_v = ctx.extend(k, part=0), ctx.extend(v, part=1)
        return (k, v) if ctx.fresh else (held_k.to(k.dtype), held_v.to(v.dtype))


@final
class HeadNormalisation(nn.Module):
    def __init__(self, config: HeadNorm, heads: int, width: int) -> None:
        super().__init__()
        self.config = config
        size = heads * width if config.whole else width
        shape = (size,) if config.steps is None else (config.steps, size)
        self.weight = nn.Parameter(torch.empty(shape)) if config.weight else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Queries, ctx: Context) -> Queries:
        if not self.config.whole:
            return self._scaled(x, ctx)
        rows = self._scaled(x.transpose(1, 2).flatten(-2), ctx)  # B T HK
        return rows.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)

    def _scaled(self, x: Float[Tensor, "B ... N"], ctx: Context) -> Float[Tensor, "B ... N"]:
        if self.weight is None or self.config.steps is None:
            return rms_norm(x, self.weight, self.config.eps)
        if ctx.step is None:
            raise ValueError("this head norm differs by step, so it can only be used inside a loop")
        gains = self.weight[ctx.step.clamp_max(self.config.steps - 1)].to(x.dtype)
        gains = gains.view(len(gains), *(x.ndim - 2) * [1], -1)
        return rms_norm(x, None, self.config.eps) * gains


@final
class TokenValues(nn.Module):
    def __init__(self, config: ValueEmbedding, kv_heads: int, width: int) -> None:
        super().__init__()
        self.config, self.kv_heads = config, kv_heads
        self.table = nn.Embedding(config.vocab, kv_heads * width)
        self.gate = nn.Linear(config.gate, kv_heads, bias=False)

    def forward(self, x: Hidden, ctx: Context) -> Values:
        if ctx.tokens is None:
            raise ValueError("value embeddings look up tokens, so the context must carry them")
        tokens = ctx.tokens
        values = self.table(tokens).unflatten(-1, (self.kv_heads, -1))  # B T G K
        gate = 2 * self.gate(x[..., : self.config.gate]).sigmoid()
        return (gate[..., None] * values).transpose(1, 2)


@final
class LatentAttention(nn.Module):
    def __init__(self, config: MLA, dim: int) -> None:
        super().__init__()
        self.config = c = config
        build = config.linear.build
        self.q_down = build(dim, c.q_rank)
        self.q_norm = RootMeanSquareNorm(c.q_rank, c.eps)
        self.q_up = build(c.q_rank, c.heads * (c.nope_dim + c.rope_dim))  # per head: nope, rope
        self.kv_down = build(dim, c.kv_rank + c.rope_dim)
        self.kv_norm = RootMeanSquareNorm(c.kv_rank, c.eps)
        self.kv_up = Plain().build(c.kv_rank, c.heads * (c.nope_dim + c.value_dim))  # per head: key, value
        self.out = build(c.heads * c.value_dim, dim, residual=True)
        self.scale = (c.nope_dim + c.rope_dim) ** -0.5

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        q, entry = self._project(lowered(x), ctx)
        held = ctx.extend(entry).to(entry.dtype)
        dropout = self.config.dropout if self.training else 0.0
        if ctx.fresh or dropout or not self._absorbing_is_cheaper(x.shape[1], held.shape[1]):
            mixed = self.rebuilt(q, entry if ctx.fresh else held, ctx, dropout)
        else:
            mixed = self.absorbed(q, held, ctx)
        return self.out(mixed.transpose(1, 2).flatten(-2), ctx)

    def rebuilt(self, q: Halves, held: Latents, ctx: Context, dropout: float = 0.0) -> Mixed:
        """Keys and values of every head, then ordinary attention."""
        c = self.config
        latent, k_rope = held.split_with_sizes((c.kv_rank, c.rope_dim), -1)
        kv = self.kv_up(latent).unflatten(-1, (c.heads, -1)).transpose(1, 2)  # B H S nope+value
        k_nope, v = kv.split_with_sizes((c.nope_dim, c.value_dim), -1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, c.heads, -1, -1)], dim=-1)
        return attend(torch.cat(q, dim=-1), k, v, ctx.sight(), self.scale, dropout)

    def absorbed(self, q: Halves, held: Latents, ctx: Context) -> Mixed:
        """Attention among latents: one key/value head of width kv_rank + rope_dim for all query heads."""
        c, (q_nope, q_rope) = self.config, q
        up = ctx.cast(self.kv_up.weight, q_nope.dtype).view(c.heads, -1, c.kv_rank)
        to_key, to_value = up.split_with_sizes((c.nope_dim, c.value_dim), 1)  # H nope R, H value R
        query = torch.cat([_per_head(q_nope, to_key), q_rope], dim=-1)  # B H T W
        mixed = attend_latents(query, held[:, None], c.kv_rank, ctx.sight(), self.scale)
        return _per_head(mixed, to_value.mT)

    def _project(self, x: Hidden, ctx: Context) -> tuple[Halves, Latents]:
        c = self.config
        q = self.q_up(self.q_norm(self.q_down(x, ctx)), ctx).view(*x.shape[:2], c.heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split_with_sizes((c.nope_dim, c.rope_dim), -1)
        latent, k_rope = self.kv_down(x, ctx).split_with_sizes((c.kv_rank, c.rope_dim), -1)
        turned = c.rope(k_rope[:, None], ctx)[:, 0]
        return (q_nope, c.rope(q_rope, ctx)), torch.cat([self.kv_norm(latent), turned], -1)

    def _absorbing_is_cheaper(self, asked: int, held: int) -> bool:
        """Multiplications per head: attention in the latent's width, or rebuilding every key and value."""
        c = self.config
        head = c.nope_dim + c.value_dim
        absorbed = asked * held * (2 * c.kv_rank + c.rope_dim) + asked * c.kv_rank * head
        rebuilt = asked * held * (head + c.rope_dim) + held * c.kv_rank * head
        return absorbed <= rebuilt


def _per_head(x: Float[Tensor, "B H T I"], maps: Float[Tensor, "H I O"]) -> Float[Tensor, "B H T O"]:
    """Each head through its own matrix; a plain product would copy the matrices for every sequence."""
    rows = torch.bmm(x.transpose(0, 1).flatten(1, 2), maps)  # H B*T O
    return rows.view(x.shape[1], x.shape[0], x.shape[2], -1).transpose(0, 1)


Mixer = GQA | MLA
