"""metrics.jsonl: what training measured, one JSON object a line, from the first step to the last.

    {"step": 120, "loss": 2.31, "tokens": 983040, "tokens_per_second": 15210.0, "loops": 4.25, ...}

Names and units: `step` (optimiser steps so far), `time` (seconds of training so far, over all
resumes), `loss` (nats per token), `bits_per_byte`, `eval_bits_per_byte` (held-out text), `tokens`
(seen so far), `tokens_per_second`, `loops` (mean depth drawn), `grad_loops` (those of them with
gradient, where some are without), `lr`, `grad_norm`, `expert_balance` (load of the fullest expert over
the mean), `exit_step` (after which a learned gate leaves on average), `rho` (spectral radius of the
injection), `mfu` (share of the measured peak), `sample` (text). Every name but `step` may be absent.

A line is flushed as it is written, so a killed run loses at most the line being written; a resumed
run first drops all that came after the step it resumes from.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from open_mythos.whole import writing


class MetricsLog:
    """Appends to metrics.jsonl. `keep` is the step to resume from: later lines are dropped (0: all are)."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, _bytes_up_to(path, keep))
        self._file = path.open("a", encoding="utf-8")

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write one line. Tensors and arrays of one number become numbers; NaN and infinities become null."""
        if "step" not in metrics:
            raise ValueError(f"a line of metrics needs its step, got {', '.join(metrics) or 'nothing'}")
        row = {name: _plain(value) for name, value in metrics.items()}
        with writing(self.path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        with writing(self.path):
            self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a last line that a kill cut short.

    Raises `ValueError` naming the line where any other is damaged.
    """
    *lines, last = path.read_bytes().split(b"\n")
    rows = [_row(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        return [*rows, _row(last, path, len(lines) + 1)]
    except ValueError:
        return rows


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} of {path} should be a JSON object, got {row!r}")
    return row


def _bytes_up_to(path: Path, step: int) -> int:
    """How much of the file is whole lines of steps up to and including this one."""
    if step <= 0:
        return 0
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") or _row(line, path, number).get("step", 0) > step:
                break
            size += len(line)
    return size


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
