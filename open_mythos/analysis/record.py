"""What a run left in its folder, read with patience: every file may be missing, cut short or damaged.

config.json      the resolved config
metrics.jsonl    one line per logged step; names and units in train/metrics.py
sweep.json       {"loops": [..], "bits_per_byte": [..], "trained_loops": n, "relative_step": [..],
                  "state_norm": [..], "expert_load": [[..] per loop]}
baselines.json   {"gzip -9": 1.96, ..}, bits per byte of the same held-out text
samples.jsonl    {"step": n, "text": ".."} per line
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from open_mythos.train.metrics import read_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """A run as far as it can be read; `notes` says what could not."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    sweep: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Raises `ValueError` where nothing in the folder says that a run was here."""
        files: dict[str, Callable[[Path], Any]] = {
            "config.json": _read_object,
            "metrics.jsonl": read_rows,
            "sweep.json": _read_object,
            "baselines.json": _read_object,
            "samples.jsonl": read_rows,
        }
        if not any((folder / name).is_file() for name in files):
            raise ValueError(f"{folder} is not the folder of a run: it holds none of {', '.join(files)}")
        parts: dict[str, Any] = {}
        notes = []
        for name, read in files.items():
            try:
                parts[name.partition(".")[0]] = read(folder / name)
            except FileNotFoundError:
                continue
            except (ValueError, OSError) as error:
                notes.append(f"{name} could not be read: {error}")
        parts["baselines"] = {k: float(v) for k, v in parts.get("baselines", {}).items() if _is_number(v)}
        return cls(name=folder.resolve().name, notes=tuple(notes), **parts)

    def series(self, name: str) -> Float[np.ndarray, "N"]:
        """A metric at every logged line, NaN where it was not measured."""
        return _numbers([row.get(name) for row in self.metrics])

    def last(self, name: str) -> float | None:
        """The latest finite value of a metric."""
        return next((v for v in reversed(self.series(name).tolist()) if np.isfinite(v)), None)

    def swept(self, name: str) -> Float[np.ndarray, "N"]:
        """A list of numbers from the sweep, empty where it is absent."""
        values = self.sweep.get(name)
        return _numbers(values if isinstance(values, list) else [])

    @property
    def expert_load(self) -> Float[np.ndarray, "N E"] | None:
        rows = self.sweep.get("expert_load")
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
            return None
        return np.stack([_numbers(row) for row in rows]) if len({len(row) for row in rows}) == 1 else None

    @property
    def depth_curve(self) -> Mapping[float, float]:
        """Held-out bits per byte at each number of loops, shallow first."""
        pairs = zip(self.swept("loops").tolist(), self.swept("bits_per_byte").tolist(), strict=False)
        return dict(sorted((n, loss) for n, loss in pairs if n > 0 and np.isfinite(loss)))

    @property
    def trained_loops(self) -> float | None:
        value = self.sweep.get("trained_loops")
        return float(value) if _is_number(value) else None  # type: ignore[arg-type]

    @property
    def held_out(self) -> float | None:
        """Bits per byte of held-out text: the last one logged (of a finished run, over all of it), else the
        sweep's at the trained depth."""
        logged = self.last("eval_bits_per_byte")
        swept = self.depth_curve.get(self.trained_loops) if self.trained_loops is not None else None
        return logged if logged is not None else swept

    @property
    def texts(self) -> list[tuple[int, str]]:
        """Samples in order of step, from samples.jsonl or else from the metrics."""
        rows = self.samples or [{"step": row.get("step"), "text": row.get("sample")} for row in self.metrics]
        return [(int(row.get("step") or 0), row["text"]) for row in rows if isinstance(row.get("text"), str)]


def _read_object(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"it should hold a JSON object, not {type(data).__name__}")
    return data


def _numbers(values: Sequence[Any]) -> Float[np.ndarray, "N"]:
    return np.array([float(value) if _is_number(value) else np.nan for value in values], dtype=float)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
