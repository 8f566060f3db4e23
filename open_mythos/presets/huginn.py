"""Huginn-3.5B: test-time compute by depth, Geiping et al. 2025 (arXiv 2502.05171).

    e        =  prelude(sqrt(D) * embedding)
    h_{n+1}  =  block(W [h_n ; e])                           h_0: truncated normal of std sqrt(2 / 5)
    logits   =  head(norm(coda(norm(h_T))))                  one norm, used twice; head = embedding

    size    width  heads    MLP   layers of prelude, loop, coda   vocabulary  context
    3.5b     5280     55  17920   2, 4, 2                              65536     4096

Training draws one depth per batch, log-normal Poisson with mean 33 (32, plus one), and the last 8 steps carry
gradient. Norms sit on both sides of every branch (sandwich): without them the loop collapsed or was ignored.
"""

from typing import NamedTuple

from open_mythos.loop.core import Loop
from open_mythos.loop.inject import Concat
from open_mythos.loop.schedule import LogNormalPoisson
from open_mythos.loop.start import Noise
from open_mythos.model import FinalNorm, Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import Block, Sandwich
from open_mythos.nn.ffn import SwiGLU
from open_mythos.nn.init import ScaledNormal
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.rope import Rope


class Size(NamedTuple):
    dim: int
    heads: int
    width: int
    prelude: int
    loop: int
    coda: int


SIZES = {"3.5b": Size(5280, 55, 17_920, 2, 4, 2)}


def huginn(size: str = "3.5b") -> Model:
    """The model of this size. Raises `ValueError` for a size that was not published."""
    if size not in SIZES:
        raise ValueError(f"Huginn comes in the sizes {', '.join(SIZES)}, got {size!r}")
    return assemble(SIZES[size], vocab=65_536, context=4096, mean=32, grad=8)


def assemble(size: Size, vocab: int, context: int, mean: int, grad: int) -> Model:
    """Huginn in any size, trained to take `mean` steps of which the last `grad` carry gradient."""
    block = _block(size)
    scale = size.dim**0.5
    return Model(
        vocab=vocab,
        dim=size.dim,
        context=context,
        embed_scale=scale,
        prelude=size.prelude * (block,),
        loop=Loop(
            layers=size.loop * (block,),
            start=Noise(scale=scale),
            inject=Concat(),
            schedule=LogNormalPoisson(mean=float(mean), grad=grad, discard=1),
        ),
        leave=FinalNorm(),
        coda=size.coda * (block,),
        norm=RMSNorm(eps=1e-6),
        init=ScaledNormal(layers=size.prelude + mean * size.loop + size.coda, up_as_out=True),
    )


def _block(size: Size) -> Block:
    mixer = GQA(heads=size.heads, kv_heads=size.heads, rope=Rope(base=50_000.0), qk_bias=True)
    return Sandwich(mixer=mixer, ffn=SwiGLU(width=size.width), norm=RMSNorm(eps=1e-6))
