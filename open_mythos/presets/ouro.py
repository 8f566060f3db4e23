"""Ouro, the looped language model of Zhu et al. 2025 (arXiv 2510.25741).

The whole stack is the loop. There is no prelude, no coda and no injection: what a loop hands to the next is
the model's last norm of what came out of the layers.

    h_0      =  embed(tokens)
    h_{n+1}  =  norm(layers(h_n))              layers: x + norm(f(norm(x))), full multi-head attention
    g_n      =  sigmoid(w h_n + b)             leave after step n with probability g_n prod_{m<n} (1 - g_m)
    logits   =  head(h_N),  or of the first n with 1 - prod_{m<=n} (1 - g_m) >= threshold

Exact about parameters (2,667,974,657 is the published count of 2.6B; that of 1.4B follows from the same
sizes), forward pass, gate and checkpoint names (hub/ouro.py). Leaving early here ends the work, where the
released code runs every loop and picks one. The losses of both stages are in train/readout.py:
`LearnedExit`, whose prior is uniform and beta 0.1, then `TaughtExit` with the model frozen.

    name        parameters       dim   layers  heads  ffn   steps
    ouro-1.4b   1,434,652,673    2048  24      16     5632  4
    ouro-2.6b   2,667,974,657    2048  48      16     5632  4
"""

from open_mythos.config import Config
from open_mythos.loop.adapt import NormedStep
from open_mythos.loop.core import Loop
from open_mythos.loop.halt import ExitGate
from open_mythos.loop.schedule import Fixed
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import BothNorm
from open_mythos.nn.ffn import SwiGLU
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.rope import Rope


class Size(Config):
    layers: int
    vocab: int = 49_152
    dim: int = 2048
    heads: int = 16
    kv_heads: int | None = None
    head_dim: int | None = None
    width: int = 5632
    steps: int = 4
    context: int = 65_536
    base: float = 1_000_000.0
    eps: float = 1e-6
    threshold: float = 1.0
    tied: bool = False


def ouro(size: Size) -> Model:
    """The model of `size`. A threshold of one takes every step; below, tokens leave when they are sure."""
    norm = RMSNorm(eps=size.eps)
    mixer = GQA(
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=size.head_dim,
        rope=Rope(base=size.base, pairs="halves"),
    )
    layer = BothNorm(mixer=mixer, ffn=SwiGLU(width=size.width), norm=norm)
    return Model(
        vocab=size.vocab,
        dim=size.dim,
        context=size.context,
        loop=Loop(
            layers=size.layers * (layer,),
            adapt=NormedStep(norm=norm),
            halt=ExitGate(threshold=size.threshold),
            schedule=Fixed(steps=size.steps),
        ),
        norm=None,  # the loop's own
        tied=size.tied,
    )


SIZES = {"ouro-1.4b": Size(layers=24), "ouro-2.6b": Size(layers=48)}
MODELS = {name: ouro(size) for name, size in SIZES.items()}
