"""Whose keys and values a step of the loop attends to.

    EachStep     its own, so a cache holds as many as there are steps
    FirstStep    those of the first step, of every token: recursive key/value sharing, Bae et al. 2025
                 (arXiv 2507.10524); 1 / steps of the cache, in training and generation alike (nn/lend.py)

Law: with and without a cache the same, and no key but the first step's is ever looked at
(tests/laws/test_cache.py, tests/unit/loop/test_route.py).
"""

from collections.abc import Sequence

from open_mythos.config import Config
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import Block


class EachStep(Config):
    """Nothing is lent."""


class FirstStep(Config):
    """The first step lends to all."""


def room(keys: "Keys", layers: Sequence[Block], dim: int) -> int:
    """How many numbers per token the first step lends to later ones."""
    return sum(_remembered(layer, dim) for layer in layers) if isinstance(keys, FirstStep) else 0


def _remembered(layer: Block, dim: int) -> int:
    mixer = layer.mixer
    if isinstance(mixer, GQA):
        return 2 * (mixer.kv_heads or mixer.heads) * (mixer.head_dim or dim // mixer.heads)
    return mixer.kv_rank + mixer.rope_dim


Keys = EachStep | FirstStep
