"""Relaxed recursive transformers, Bae et al. 2024 (arXiv 2410.20672): an ordinary model, folded into a loop.

L layers become a block of K = L / loops that runs `loops` times (CYCLE sharing: layer l is position l mod K
of loop l div K), and every linear map is relaxed by a low-rank pair of its own per loop:

    W_n  =  W + B_n A_n

Exact about the sharing, the relaxation of every linear map and the conversion of pretrained weights
(`hub.surgery.relax`: stepwise, average or lower start, pairs from the singular values of what the sharing
lost; at full rank the original comes back, for which the norms of heads get gains per loop). The gate and
the upward map of a SwiGLU are one matrix here, so they share one pair. Sizes of TinyLlama; Gemma's blocks are
not here.

    name                      parameters        layers   loops  rank
    recursive-tinyllama-1.1b  616 M             11       2      none
    relaxed-tinyllama-1.1b    616 M + pairs     11       2      512
"""

from open_mythos.loop.core import Loop
from open_mythos.loop.schedule import Fixed
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import SwiGLU
from open_mythos.nn.linear import LoRA, Plain
from open_mythos.nn.norm import LayerNorm
from open_mythos.presets.baseline import SHAPES, llama


def relaxed(model: Model, loops: int, rank: int | None) -> Model:
    """The fixed-depth `model` as a loop; `rank` none for a recursive transformer without relaxation.

    Raises `ValueError` if the model has a loop or other layers than pre-norm SwiGLU ones, all alike, or their
    number is not a multiple of `loops`.
    """
    layer = alike(model)
    if loops < 1 or len(model.prelude) % loops:
        raise ValueError(f"{len(model.prelude)} layers do not fold into {loops} loops of equal length")
    linear = Plain() if rank is None else LoRA(rank=rank, steps=loops)
    assert isinstance(layer.mixer, GQA)
    assert isinstance(layer.ffn, SwiGLU)
    mixer = layer.mixer.replace(linear=linear)
    if rank is not None and mixer.head_norm is not None:  # what no linear map could take over
        mixer = mixer.replace(head_norm=mixer.head_norm.replace(steps=loops))
    layer = layer.replace(mixer=mixer, ffn=layer.ffn.replace(linear=linear))
    block = len(model.prelude) // loops * (layer,)
    return model.replace(prelude=(), loop=Loop(layers=block, schedule=Fixed(steps=loops)))


def alike(model: Model) -> PreNorm:
    """The one kind of layer that a plain decoder is made of. Raises `ValueError` for any other model."""
    kinds = set(model.prelude)
    layer = next(iter(kinds), None)
    if model.loop is not None or model.coda or len(kinds) != 1 or not isinstance(layer, PreNorm):
        raise ValueError(
            "only a fixed-depth model whose layers are all alike and pre-norm can be made a loop"
        )
    if not isinstance(layer.mixer, GQA) or not isinstance(layer.ffn, SwiGLU):
        raise ValueError("only layers with grouped attention and SwiGLU can be made a loop")
    if isinstance(layer.norm, LayerNorm) and layer.norm.weight:
        raise ValueError("only norms without a bias can be folded into the maps behind them, as RMSNorm")
    return layer


_TINY = llama(SHAPES["tinyllama-1.1b"])
MODELS = {
    "recursive-tinyllama-1.1b": relaxed(_TINY, loops=2, rank=None),
    "relaxed-tinyllama-1.1b": relaxed(_TINY, loops=2, rank=512),
}
