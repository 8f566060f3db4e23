"""The share of the peak: FLOPs as the planner counts them, and a peak that was measured."""

import time

import pytest
import torch

from open_mythos.analysis.plan import Work, training_flops
from open_mythos.analysis.utilisation import Utilisation, measured_peak
from open_mythos.loop.schedule import Fixed
from open_mythos.train.recipe import Recipe
from tests.tiny import MODELS

CPU = torch.device("cpu")


@pytest.mark.parametrize(("steps", "grad"), [(5, 5), (5, 2)])
def test_a_run_at_the_speed_that_the_planner_forecasts_has_the_utilisation_it_assumed(
    steps: int, grad: int
) -> None:
    model = MODELS["mythos-mla"]
    model = model.replace(loop=model.loop.replace(schedule=Fixed(steps=steps, grad=grad)))
    used = Utilisation(Recipe(model=model, length=16, steps=1), CPU, processes=2)
    per_token = training_flops(model, Work(length=16, remat=False))
    metrics = {"loops": steps, "grad_loops": grad, "tokens_per_second": 0.4 * used.peak / per_token}
    assert used.of(metrics) == pytest.approx(0.4)


def test_the_peak_is_measured_quickly_and_is_not_beaten() -> None:
    began = time.perf_counter()
    peak = measured_peak(CPU, torch.float32, seconds=0.1)
    assert time.perf_counter() - began < 5
    a = torch.randn(256, 256)
    began = time.perf_counter()
    _ = a @ a
    assert 0 < 2 * 256**3 / (time.perf_counter() - began) < 2 * peak


def test_measuring_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    measured_peak(CPU, torch.float32, seconds=0.01)
    assert torch.equal(torch.get_rng_state(), before)
