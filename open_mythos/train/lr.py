"""How the learning rate moves: a factor for each step, times every configured rate.

    Constant      1 after the warmup
    Linear        straight down from 1 to `floor`
    WarmupCosine  floor + (1 - floor) (1 + cos(pi p)) / 2     Loshchilov and Hutter 2017, arXiv 1608.03983
    WarmupStableDecay  1, then down over the last share of the run     Hu et al. 2024, arXiv 2404.06395;
                  as 1 - sqrt(p): Hagele et al. 2024, arXiv 2405.18392

Steps count from 0. The warmup is linear over `warmup` steps and ends at exactly 1; its first step is
1 / warmup and never 0, and the last step of a run is still above its floor.
"""

import math
from typing import Literal

from open_mythos.config import Config


class Constant(Config):
    warmup: int = 0

    def at(self, step: int, total: int) -> float:
        return _warm(step, self.warmup)


class Linear(Config):
    warmup: int = 0
    floor: float = 0.0

    def at(self, step: int, total: int) -> float:
        return min(_warm(step, self.warmup), _down(1 - _progress(step, self.warmup, total), self.floor))


class WarmupCosine(Config):
    warmup: int = 0
    floor: float = 0.1

    def at(self, step: int, total: int) -> float:
        wave = (1 + math.cos(math.pi * _progress(step, self.warmup, total))) / 2
        return min(_warm(step, self.warmup), _down(wave, self.floor))


class WarmupStableDecay(Config):
    """`decay` is the share of the run, at its end, over which the rate falls to `floor`."""

    warmup: int = 0
    decay: float = 0.4
    floor: float = 0.0
    shape: Literal["linear", "sqrt", "cosine"] = "linear"

    def at(self, step: int, total: int) -> float:
        progress = _progress(step, total - round(self.decay * total), total)
        left = {
            "linear": 1 - progress,
            "sqrt": 1 - math.sqrt(progress),
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }[self.shape]
        return min(_warm(step, self.warmup), _down(left, self.floor))


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _progress(step: int, start: int, end: int) -> float:
    """From 0 at `start` to 1 at `end`, one past the last step; a run may go on after its end."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def _down(left: float, floor: float) -> float:
    return floor + (1 - floor) * left


LearningRate = WarmupStableDecay | WarmupCosine | Linear | Constant
