"""Schedules draw what their papers say, from the generator handed in and nothing else."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from open_mythos.loop.schedule import Fixed, LogNormalPoisson, Plan, Poisson, Ramp, Schedule, Uniform, seeded
from tests.zoo import LOOPED, every

MANY = 20_000


def drawn(schedule: Any, batch: int = MANY, seed: int = 0, progress: float = 1.0) -> torch.Tensor:
    plan = schedule.draw(Generator().manual_seed(seed), batch, progress)
    assert isinstance(plan.steps, tuple)
    return torch.tensor(plan.steps, dtype=torch.float64)


def test_fixed() -> None:
    assert Fixed(steps=5, grad=2).draw(Generator(), 3) == Plan(5, 2)


def test_uniform_is_even() -> None:
    steps = drawn(Uniform(low=2, high=5, per="sequence"))
    shares = torch.bincount(steps.long(), minlength=7) / MANY
    assert shares[:2].sum() == shares[6:].sum() == 0
    assert ((shares[2:6] - 0.25).abs() < 0.015).all()


def test_poisson() -> None:
    """T ~ Poisson(mean), at least one."""
    steps = drawn(Poisson(mean=3.0))
    for n in range(1, 8):
        p = math.exp(-3) * 3**n / math.factorial(n) + (math.exp(-3) if n == 1 else 0)
        assert abs(float((steps == n).double().mean()) - p) < 0.012
    assert steps.min() == 1
    assert drawn(Poisson(mean=3.0, most=4)).max() == 4


def test_log_normal_poisson() -> None:
    """T ~ Poisson(exp(tau)) + 1, tau ~ N(ln mean - sigma^2 / 2, sigma^2): mean + 1, and a heavy tail."""
    mean, sigma = 8.0, 0.5
    steps = drawn(LogNormalPoisson(mean=mean, sigma=sigma, per="sequence"))
    variance = mean + mean**2 * math.expm1(sigma**2)
    assert abs(float(steps.mean()) - (mean + 1)) < 4 * math.sqrt(variance / MANY)
    assert abs(float(steps.var()) / variance - 1) < 0.1
    assert steps.min() >= 1
    assert drawn(LogNormalPoisson(mean=8.0, per="sequence", most=9)).max() == 9


@pytest.mark.parametrize("schedule", every(Schedule), ids=lambda schedule: type(schedule).__name__)
def test_draws_are_the_generator_s(schedule: Any) -> None:
    before = torch.get_rng_state()
    plans = [[schedule.draw(rng, 4, 0.7) for _ in range(5)] for rng in map(Generator().manual_seed, (0, 0))]
    first, second = plans
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert schedule.mean_steps >= 1


@pytest.mark.parametrize("kind", [Uniform, Poisson, LogNormalPoisson])
def test_per_batch_or_sequence(kind: Any) -> None:
    options = {"low": 1, "high": 9} if kind is Uniform else {"mean": 4.0}
    one = kind(**options, per="batch", grad=3).draw(Generator().manual_seed(0), 6)
    assert isinstance(one.steps, int)
    assert one.grad == 3
    each = kind(**options, per="sequence").draw(Generator().manual_seed(0), 6)
    assert len(each.steps) == 6
    assert len(set(each.steps)) > 1


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_ramp_rises_to_its_own(shape: str, half: float) -> None:
    ramp = Ramp(of=Fixed(steps=101, grad=4), until=0.4, start=1.0, shape=shape)
    steps = [ramp.draw(Generator(), 1, p).steps for p in (0.0, 0.2, 0.4, 1.0)]
    assert steps == [1, round(1 + half * 100), 101, 101]
    assert ramp.draw(Generator(), 1, 0.2).grad == 4


def test_ramp_scales_every_sequence() -> None:
    whole = drawn(Poisson(mean=20.0))
    half = drawn(Ramp(of=Poisson(mean=20.0), until=1.0, start=0.0), progress=0.5)
    assert torch.equal(half, (0.5 * whole).round().clamp_min(1))


def test_ramp_splits_as_its_own_schedule_at_the_end() -> None:
    own = Poisson(mean=4.0, grad=2, on_top=True)
    for seed in range(5):
        ramped, plain = (s.draw(Generator().manual_seed(seed), 6) for s in (Ramp(of=own), own))
        assert ramped == plain
        assert ramped.split(6) == plain.split(6)


def test_a_redrawn_ramp_draws_from_the_mean_so_far() -> None:
    """As the code of retrofitted recurrence does, from a generator seeded by the micro-batch."""
    ramp = Ramp(of=LogNormalPoisson(mean=32.0, grad=8), until=0.5, start=0.0, shape="sqrt", redrawn=True)
    for progress, mean, grad in ((0.0, 1, 1), (0.1, 4, 4), (0.4, 18, 8), (0.5, 32, 8), (1.0, 32, 8)):
        for step in range(20):
            rng = Generator().manual_seed(514229 + step)
            rate = torch.zeros(1).log_normal_(math.log(mean) - 0.125, 0.5, generator=rng)
            steps = int(torch.poisson(rate, generator=rng)) + 1
            assert ramp.draw(seeded(step), 3, progress) == Plan(steps, grad)
    assert Ramp(of=Poisson(mean=4.0), redrawn=True).draw(seeded(0), 1).grad is None
    falling = Ramp(of=Poisson(mean=4.0, most=6), start=10.0, redrawn=True).draw(seeded(0), 9, progress=0.0)
    assert max(falling.split(9)[1]) <= 6


def test_plan_splits() -> None:
    assert Plan(5).split(2) == ((0, 0), (5, 5))
    assert Plan(5, 2).split(2) == ((3, 3), (2, 2))
    assert Plan((1, 4), 2).split(2) == ((0, 2), (1, 2))
    assert Plan((3, 4), (3, 1)).split(2) == ((0, 3), (3, 1))
    assert Plan(5).mean == 5
    assert Plan((1, 4)).mean == 2.5
    for steps in (np.int64(4), torch.tensor(4), [4, 4]):
        assert Plan(steps).split(2) == ((0, 0), (4, 4))
        assert Plan(steps).mean == 4
    assert Plan([4, 2], [1, 2]).split(2) == ((3, 0), (1, 2))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(0), "at least one step, got 0"),
        (Plan(4, grad=-1), "got grad=-1"),
        (Plan((4, 2.5)), r"whole number, or one per sequence, got \(4, 2.5\)"),
        (Plan((4, 2), (1, 2, 3)), "for 3 sequences, the batch has 2"),
    ],
)
def test_impossible_plans(plan: Plan, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan.split(2)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Fixed(steps=0), "at least one step, got 0"),
        (lambda: Fixed(steps=2, grad=0), "got grad=0"),
        (lambda: Uniform(low=3, high=2), "from low to high, got 3 to 2"),
        (lambda: Poisson(mean=0.5), "at least one step, got 0.5"),
        (lambda: Poisson(mean=4, on_top=True), "grad must say how many"),
        (lambda: Poisson(mean=4, least=0), "got 0 and None"),
        (lambda: Poisson(mean=4, most=0), "got 1 and 0"),
        (lambda: Poisson(mean=4, least=6, most=2), "got 6 and 2"),
        (lambda: LogNormalPoisson(mean=0), "at least one step"),
        (lambda: LogNormalPoisson(mean=4, most=0), "got 1 and 0"),
        (lambda: Ramp(of=Fixed(steps=2), until=0.0), r"share of training in \(0, 1\], got 0.0"),
        (lambda: Ramp(of=Fixed(steps=2), redrawn=True), "only Poisson and LogNormalPoisson"),
    ],
)
def test_impossible_schedules(build: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build()


def test_a_model_takes_the_mean_unless_told() -> None:
    for config in LOOPED.values():
        assert config.build().steps == config.loop.schedule.mean_steps
