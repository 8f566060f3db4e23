"""Models whose weights are so large that a wrong token, step or position shows in every output.

And no larger than that, or rounding shows as well. Where a norm follows every sum (`Sandwich`), the stream
cannot outgrow what is added to it, so a gated layer of wide weights magnifies small differences each time it
is met: at std 0.3 Huginn's toy makes them 35 times as large in three steps and 1700 times in seven; with
pre-norm instead, 1.4 times. At std 0.15 it is 1.3 times, about as when freshly made, and a mistake still
shows (tests/unit/test_lively.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from open_mythos.model import LoopedLM, Model
from open_mythos.nn.block import Sandwich

M = TypeVar("M", bound=nn.Module)
WIDE, CALM = 0.3, 0.15


def lively(config: Model, seed: int = 0) -> LoopedLM:
    """The model in eval mode with every parameter drawn anew, wide."""
    torch.manual_seed(seed)
    return enliven(config.build(), CALM if _magnifies(config) else WIDE)


def enliven(model: M, std: float = WIDE) -> M:
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _magnifies(config: Model) -> bool:
    blocks = config.prelude + (config.loop.layers if config.loop is not None else ()) + config.coda
    return any(isinstance(block, Sandwich) for block in blocks)


@contextmanager
def work_of(model: LoopedLM) -> Iterator[list[int]]:
    """Counts (token, step) pairs: one number per run of the loop's first layer, `sum` of them in all."""
    sizes: list[int] = []
    layer = model.loop.layers[0]
    handle = layer.register_forward_hook(lambda _, inputs, out: sizes.append(out[..., 0].numel()))
    try:
        yield sizes
    finally:
        handle.remove()
