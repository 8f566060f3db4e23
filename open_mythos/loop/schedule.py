"""How many steps to take, decided before the model runs.

The model never draws its own depth: a schedule draws a `Plan` from an explicit generator and the
caller hands it in, so the same call gives the same answer on every rank, on recompute and in a test.

    Fixed              always the same number
    Uniform            low..high, each as likely                               Chen 2026 (arXiv 2603.21676)
    Poisson            T ~ Poisson(mean), at least 1; the last min(T, grad) steps carry gradient
                       Parcae (arXiv 2604.12946)
    LogNormalPoisson   T ~ Poisson(exp(tau)) + 1, tau ~ N(ln mean - sigma^2 / 2, sigma^2)
                       Huginn (arXiv 2502.05171)
    Ramp               another schedule whose depth grows to its own over the first part of training,
                       linearly or as 1 - sqrt(1 - p)   Parcae; McLeish et al. 2025 (arXiv 2511.07384),
                       who draw anew from the mean so far, rounded up, with at most so many steps of gradient

`per` says whether every sequence draws for itself or the batch draws once.
"""

import math
from operator import index
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator

from open_mythos.config import Config

Per = Literal["batch", "sequence"]


class Plan(NamedTuple):
    """`steps` turns of the loop, of which the last `grad` carry gradient (all, if none is said).

    Each is one number for the whole batch or a number per sequence, known on the host; whole ones of
    Python's, numpy's or torch's kind.
    """

    steps: int | tuple[int, ...]
    grad: int | tuple[int, ...] | None = None

    def split(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Per sequence, the steps without gradient and the steps after them with it.

        Raises `ValueError` if a depth is below one, steps with gradient are below zero, or the numbers are
        not whole or do not fit the batch.
        """
        steps = _each(self.steps, batch)
        if min(steps) < 1:
            raise ValueError(f"a loop takes at least one step, got {min(steps)}")
        grad = steps if self.grad is None else _each(self.grad, batch)
        if min(grad) < 0:
            raise ValueError(f"no fewer than 0 steps can carry gradient, got grad={min(grad)}")
        frozen = tuple(max(s - g, 0) for s, g in zip(steps, grad, strict=True))
        return frozen, tuple(s - f for s, f in zip(steps, frozen, strict=True))

    @property
    def mean(self) -> float:
        steps = _whole(self.steps)
        return steps if isinstance(steps, int) else sum(steps) / len(steps)


def _each(value: Any, batch: int) -> tuple[int, ...]:
    numbers = _whole(value)
    if isinstance(numbers, int):
        return (numbers,) * batch
    if len(numbers) != batch:
        raise ValueError(f"the plan is for {len(numbers)} sequences, the batch has {batch}")
    return numbers


def _whole(value: Any) -> int | tuple[int, ...]:
    try:
        return index(value)
    except TypeError:
        pass
    try:
        return tuple(index(number) for number in value)
    except TypeError:
        raise ValueError(f"a depth is a whole number, or one per sequence, got {value!r}") from None


def seeded(step: int, rank: int = 0) -> Generator:
    """The generator from which Parcae's code draws the depths of one micro-batch, numbered from zero.

    Ranks draw apart; hand in rank 0 everywhere to let them draw alike (its `lockstep`, and Huginn's way).
    """
    return Generator().manual_seed((514229 + step) * (rank + 1) % (2**31 - 1))


class Fixed(Config):
    steps: int
    grad: int | None = None

    def __post_init__(self) -> None:
        _check(self.steps, self.grad)

    @property
    def mean_steps(self) -> int:
        return self.steps

    def draw(self, rng: Generator, batch: int, progress: float = 1.0) -> Plan:
        return Plan(self.steps, self.grad)


class Uniform(Config):
    low: int
    high: int
    grad: int | None = None
    per: Per = "batch"

    def __post_init__(self) -> None:
        _check(self.low, self.grad)
        if self.high < self.low:
            raise ValueError(f"Uniform draws from low to high, got {self.low} to {self.high}")

    @property
    def mean_steps(self) -> int:
        return round((self.low + self.high) / 2)

    def draw(self, rng: Generator, batch: int, progress: float = 1.0) -> Plan:
        count = 1 if self.per == "batch" else batch
        return _plan(torch.randint(self.low, self.high + 1, (count,), generator=rng), self.grad, self.per)


class Poisson(Config):
    mean: float
    grad: int | None = None
    per: Per = "sequence"
    least: int = 1
    most: int | None = None
    on_top: bool = False  # steps with gradient follow all T without, as in Parcae's code where per batch

    def __post_init__(self) -> None:
        _check(self.mean, self.grad)
        _check_bounds(self.least, self.most, self.mean)
        if self.on_top and self.grad is None:
            raise ValueError(
                "on_top puts the steps with gradient behind the others, so grad must say how many"
            )

    @property
    def mean_steps(self) -> int:
        return max(1, round(self.mean))

    def draw(self, rng: Generator, batch: int, progress: float = 1.0) -> Plan:
        rate = torch.full((1 if self.per == "batch" else batch,), float(self.mean))
        steps = torch.poisson(rate, generator=rng).long().clamp(self.least, self.most)
        if self.on_top:
            live = steps.clamp(max=self.grad)
            return Plan(_numbers(steps + live, self.per), _numbers(live, self.per))
        return _plan(steps, self.grad, self.per)


class LogNormalPoisson(Config):
    mean: float
    sigma: float = 0.5
    grad: int | None = None
    per: Per = "batch"
    most: int | None = None
    discard: int = 0  # uniform numbers drawn first and thrown away: Huginn's code draws one

    def __post_init__(self) -> None:
        _check(self.mean, self.grad)
        _check_bounds(1, self.most, self.mean)
        if self.sigma <= 0 or self.discard < 0:
            raise ValueError(
                "LogNormalPoisson needs sigma above 0 and discard of at least 0, got "
                f"sigma={self.sigma} and discard={self.discard}"
            )

    @property
    def mean_steps(self) -> int:
        return max(1, round(self.mean))

    def draw(self, rng: Generator, batch: int, progress: float = 1.0) -> Plan:
        for _ in range(self.discard):
            torch.rand(1, generator=rng)
        rate = torch.empty(1 if self.per == "batch" else batch)
        rate.log_normal_(math.log(self.mean) - self.sigma**2 / 2, self.sigma, generator=rng)
        steps = (torch.poisson(rate, generator=rng) + 1).long().clamp(1, self.most)
        return _plan(steps, self.grad, self.per)


class Ramp(Config):
    of: Fixed | Uniform | Poisson | LogNormalPoisson
    until: float = 0.5  # share of training after which the depth is the schedule's own
    start: float = 1.0  # mean depth at the beginning
    shape: Literal["linear", "sqrt"] = "linear"
    redrawn: bool = False  # from the mean so far; otherwise the schedule's own draw is shortened

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"the ramp ends at a share of training in (0, 1], got {self.until}")
        if self.redrawn and not isinstance(self.of, (Poisson, LogNormalPoisson)):
            raise ValueError(
                f"only Poisson and LogNormalPoisson can be drawn from another mean, not {self.of}; "
                "leave redrawn off"
            )

    @property
    def mean_steps(self) -> int:
        return self.of.mean_steps

    def draw(self, rng: Generator, batch: int, progress: float = 1.0) -> Plan:
        p = min(progress / self.until, 1.0)
        rise = p if self.shape == "linear" else 1 - math.sqrt(1 - p)
        mean = self.start + rise * (self.mean_steps - self.start)
        if self.redrawn and isinstance(self.of, (Poisson, LogNormalPoisson)):
            whole = max(1, math.ceil(mean))
            whole = whole if self.of.most is None else min(whole, self.of.most)
            grad = None if self.of.grad is None else min(self.of.grad, whole)
            return self.of.replace(mean=float(whole), grad=grad).draw(rng, batch)
        plan = self.of.draw(rng, batch)
        steps = tuple(max(1, round(mean / self.mean_steps * s)) for s in _each(plan.steps, batch))
        return Plan(steps[0] if isinstance(plan.steps, int) else steps, plan.grad)


def _plan(steps: torch.Tensor, grad: int | None, per: Per) -> Plan:
    return Plan(_numbers(steps, per), grad)


def _numbers(drawn: torch.Tensor, per: Per) -> int | tuple[int, ...]:
    numbers = tuple(int(n) for n in drawn)
    return numbers[0] if per == "batch" else numbers


def _check(steps: float, grad: int | None) -> None:
    if steps < 1:
        raise ValueError(f"a loop takes at least one step, got {steps}")
    if grad is not None and grad < 1:
        raise ValueError(f"at least one step must carry gradient, got grad={grad}")


def _check_bounds(least: int, most: int | None, mean: float) -> None:
    if least < 1 or (most is not None and most < least):
        raise ValueError(f"depths lie between least >= 1 and most >= least, got {least} and {most}")
    if most is not None and mean > most:
        raise ValueError(f"a mean of {mean} steps lies above most={most}; raise most too, or lower the mean")


Schedule = Fixed | Uniform | Poisson | LogNormalPoisson | Ramp
