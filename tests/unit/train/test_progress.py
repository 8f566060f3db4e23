"""Progress tells the truth about time left, on a terminal and in a log, whatever the model writes."""

import io
import math

import pytest
import torch
from rich.console import Console

from open_mythos.train.progress import Progress, clock_time, printable, short_number


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def screen(terminal=False, encoding="utf-8"):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None, highlight=False)
    return console, lambda: raw.getvalue().decode(encoding)


def test_a_log_gets_a_line_every_few_seconds_and_the_last_one():
    console, text = screen()
    clock = Clock()
    with Progress(total_steps=10, console=console, every=5, clock=clock) as progress:
        for step in range(1, 11):
            clock.now += 2
            progress.update({"step": step, "loss": 3.0, "rho": 0.5, "sample": "words"})
    lines = text().splitlines()
    assert [line.split(",")[0].split()[-1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert "12 left" in lines[1]
    assert "0:12 left: loss 3.000 nats · rho 0.500" in lines[1]
    assert "took 0:20" in lines[-1]


def test_time_left_of_a_resumed_run_is_judged_by_its_own_speed():
    clock = Clock()
    progress = Progress(total_steps=100, console=screen()[0], clock=clock)
    assert math.isnan(progress.seconds_left)
    progress.update({"step": 80, "time": 8000.0})
    clock.now += 5
    progress.update({"step": 90, "time": 8005.0})
    assert progress.seconds_left == pytest.approx(5.0)


def test_the_nearest_goal_counts():
    progress = Progress(total_steps=100, total_seconds=50, console=screen()[0])
    progress.update({"step": 10, "time": 25.0})
    assert progress.share_done == 0.5
    progress.update({"step": 90, "time": 30.0})
    assert progress.share_done == 0.9
    progress.update({"step": 200})
    assert progress.share_done == 1
    assert progress.seconds_left == 0


def test_seconds_are_counted_here_where_the_metrics_do_not():
    clock = Clock()
    progress = Progress(total_seconds=40, console=screen()[0], clock=clock)
    clock.now += 10
    progress.update({"step": 3})
    assert progress.share_done == 0.25


def test_a_terminal_shows_bar_vitals_and_samples():
    console, text = screen(terminal=True)
    with Progress(total_steps=4, console=console) as progress:
        progress.update(
            {"step": 1, "loss": torch.tensor(2.0), "tokens_per_second": 15234, "mfu": 0.37, "loops": 4.25}
        )
        progress.print_sample("def [bold]f(x):", "sample at step 1")
        progress.note("saved [1]")
    assert "25%" in text()
    for words in (
        "loss 2.000 nats",
        "15.2k tokens/s",
        "4.2 loops",
        "MFU 37%",
        "sample at step 1",
        "[bold]f(x)",
        "saved [1]",
    ):
        assert words in text()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_sample_cannot_command_the_terminal(terminal):
    console, text = screen(terminal)
    progress = Progress(total_steps=1, console=console)
    progress.print_sample("a\x1b]0;owned\x07b\udc80 tab\tand\nlines [/red]", "sample at step 0")
    assert "\x1b]0" not in text()
    assert "\x07" not in text()
    assert "lines [/red]" in text()


def test_a_poor_terminal_is_enough():
    console, text = screen(encoding="ascii")
    with Progress(total_steps=1, console=console) as progress:
        progress.update({"step": 1, "loss": 1.0, "rho": 0.1})
        progress.print_sample("naïve 思", "sample at step 1")
    assert "na?ve ?" in text()


def test_alarms_are_red():
    console, text = screen(terminal=True)
    console = Console(file=console.file, force_terminal=True, color_system="standard", width=100)
    with Progress(total_steps=2, console=console) as progress:
        progress.update({"step": 1, "loss": math.nan, "rho": 0.9})
    assert "\x1b[1;31mloss nan" in text()
    assert "31mrho" not in text()


@pytest.mark.parametrize("goals", [{}, {"total_steps": 0}, {"total_seconds": -1.0}])
def test_no_goal_is_refused(goals):
    with pytest.raises(ValueError, match="total_steps or total_seconds"):
        Progress(**goals)


def test_numbers_and_times_are_short():
    assert [short_number(x) for x in (0.5, 980, 15234, 999_900, 3.1e6, 2.7e9)] == [
        "0.5", "980", "15.2k", "1000k", "3.1M", "2.7B",
    ]  # fmt: skip
    assert [clock_time(x) for x in (7, 221, 7500, math.nan)] == ["0:07", "3:41", "2:05:00", "-:--"]
    assert printable("a\x00\n") == "a\N{REPLACEMENT CHARACTER}\n"
