"""How much of what a machine can multiply a training run does.

    MFU  =  tokens per second * FLOPs per token / peak     Chowdhery et al. 2022, arXiv 2204.02311, app. B

FLOPs are those that learning needs: three passes (one forward, two backward) through every turn with
gradient, one through the others; what is computed again does not count. The peak is no data sheet's: it is
what products of large matrices reach on this machine, with these threads, in the run's precision.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch

from open_mythos.analysis.compute import flops
from open_mythos.train.precision import resolve
from open_mythos.train.recipe import Recipe

SIZE = {"cpu": 512}  # of the matrices; elsewhere 4096
SECONDS = 0.2


class Utilisation:
    """`processes` train together, each on a device like this one, which is measured at once."""

    def __init__(self, recipe: Recipe, device: torch.device, processes: int = 1) -> None:
        counted, context = flops(recipe.model), recipe.length / 2  # causal attention looks back half way
        self.once = counted.once + counted.once_attention * context
        self.turn = counted.per_loop + counted.per_loop_attention * context
        self.peak = processes * measured_peak(device, resolve(recipe.precision, device))

    def needed(self, loops: float, grad_loops: float) -> float:
        """FLOPs of one token, at this mean depth, of which so many turns carry gradient."""
        return 3 * self.once + (loops + 2 * grad_loops) * self.turn

    def of(self, metrics: Mapping[str, Any]) -> float:
        """The share of the peak, from a step's metrics."""
        loops = metrics["loops"]
        needed = self.needed(loops, metrics.get("grad_loops", loops))
        return float(metrics["tokens_per_second"] * needed / self.peak)


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """FLOP/s of the fastest of many products of two large square matrices.

    They come from a generator of their own, so that a run draws the same whether it was measured or not.
    """
    size, rng = SIZE.get(device.type, 4096), torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=rng).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    _timed(a, b)  # libraries load, and choose their kernels
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, _timed(a, b))
    return 2 * size**3 / best


def _timed(a: torch.Tensor, b: torch.Tensor) -> float:
    began = time.perf_counter()
    c = a @ b
    if c.device.type != "cpu":
        c[0, 0].item()  # waits for the device
    return time.perf_counter() - began
