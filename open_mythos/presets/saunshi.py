"""Reasoning with latent thoughts: Saunshi et al. 2025 (arXiv 2502.17416).

Notation (k x L): a block of k layers looped L times, with the effective depth D = k L. Its two baselines are
(k x 1), the same parameters, and (D x 1), the same FLOPs.

    h_{n+1}  =  layers(h_n),   n < L           middle looping: the first and the last layers are their own

Exact about the topology and the published width (dim 2048, ffn 5120, 32 heads, 24 layers); block details
that the paper leaves open are those of a pre-norm GPT with rotary positions. The looping-inspired
regulariser for a model without a loop is `train.regularise.loop_similarity` over its `prelude`, block of 4,
weight 10.

    name           k   L   unique layers      name             k   L   first, last
    saunshi-24x1   24  1   24                 saunshi-middle   4   4   4, 4
    saunshi-12x2   12  2   12
    saunshi-4x6    4   6   4
"""

from open_mythos.config import Config
from open_mythos.loop.core import Loop
from open_mythos.loop.schedule import Fixed
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import MLP
from open_mythos.nn.norm import LayerNorm


class Size(Config):
    k: int
    loops: int
    untied: int = 0  # layers before the loop, and as many after it
    vocab: int = 32_000
    dim: int = 2048
    width: int = 5120
    heads: int = 32
    context: int = 1280


def saunshi(size: Size) -> Model:
    """(k x L). With one loop it is the ordinary transformer, whose layers are the prelude."""
    layer = PreNorm(
        mixer=GQA(heads=size.heads),
        ffn=MLP(width=size.width, activation="gelu"),
        norm=LayerNorm(),
    )
    unlooped = size.loops == 1
    return Model(
        vocab=size.vocab,
        dim=size.dim,
        context=size.context,
        prelude=(size.k if unlooped else size.untied) * (layer,),
        loop=None if unlooped else Loop(layers=size.k * (layer,), schedule=Fixed(steps=size.loops)),
        coda=() if unlooped else size.untied * (layer,),
        norm=LayerNorm(),
    )


SIZES = {
    "saunshi-24x1": Size(k=24, loops=1),
    "saunshi-12x2": Size(k=12, loops=2),
    "saunshi-4x6": Size(k=4, loops=6),
    "saunshi-middle": Size(k=4, loops=4, untied=4),
}
MODELS = {name: saunshi(size) for name, size in SIZES.items()}
