"""Timing two things against each other, and against the machine.

Runs alternate, A B A B, and every pair gives one ratio, so that a machine that is busy for a while slows
both.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import torch

Run = Callable[[], object]
Clock = Literal["wall", "cpu"]
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
        once = self._warm(theirs), self._warm(ours)
        pairs = min(max(int(self.budget / sum(max(t, SAMPLE) for t in once)), self.least), self.most)
        repeats = [max(1, math.ceil(SAMPLE / t)) for t in once]
        taken = [(self.seconds(theirs, repeats[0]), self.seconds(ours, repeats[1])) for _ in range(pairs)]
        ratios = [a / b for a, b in taken]
        return Comparison(
            median(a for a, _ in taken),
            median(b for _, b in taken),
            median(ratios),
            min(ratios),
            max(ratios),
            pairs,
        )

    def seconds(self, run: Run, repeats: int = 1) -> float:
        now = time.perf_counter if self.clock == "wall" else time.process_time
        self._settle()
        start = now()
        for _ in range(repeats):
            run()
        self._settle()
        return (now() - start) / repeats

    def matmul_peak(self, dtype: torch.dtype) -> float:
        """The most floating-point operations per second that a product of square matrices reached here."""
        rates = []
        for size in (1024, 2048) if self.device.type == "cpu" else (4096, 8192):
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            self.seconds(lambda a=a, b=b: a @ b)
            rates += [2 * size**3 / self.seconds(lambda a=a, b=b: a @ b, 3) for _ in range(5)]
        return max(rates)

    def _warm(self, run: Run) -> float:
        """The first run pays for what is set up once; a quick one is run again for a fair estimate."""
        first = self.seconds(run)
        return first if first > 1 else min(first, self.seconds(run))

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
