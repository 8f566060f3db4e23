"""Timing two things against each other, and against the machine.

Runs alternate, A B A B, and every pair gives one ratio, so that a machine that is busy for a while slows
both.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch

Run = Callable[[], object]
Sample = Callable[[int], float]  # so many runs in a row; seconds per run
Clock = Literal["wall", "cpu"]
WARM_RUNS, WARM_SECONDS = 10, 6.0  # whichever is reached first
SAMPLE = 0.3  # seconds that one sample lasts at least: what decodes, decodes many tokens in a row


@dataclass(frozen=True)
class Comparison:
    """Seconds per run, and their ratio pair by pair: above one, ours is faster."""

    theirs: float
    ours: float
    ratio: float
    low: float
    high: float
    pairs: int
    matmul_rate: float = math.nan  # the best that a plain matrix product reached between the pairs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Timer:
    """`clock="cpu"` counts this process's own time: for one thread on a machine that is shared."""

    device: torch.device
    clock: Clock = "wall"
    budget: float = 10.0  # seconds per comparison, once warm
    least: int = 3
    most: int = 15

    def compare(self, theirs: Run, ours: Run) -> Comparison:
        once = self.warm(theirs), self.warm(ours)
        return self.alternate(partial(self.seconds, theirs), partial(self.seconds, ours), once)

    def alternate(
        self,
        theirs: Sample,
        ours: Sample,
        once: tuple[float, float],
        product: Callable[[], float] | None = None,
    ) -> Comparison:
        """`once` says how long a run takes, about; after each pair, `product` measures the machine's rate."""
        pairs = min(max(int(self.budget / sum(max(t, SAMPLE) for t in once)), self.least), self.most)
        repeats = [max(1, math.ceil(SAMPLE / t)) for t in once]
        taken, rates = [], []
        for _ in range(pairs):
            taken.append((theirs(repeats[0]), ours(repeats[1])))
            rates.append(math.nan if product is None else product())
        ratios = [a / b for a, b in taken]
        return Comparison(
            median(a for a, _ in taken),
            median(b for _, b in taken),
            median(ratios),
            min(ratios),
            max(ratios),
            pairs,
            max(rates),
        )

    def seconds(self, run: Run, repeats: int = 1) -> float:
        now = time.perf_counter if self.clock == "wall" else time.process_time
        self._settle()
        start = now()
        for _ in range(repeats):
            run()
        self._settle()
        return (now() - start) / repeats

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second of a product of square matrices, the better of two sizes."""
        rates = []
        for size in (1024, 2048) if self.device.type == "cpu" else (4096, 8192):
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            self.seconds(lambda a=a, b=b: a @ b)
            rates.append(2 * size**3 / self.seconds(lambda a=a, b=b: a @ b, 3))
        return max(rates)

    def warm(self, run: Run) -> float:
        """The first runs pay for what is set up once, and until memory lies where it stays: after one step of
        training its heap is still growing, and every new page costs two microseconds. Seconds of the fastest.
        """
        taken = [self.seconds(run)]
        while len(taken) < WARM_RUNS and sum(taken) < WARM_SECONDS:
            taken.append(self.seconds(run))
        return min(taken)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
