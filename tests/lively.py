"""Models whose weights are so large that a wrong token, step or position shows in every output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from open_mythos.model import LoopedLM, Model

M = TypeVar("M", bound=nn.Module)


def lively(config: Model, seed: int = 0) -> LoopedLM:
    """The model in eval mode with every parameter drawn anew, wide."""
    torch.manual_seed(seed)
    return enliven(config.build())


def enliven(model: M) -> M:
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


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
