"""Parcae: a looped model whose state cannot explode, Prairie et al. 2026 (arXiv 2604.12946).

    e        =  norm(prelude(tokens))
    h_{n+1}  =  block(exp(-dt a) * h_n + dt * (B e))         the decay is in (0, 1) whatever the parameters
    logits   =  head(norm(coda(C h_T)))                      head and embedding are one matrix

    size    width  heads  layers of prelude, loop, coda     GPT baseline's layers
    140m      768      6  2, 2, 2                                                6
    370m     1024      8  4, 4, 4                                               12
    770m     1280     10  6, 6, 6                                               18
    1.3b     1536     12  8, 8, 8                                               24

Every second layer, counted once through the unrolled-once network and ending with the last, adds a gated
table of value embeddings; half of each published size is such tables. Training draws a depth per
sequence, Poisson with mean 8, and the last 4 steps carry gradient.
"""

from typing import NamedTuple

import torch

from open_mythos.loop.core import Loop
from open_mythos.loop.inject import Diagonal
from open_mythos.loop.schedule import Poisson
from open_mythos.loop.start import Noise
from open_mythos.model import Matrix, Model
from open_mythos.nn.attention import GQA, HeadNorm, ValueEmbedding
from open_mythos.nn.block import Block, PreNorm
from open_mythos.nn.ffn import MLP
from open_mythos.nn.init import Orthogonal
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.rope import Rope


class Size(NamedTuple):
    dim: int
    heads: int
    layers: int  # of each of the three stages


SIZES = {
    "140m": Size(768, 6, 2),
    "370m": Size(1024, 8, 4),
    "770m": Size(1280, 10, 6),
    "1.3b": Size(1536, 12, 8),
}
VOCAB, CONTEXT = 32_768, 2048
NORM = RMSNorm(eps=1e-5)
QK_NORM = HeadNorm(eps=torch.finfo(torch.float32).eps, weight=False, after_rotation=True)


def parcae(size: str = "140m") -> Model:
    """The looped model of this size. Raises `ValueError` for a size that was not published."""
    return assemble(_size(size), vocab=VOCAB, context=CONTEXT, mean=8, grad=4)


def assemble(size: Size, vocab: int, context: int, mean: int, grad: int) -> Model:
    """Parcae in any size, trained to take `mean` steps of which the last `grad` carry gradient."""
    n, blocks = size.layers, _blocks(size, vocab, 3 * size.layers)
    loop = Loop(
        layers=blocks[n : 2 * n],
        start=Noise(),
        inject=Diagonal(),
        schedule=Poisson(mean=float(mean), grad=grad),
    )
    return _model(size, vocab, context).replace(
        prelude=blocks[:n], enter=NORM, loop=loop, leave=Matrix(), coda=blocks[2 * n :]
    )


def parcae_gpt(size: str = "140m") -> Model:
    """The fixed-depth baseline of the paper: the same blocks, as many as Parcae stores, and no loop."""
    published = _size(size)
    blocks = _blocks(published, VOCAB, 3 * published.layers)
    return _model(published, VOCAB, CONTEXT).replace(prelude=blocks)


def has_table(layer: int, layers: int) -> bool:
    """Whether this layer has value embeddings: the last has, and every second before it."""
    return layer % 2 == (layers - 1) % 2


def _model(size: Size, vocab: int, context: int) -> Model:
    return Model(vocab=vocab, dim=size.dim, context=context, norm=NORM, init=Orthogonal())


def _blocks(size: Size, vocab: int, count: int) -> tuple[Block, ...]:
    return tuple(_block(size, vocab if has_table(i, count) else None) for i in range(count))


def _block(size: Size, table: int | None) -> Block:
    mixer = GQA(
        heads=size.heads,
        kv_heads=size.heads,
        rope=Rope(base=50_000.0),
        head_norm=QK_NORM,
        values=None if table is None else ValueEmbedding(vocab=table),
    )
    return PreNorm(mixer=mixer, ffn=MLP(width=4 * size.dim, activation="half_relu2"), norm=NORM)


def _size(name: str) -> Size:
    if name not in SIZES:
        raise ValueError(f"Parcae comes in the sizes {', '.join(SIZES)}, got {name!r}")
    return SIZES[name]
