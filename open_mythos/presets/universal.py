"""The Universal Transformer, Dehghani et al. 2018 (arXiv 1807.03819), as in tensor2tensor.

One block, and before every step the signals of position and step are added anew:

    u        =  h_n + sinusoid(position) + sqrt(D) table[n]
    h_{n+1}  =  block(u)
    answer   =  ACT over the steps with shares sigmoid(w u + 1), or simply the last state

Exact about the signals, the halting (basic and accumulated; the share is read off u, before the block, and
the last step forces nothing), the pre-norm block of the code (`post_norm` for the text's), biases in the
feed-forward only, the embedding's scale and the one norm after the loop. Halted states go on changing
unless `freeze`. ACT's cost N + R is weighed 0.01 by its authors. `attention="full"` makes the encoder,
"causal" a language model; the decoder with cross attention, and convolutions as transition, are not here.
T2T's own `num_rec_steps` for ACT is twice the number of layers of the transformer it replaces.

    name             dim   ffn   heads  steps  ACT at most
    universal-small  512   2048  8      6      12
    universal-base   1024  4096  16     6      12
    universal-big    2048  8192  16     6      12
"""

from typing import Literal

from open_mythos.config import Config
from open_mythos.loop.core import Loop
from open_mythos.loop.halt import ACT, Last, UniversalACT
from open_mythos.loop.mark import PositionStep
from open_mythos.loop.schedule import Fixed
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import PostNorm, PreNorm
from open_mythos.nn.ffn import MLP
from open_mythos.nn.init import Normal
from open_mythos.nn.norm import LayerNorm


class Size(Config):
    dim: int
    width: int
    heads: int
    steps: int = 6
    most: int = 12  # with adaptive halting
    layers: int = 1  # inside one step
    vocab: int = 32_768
    dropout: float = 0.3
    attention: Literal["causal", "full"] = "causal"
    halt: UniversalACT | ACT | Last = UniversalACT()
    learned_steps: bool = True  # a table of steps; else a sinusoid
    post_norm: bool = False


def universal(size: Size) -> Model:
    """The model of `size`: a causal language model, or with full attention an encoder."""
    steps = size.steps if isinstance(size.halt, Last) else size.most
    return Model(
        vocab=size.vocab,
        dim=size.dim,
        embed_scale=size.dim**0.5,
        loop=Loop(
            layers=size.layers * (_block(size),),
            mark=PositionStep(steps=steps if size.learned_steps else None),
            halt=size.halt,
            schedule=Fixed(steps=steps),
        ),
        norm=None if size.post_norm else LayerNorm(eps=1e-6),
        init=Normal(std=size.dim**-0.5),
    )


def _block(size: Size) -> PreNorm | PostNorm:
    kind = PostNorm if size.post_norm else PreNorm
    return kind(
        mixer=GQA(heads=size.heads, rope=None, attention=size.attention, dropout=size.dropout),
        ffn=MLP(width=size.width, activation="relu", bias=True, dropout=size.dropout),
        norm=LayerNorm(eps=1e-6),
        dropout=size.dropout,
    )


SIZES = {
    "universal-small": Size(dim=512, width=2048, heads=8, dropout=0.1),
    "universal-base": Size(dim=1024, width=4096, heads=16),
    "universal-big": Size(dim=2048, width=8192, heads=16),
}
MODELS = {name: universal(size) for name, size in SIZES.items()}
