"""What a person sees while training: a bar with the time left, and the vital signs of a looped model.

    training ━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━  62%  step 310  3:41 left
    loss 2.310 nats · 1.410 bits/byte · 15.2k tokens/s
    4.2 loops · balance 1.18 · rho 0.930 · grad 0.71

On a terminal the lines stay in place; elsewhere (a log file, a pipe) a plain line is printed
every few seconds. The names of the metrics are those of train/metrics.py; those absent are left out.
"""

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REDRAW = 0.1  # seconds between two looks; short steps should not pay for more


class Vital(NamedTuple):
    """How one metric is shown; `alarm` says when it is shown in red."""

    name: str
    show: Callable[[float], str]
    alarm: Callable[[float], bool] = lambda value: not math.isfinite(value)


OUTCOME = (
    Vital("loss", lambda x: f"loss {x:.3f} nats"),
    Vital("bits_per_byte", lambda x: f"{x:.3f} bits/byte"),
    Vital("eval_bits_per_byte", lambda x: f"held out {x:.3f} bits/byte"),
    Vital("tokens_per_second", lambda x: f"{short_number(x)} tokens/s"),
)
HEALTH = (
    Vital("loops", lambda x: f"{x:.1f} loops"),
    Vital("exit_step", lambda x: f"leaves at {x:.2f}"),
    Vital("expert_balance", lambda x: f"balance {x:.2f}", lambda x: not x < 4),
    Vital("rho", lambda x: f"rho {x:.3f}", lambda x: not x < 1),
    Vital("grad_norm", lambda x: f"grad {x:.2f}"),
    Vital("mfu", lambda x: f"MFU {short_number(100 * x)}%"),
)


class Progress:
    """Live progress towards a number of steps, of seconds of training, or whichever is reached first.

    `console` is where it shows (standard output), `every` the seconds between plain lines, `clock` the
    source of time where the metrics carry none. Raises `ValueError` when there is no goal.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        total_seconds: float | None = None,
        *,
        console: Console | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        goals = {"step": total_steps, "time": total_seconds}
        self._goals = {name: float(goal) for name, goal in goals.items() if goal is not None}
        if not self._goals or min(self._goals.values()) <= 0:
            raise ValueError(f"progress needs total_steps or total_seconds above zero, got {goals}")
        self._console = console or Console(highlight=False)
        self._every = every
        self._clock = clock
        self._began = clock()
        self._first: tuple[float, float] | None = None  # clock and share done at the first update
        self._metrics: dict[str, float] = {}
        self._drawn = -math.inf
        self._printed = (-math.inf, -1.0)  # clock and step of the last plain line
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(self._view(), refresh=True)
            self._live.stop()
        elif self._metrics and self._printed[1] != self._metrics.get("step"):
            self._print_line()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show these metrics; a metric not given keeps its last value. Words and lists are passed over."""
        now = self._clock()
        self._metrics.setdefault("time", 0.0)
        if "time" not in metrics:
            self._metrics["time"] = now - self._began
        self._metrics.update({name: float(value) for name, value in metrics.items() if _is_number(value)})
        self._first = self._first or (now, self.share_done)
        if self._live:
            if now - self._drawn >= REDRAW:
                self._drawn = now
                self._live.update(self._view(), refresh=True)
        elif now - self._printed[0] >= self._every:
            self._print_line()

    def print_sample(self, text: str, title: str) -> None:
        """Show text from the model above the bar; control characters are made harmless."""
        body = Text(printable(text, self._console.encoding))
        if self._live:
            self._console.print(Panel(body, title=Text(title), title_align="left", border_style="dim"))
            return
        self._print(f"-- {title}")
        for line in body.plain.splitlines():
            self._print(f"   {line}")

    def note(self, text: str) -> None:
        """Say one line above the bar, as when a checkpoint was written."""
        self._print(printable(text, self._console.encoding))

    @property
    def share_done(self) -> float:
        """From 0 to 1, by the goal that is nearest."""
        return min(1.0, max(self._metrics.get(name, 0.0) / goal for name, goal in self._goals.items()))

    @property
    def seconds_left(self) -> float:
        """Judged by the speed since the first update, so that a resumed run is not flattered. NaN before."""
        if self._first is None or self.share_done <= self._first[1]:
            return 0.0 if self.share_done == 1 else math.nan
        spent = self._clock() - self._first[0]
        return spent * (1 - self.share_done) / (self.share_done - self._first[1])

    def _view(self) -> RenderableType:
        head = Table.grid(padding=(0, 1), expand=False)
        head.add_row(
            "training",
            ProgressBar(
                total=1.0, completed=self.share_done, width=max(10, min(40, self._console.width - 50))
            ),
            f"{self.share_done:4.0%}",
            f"step {self._step()}",
            f"{clock_time(self.seconds_left)} left" if self.share_done < 1 else self._spent(),
        )
        return Group(head, self._vitals(OUTCOME), self._vitals(HEALTH))

    def _step(self) -> str:
        goal = f"/{self._goals['step']:.0f}" if "step" in self._goals else ""
        return f"{self._metrics.get('step', 0):.0f}{goal}"

    def _spent(self) -> str:
        return f"took {clock_time(self._metrics.get('time', 0.0))}"

    def _vitals(self, vitals: tuple[Vital, ...]) -> Text:
        shown = [
            (vital.show(self._metrics[vital.name]), vital.alarm(self._metrics[vital.name]))
            for vital in vitals
            if vital.name in self._metrics
        ]
        parts = [Text(words, style="bold red" if alarm else "") for words, alarm in shown]
        dot = Text.assemble((" · " if self._console.encoding.startswith("utf") else " | ", "dim"))
        return dot.join(parts)

    def _print_line(self) -> None:
        self._printed = (self._clock(), self._metrics.get("step", -1.0))
        left = f"{clock_time(self.seconds_left)} left" if self.share_done < 1 else self._spent()
        self._print(
            f"{self.share_done:4.0%} step {self._step()}, {left}: {self._vitals(OUTCOME + HEALTH).plain}"
        )

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def short_number(value: float) -> str:
    """Four characters or so: 980, 15.2k, 3.1M, 2.7B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return (
                f"{value / size:.3g}{letter}" if abs(value) < 999.5 * size else f"{value / size:.0f}{letter}"
            )
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def clock_time(seconds: float) -> str:
    """As on a clock: 0:07, 3:41, 2:05:00; -:-- where it is not known."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str, encoding: str = "utf-8") -> str:
    """Text that a terminal shows but never obeys: an untrained model writes escape sequences too."""
    kept = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return kept.encode(encoding, "replace").decode(encoding)


def _is_number(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return hasattr(value, "item") and getattr(value, "ndim", 1) == 0
