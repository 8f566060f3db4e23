"""Loop, think & generalize: Kohli et al. 2026 (arXiv 2604.07822), the models behind "trained on five hops,
tested on ten".

A block of four GPT-2 layers is repeated, with no prelude and no coda. Two choices make extrapolation work:
no positional signal at all (NoPE), and maps into the stream that begin at zero, so that every loop begins as
the identity.

    h_{n+1}  =  layers(h_n)            or, with injection, layers(h_n + h_0) from the second loop on

Exact about the block (layer norm, tanh GELU, biases), the tied head, the final norm, the initialisation and
the schedule: Poisson(4) between 2 and 8, one draw per batch. Trained on the last token only.

    name             dim  layers  heads  steps
    kohli-hops       768  4       12     Poisson(4) in 2..8, NoPE, out projections zero
    kohli-systematic 768  4       12     4, NoPE, out projections 0.003
"""

from open_mythos.config import Config
from open_mythos.loop.core import Loop
from open_mythos.loop.inject import Add, Nothing
from open_mythos.loop.schedule import Fixed, Poisson
from open_mythos.loop.start import Embedded, Zeros
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import MLP
from open_mythos.nn.init import Normal
from open_mythos.nn.norm import LayerNorm


class Size(Config):
    vocab: int = 216  # 200 entities, 10 relations, 6 special tokens
    dim: int = 768
    layers: int = 4
    heads: int = 12
    context: int = 50
    injected: bool = False
    out: float = 0.0  # factor on the maps into the stream, at initialisation
    schedule: Poisson | Fixed = Poisson(mean=4, least=2, most=8, per="batch")


def kohli(size: Size) -> Model:
    """The model of `size`. Adding the input to a zero state is the input, so injection starts from zeros."""
    layer = PreNorm(
        mixer=GQA(heads=size.heads, rope=None, bias=True, out_bias=True),
        ffn=MLP(width=4 * size.dim, activation="gelu_tanh", bias=True),
        norm=LayerNorm(),
    )
    return Model(
        vocab=size.vocab,
        dim=size.dim,
        context=size.context,
        loop=Loop(
            layers=size.layers * (layer,),
            start=Zeros() if size.injected else Embedded(),
            inject=Add() if size.injected else Nothing(),
            schedule=size.schedule,
        ),
        norm=LayerNorm(),
        init=Normal(out=size.out),
    )


SIZES = {
    "kohli-hops": Size(),
    "kohli-systematic": Size(vocab=2206, context=8, out=0.003, schedule=Fixed(steps=4)),
}
MODELS = {name: kohli(size) for name, size in SIZES.items()}
