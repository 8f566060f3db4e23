"""Attention layers against their equations; the two ways of MLA agree."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from open_mythos.nn.attention import GQA, MLA, GroupedAttention, HeadNorm, LatentAttention, ValueEmbedding
from open_mythos.nn.cache import KVCache
from open_mythos.nn.context import Context
from open_mythos.nn.norm import rms_norm
from open_mythos.nn.rope import Rope
from tests.zoo import close, words

DIM = 24
CONFIG = MLA(heads=3, q_rank=10, kv_rank=8, rope_dim=4, nope_dim=6, value_dim=5)
GROUPED = {
    "plain": GQA(heads=4, kv_heads=2),
    "no rope": GQA(heads=4, rope=None),
    "full": GQA(heads=4, attention="full"),
    "biases": GQA(heads=4, kv_heads=2, bias=True, out_bias=True, qk_bias=True, head_dim=8),
    "norm before": GQA(heads=4, head_norm=HeadNorm()),
    "norm of all heads": GQA(heads=4, kv_heads=2, head_norm=HeadNorm(whole=True)),
    "norm after": GQA(
        heads=4, head_norm=HeadNorm(weight=False, after_rotation=True), rope=Rope(pairs="halves")
    ),
    "values": GQA(heads=4, kv_heads=2, values=ValueEmbedding(vocab=61, gate=8)),
}


def awake(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def by_hand(layer: GroupedAttention, config: GQA, x: Tensor, ctx: Context) -> Tensor:
    """One head and one query at a time."""
    batch, length, _ = x.shape
    width, group = layer.width, config.heads // layer.kv_heads

    def heads(linear: nn.Linear, bias: Tensor | None) -> Tensor:
        y = (linear(x)).view(batch, length, -1, width)
        return (y if bias is None else y + bias).transpose(1, 2)

    def place(y: Tensor, norm: nn.Module | None) -> Tensor:
        rotate = (lambda z: z) if config.rope is None else (lambda z: config.rope(z, ctx))
        if config.head_norm is None:
            return rotate(y)
        weight = None if norm is None else norm.weight
        if config.head_norm.whole:
            rows = y.transpose(1, 2).flatten(2)
            normed = rms_norm(rows, weight, config.head_norm.eps)
            return rotate(normed.view(batch, length, -1, width).transpose(1, 2))
        if config.head_norm.after_rotation:
            return rms_norm(rotate(y), weight, config.head_norm.eps)
        return rotate(rms_norm(y, weight, config.head_norm.eps))

    q, k = (
        place(heads(layer.q, layer.q_bias), layer.q_norm),
        place(heads(layer.k, layer.k_bias), layer.k_norm),
    )
    v = heads(layer.v, None)
    if config.values is not None:
        table = layer.values.table(ctx.tokens).view(batch, length, -1, width).transpose(1, 2)
        gate = 2 * torch.sigmoid(x[..., : config.values.gate] @ layer.values.gate.weight.mT)
        v = v + gate.mT[..., None] * table
    rows = []
    for t in range(length):
        seen = length if config.attention == "full" else t + 1
        mixed = []
        for h in range(config.heads):
            scores = (q[:, h, t, None] * k[:, h // group, :seen]).sum(-1) / width**0.5
            mixed.append((scores.softmax(-1)[..., None] * v[:, h // group, :seen]).sum(1))
        rows.append(torch.cat(mixed, dim=-1))
    return layer.out(torch.stack(rows, dim=1))


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_attention_is_its_equation(name: str) -> None:
    config = GROUPED[name]
    layer, tokens = awake(config.build(DIM)), words(2, 9)
    x, ctx = torch.randn(2, 9, DIM), Context.counting(tokens)
    close(layer(x, ctx), by_hand(layer, config, x, ctx), 1e-5)


def test_latent_attention_is_its_equation() -> None:
    """arXiv 2405.04434, eqs. 9-19, one head and one query at a time."""
    layer, c = awake(CONFIG.build(DIM)), CONFIG
    x, ctx = torch.randn(2, 9, DIM), Context.counting(words(2, 9))
    latent, k_rope = (x @ layer.kv_down.weight.mT).split([c.kv_rank, c.rope_dim], -1)
    latent, k_rope = layer.kv_norm(latent), c.rope(k_rope[:, None], ctx)[:, 0]
    q = layer.q_norm(x @ layer.q_down.weight.mT) @ layer.q_up.weight.mT
    heads = []
    for h in range(c.heads):
        q_nope, q_rope = q.view(2, 9, c.heads, -1)[:, :, h].split([c.nope_dim, c.rope_dim], -1)
        up_k, up_v = layer.kv_up.weight.view(c.heads, -1, c.kv_rank)[h].split([c.nope_dim, c.value_dim])
        scores = q_nope @ (latent @ up_k.mT).mT + c.rope(q_rope[:, None], ctx)[:, 0] @ k_rope.mT
        scores = scores / (c.nope_dim + c.rope_dim) ** 0.5
        scores = scores.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ (latent @ up_v.mT))
    close(layer(x, ctx), layer.out(torch.cat(heads, -1)), 1e-5)


@pytest.mark.parametrize("asked", [1, 3, 12])
def test_absorbed_and_rebuilt_agree(asked: int) -> None:
    layer = awake(CONFIG.build(DIM))
    x, ctx = torch.randn(2, 12, DIM, requires_grad=True), Context.counting(words(2, 12))
    positions = torch.arange(12 - asked, 12).expand(2, -1)
    later = Context.ragged(words(2, asked), positions, cache=KVCache(2, 12))
    _, held = layer._project(x, ctx)
    q, _ = layer._project(x[:, -asked:], later)
    both = [layer.absorbed(q, held, later), layer.rebuilt(q, held, later)]
    close(*both, 1e-5)
    weights = (layer.kv_up.weight, layer.q_up.weight, x)
    towards = torch.randn_like(both[0])
    close(*(torch.autograd.grad(y, weights, towards, retain_graph=True) for y in both), 1e-4)
    close(both[1], layer.rebuilt(*layer._project(x, ctx), ctx)[:, :, -asked:], 1e-5)


def test_decoding_absorbs_and_reading_rebuilds(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, taken = awake(CONFIG.build(DIM)), []
    for way in ("absorbed", "rebuilt"):
        real = getattr(LatentAttention, way)
        monkeypatch.setattr(
            LatentAttention, way, lambda *a, way=way, real=real, **k: (taken.append(way), real(*a, **k))[1]
        )
    cache, tokens = KVCache(2, 40), words(2, 33)
    for start, end in ((0, 32), (32, 33)):
        part = tokens[:, start:end]
        layer(torch.randn(2, end - start, DIM), Context.counting(part, start, cache))
    assert taken == ["rebuilt", "absorbed"]


def test_the_latent_cache_is_small() -> None:
    """Per token: one latent and one rotary key for all heads."""
    layer, cache = CONFIG.build(DIM), KVCache(1, 7)
    layer(torch.randn(1, 3, DIM), Context.counting(words(1, 3), cache=cache))
    assert cache.nbytes == (7 + 1) * (CONFIG.kv_rank + CONFIG.rope_dim) * 4


@pytest.mark.parametrize(
    "config", [GQA(heads=4, dropout=0.5), CONFIG.replace(dropout=0.5)], ids=["GQA", "MLA"]
)
def test_dropout_is_for_training(config: GQA | MLA) -> None:
    layer, x, ctx = awake(config.build(DIM)), torch.randn(2, 9, DIM), Context.counting(words(2, 9))
    assert not torch.allclose(layer(x, ctx), layer(x, ctx))
    layer.eval()
    assert torch.equal(layer(x, ctx), layer(x, ctx))
    close(layer(x, ctx), awake_like(layer, config.replace(dropout=0.0))(x, ctx), 0)


@pytest.mark.parametrize(
    "config", [GQA(heads=4, dropout=0.5), CONFIG.replace(dropout=0.5)], ids=["GQA", "MLA"]
)
def test_dropout_reaches_a_token_that_looks_back_on_a_cache(config: GQA | MLA) -> None:
    layer, x, tokens = awake(config.build(DIM)), torch.randn(1, 33, DIM), words(1, 33)

    def last(training: bool) -> Tensor:
        cache = KVCache(1, 33)
        layer.eval()(x[:, :32], Context.counting(tokens[:, :32], 0, cache))
        return layer.train(training)(x[:, 32:], Context.counting(tokens[:, 32:], 32, cache))

    assert torch.equal(last(False), last(False))
    assert not torch.allclose(last(True), last(True))


def awake_like(layer: nn.Module, config: GQA | MLA) -> nn.Module:
    twin = config.build(DIM)
    twin.load_state_dict(layer.state_dict())
    return twin


def test_value_embeddings_need_tokens() -> None:
    layer = GROUPED["values"].build(DIM)
    ctx = replace(Context.counting(words(2, 5)), tokens=None)
    with pytest.raises(ValueError, match="value embeddings look up tokens"):
        layer(torch.randn(2, 5, DIM), ctx)
