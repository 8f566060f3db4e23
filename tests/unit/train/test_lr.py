import pytest

from open_mythos.train.lr import Constant, LearningRate, Linear, WarmupCosine, WarmupStableDecay

ALL = [
    Constant(warmup=10),
    Linear(warmup=10, floor=0.05),
    WarmupCosine(warmup=10),
    *(WarmupStableDecay(warmup=10, decay=0.3, shape=shape) for shape in ("linear", "sqrt", "cosine")),
]


@pytest.mark.parametrize("schedule", ALL)
def test_every_schedule_warms_up_peaks_at_one_and_never_rises_again(schedule: LearningRate) -> None:
    factors = [schedule.at(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert min(factors) > 0


@pytest.mark.parametrize("schedule", ALL)
def test_without_warmup_the_first_step_is_full(schedule: LearningRate) -> None:
    assert schedule.replace(warmup=0).at(0, 100) == 1.0


def test_where_they_end() -> None:
    assert Constant().at(99, 100) == 1.0
    assert Linear(floor=0.1).at(100, 100) == pytest.approx(0.1)
    assert WarmupCosine(floor=0.2).at(50, 100) == pytest.approx(0.6)
    assert WarmupCosine(floor=0.2).at(1000, 100) == pytest.approx(0.2)


def test_stable_then_decay() -> None:
    schedule = WarmupStableDecay(warmup=5, decay=0.2)
    assert [schedule.at(step, 100) for step in (5, 50, 80)] == [1.0, 1.0, 1.0]
    assert schedule.at(90, 100) == pytest.approx(0.5)
    assert WarmupStableDecay(decay=0.2, shape="sqrt").at(85, 100) == pytest.approx(0.5)
    assert WarmupStableDecay(decay=0.0).at(99, 100) == 1.0


def test_a_run_shorter_than_its_warmup() -> None:
    for schedule in (Constant(warmup=10), Linear(warmup=10)):
        assert [schedule.at(step, 3) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
