"""The baseline every loop must beat: the same blocks at a fixed depth, without a loop.

    x  <-  x + GQA(RMSNorm(x)),    x  <-  x + SwiGLU(RMSNorm(x)),    L times, each with weights of its own

Llama 3: Grattafiori et al. 2024 (arXiv 2407.21783); TinyLlama: Zhang et al. 2024 (arXiv 2401.02385);
SmolLM2: Ben Allal et al. 2025 (arXiv 2502.02737); Qwen2.5 (arXiv 2412.15115) with biases on queries, keys
and values; Qwen3 (arXiv 2505.09388) with a norm on every query and key head. Exact in parameters, forward
pass and checkpoint (hub/llama.py); the tests hold every count below to what was published.

    name             parameters        dim   layers  heads  kv
    llama-3.2-1b     1,235,814,400     2048  16      32     8
    llama-3.2-3b     3,212,749,824     3072  28      24     8
    llama-3.1-8b     8,030,261,248     4096  32      32     8
    tinyllama-1.1b   1,100,048,384     2048  22      32     4
    smollm2-135m     134,515,008       576   30      9      3
    smollm2-360m     361,821,120       960   32      15     5
    smollm2-1.7b     1,711,376,384     2048  24      32     32
    qwen2.5-0.5b     494,032,768       896   24      14     2
    qwen3-0.6b       596,049,920       1024  28      16     8
"""

from open_mythos.config import Config
from open_mythos.model import Model
from open_mythos.nn.attention import GQA, HeadNorm
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import SwiGLU
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.rope import Llama3, Rope, Scaling


class Shape(Config):
    """A decoder of Llama's kind. `width` is that of the feed-forward, `base` that of the rotation."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    head_dim: int | None = None
    context: int = 131_072
    base: float = 500_000.0
    scaling: Scaling | None = None
    eps: float = 1e-5
    tied: bool = True
    bias: bool = False  # on queries, keys and values
    out_bias: bool = False
    head_norm: bool = False


def llama(shape: Shape) -> Model:
    """A decoder of `shape.layers` layers, all of them the prelude of a loop that is not there."""
    return Model(
        vocab=shape.vocab,
        dim=shape.dim,
        context=shape.context,
        prelude=shape.layers * (block(shape),),
        norm=RMSNorm(eps=shape.eps),
        tied=shape.tied,
    )


def block(shape: Shape) -> PreNorm:
    """One layer of `shape`; for the loops that are made of such layers."""
    mixer = GQA(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rope=Rope(base=shape.base, pairs="halves", scaling=shape.scaling),
        bias=shape.bias,
        out_bias=shape.out_bias,
        head_norm=HeadNorm(eps=shape.eps) if shape.head_norm else None,
    )
    return PreNorm(mixer=mixer, ffn=SwiGLU(width=shape.width), norm=RMSNorm(eps=shape.eps))


_STRETCHED = Llama3(factor=32.0)
SHAPES = {
    "llama-3.2-1b": Shape(
        vocab=128_256, dim=2048, layers=16, heads=32, kv_heads=8, width=8192, scaling=_STRETCHED
    ),
    "llama-3.2-3b": Shape(
        vocab=128_256, dim=3072, layers=28, heads=24, kv_heads=8, width=8192, scaling=_STRETCHED
    ),
    "llama-3.1-8b": Shape(
        vocab=128_256, dim=4096, layers=32, heads=32, kv_heads=8, width=14_336, scaling=Llama3(), tied=False
    ),
    "tinyllama-1.1b": Shape(
        vocab=32_000,
        dim=2048,
        layers=22,
        heads=32,
        kv_heads=4,
        width=5632,
        base=1e4,
        context=2048,
        tied=False,
    ),
    "smollm2-135m": Shape(
        vocab=49_152, dim=576, layers=30, heads=9, kv_heads=3, width=1536, base=1e5, context=8192
    ),
    "smollm2-360m": Shape(
        vocab=49_152, dim=960, layers=32, heads=15, kv_heads=5, width=2560, base=1e5, context=8192
    ),
    "smollm2-1.7b": Shape(
        vocab=49_152, dim=2048, layers=24, heads=32, kv_heads=32, width=8192, base=130_000.0, context=8192
    ),
    "qwen2.5-0.5b": Shape(
        vocab=151_936,
        dim=896,
        layers=24,
        heads=14,
        kv_heads=2,
        width=4864,
        base=1e6,
        context=32_768,
        eps=1e-6,
        bias=True,
    ),
    "qwen3-0.6b": Shape(
        vocab=151_936,
        dim=1024,
        layers=28,
        heads=16,
        kv_heads=8,
        width=3072,
        head_dim=128,
        base=1e6,
        context=40_960,
        eps=1e-6,
        head_norm=True,
    ),
}
MODELS = {name: llama(shape) for name, shape in SHAPES.items()}
