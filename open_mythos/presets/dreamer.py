"""Dreamer-style depth recurrence: a reconstruction after Knupp et al. 2026 (arXiv 2601.21582), not the
paper's own.

One recurrent layer, in which a token attends three ways at every step:

    h_{n+1}  =  h_n + SA(norm h_n) + DA(norm h_n) + EA(norm h_n)

    SA  over the sequence     causal attention, keys and values kept per step
    DA  over depth            what the token itself was at steps 0..n (loop/recall.py)
    EA  over experts          a sparse mixture, read as attention over expert keys; balanced without a loss

Neither equations nor sizes of the paper were available to us, so nothing here is claimed to be equal to
them: what is taken over is one recurrent layer, no prelude or coda, three kinds of attention, and three
sizes (width, depth, experts) that are chosen apart. `parallel=False` takes DA, SA and EA one after the
other.

    name           dim   heads  steps  experts  chosen  expert width
    dreamer-style  1024  16     16     64       8       512
"""

from open_mythos.config import Config
from open_mythos.loop.core import Loop
from open_mythos.loop.recall import DepthAttention
from open_mythos.loop.schedule import Fixed
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import Parallel, PreNorm
from open_mythos.nn.moe import MoE


class Size(Config):
    vocab: int = 32_768
    dim: int = 1024
    heads: int = 16
    steps: int = 16
    experts: int = 64
    chosen: int = 8
    width: int = 512
    parallel: bool = True


def dreamer(size: Size) -> Model:
    """The model of `size`."""
    mixer = GQA(heads=size.heads)
    ffn = MoE(experts=size.experts, chosen=size.chosen, width=size.width)
    layer = Parallel(mixer=mixer, ffn=ffn) if size.parallel else PreNorm(mixer=mixer, ffn=ffn)
    return Model(
        vocab=size.vocab,
        dim=size.dim,
        loop=Loop(
            layers=(layer,),
            recall=DepthAttention(heads=size.heads, steps=size.steps, parallel=size.parallel),
            schedule=Fixed(steps=size.steps),
        ),
    )


SIZES = {"dreamer-style": Size()}
MODELS = {name: dreamer(size) for name, size in SIZES.items()}
