"""A product of rows with a weight, by `F.linear` and by what our layers take, in turn: float32, CPU.

    python bench/product.py [--rows 1 1024] [--budget 2]

Prints GFLOP/s of both, for the most rows also of the gradient, and the median of the ratios: above one, ours
is faster.
"""

from dataclasses import dataclass

import torch
import tyro
from clock import Timer
from torch import Tensor
from torch.nn import functional as F

from open_mythos.nn.product import linear
from open_mythos.train.allocator import keep_freed_memory

SHAPES = ((64, 512), (256, 256), (256, 1024), (512, 256), (512, 2048), (1024, 4096), (256, 8192))


@dataclass
class Options:
    rows: tuple[int, ...] = (1, 16, 128, 1024)
    budget: float = 0.5  # seconds per row of the table, at least three pairs


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    keep_freed_memory()
    timer = Timer(torch.device("cpu"), "wall", options.budget)
    print(f"{'rows x in x out':24}{'F.linear':>10}{'ours':>10}{'ratio':>8}{'min':>8}{'max':>8}")
    for rows in options.rows:
        for wide, out in SHAPES:
            x, weight = torch.randn(rows, wide), torch.randn(out, wide)
            _row(timer, f"{rows} x {wide} x {out}", x, weight)
            if rows == max(options.rows):
                _row(timer, f"{rows} x {out} x {wide}, dx", torch.randn(rows, out), weight.mT)


def _row(timer: Timer, name: str, x: Tensor, weight: Tensor) -> None:
    with torch.no_grad():
        timing = timer.compare(lambda: F.linear(x, weight), lambda: linear(x, weight))
    work = 2 * x.numel() * len(weight) / 1e9
    rates = f"{work / timing.theirs:10.0f}{work / timing.ours:10.0f}"
    print(f"{name:24}{rates}{timing.ratio:8.2f}{timing.low:8.2f}{timing.high:8.2f}", flush=True)


if __name__ == "__main__":
    main()
