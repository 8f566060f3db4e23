"""Time to a held-out loss: our default recipe against the package open-mythos 0.5.0 and its own recipe.

    python bench/train.py [--seconds 300] [--dim 256] [--their-lrs 3e-4 3e-3]

Same text in the same batches, same number of parameters, two threads each. Every side is a process of its
own; they take turns, one training while the others wait, so that a machine that is busy for a while slows
all. Only a side's own training time counts. The level to reach is what the original has reached when its time
is over. It learns at the rate of its script (3e-4 for the 3B); more rates are more sides, since a small model
learns faster with a higher one, and then the level is that of the best of them. Results go to
bench/results/train-cpu.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import original
import tyro
from learner import Task
from machine import machine

from open_mythos.data.shards import Prepare, read_index
from open_mythos.data.tokenizer import BPE

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    seconds: float = 300.0  # of training, for each side
    turn: float = 20.0  # seconds until the next side's turn
    dim: int = 256
    loops: int = 4  # of the original always, of ours in the mean
    level: float | None = None  # bits per byte to reach; default: what the original reaches
    their_lrs: tuple[float, ...] = (3e-4,)
    threads: int = 2
    vocab: int = 4096
    length: int = 128
    batch: int = 32
    rows: int = 64  # of held-out text, measured after every turn
    seed: int = 0
    text: Path | None = None  # where the tokenized corpus is kept; default: runs/bench-text-VOCAB
    original: Path | None = None  # folder of an unpacked wheel; else pip downloads it
    out: Path = Path(__file__).parent / "results"

    def __post_init__(self) -> None:
        if min(self.seconds, self.turn) <= 0 or not self.their_lrs:
            raise ValueError("seconds and turn must be above zero, and their-lrs at least one")


class Point(NamedTuple):
    seconds: float
    tokens: int
    bits: float


class Side:
    """A learner in its own process, and what it has said."""

    def __init__(self, name: str, task: Task) -> None:
        self.name, self.points, self.done = name, list[Point](), False
        environment = os.environ | {"OMP_NUM_THREADS": str(task.threads)}
        learner = Path(__file__).with_name("learner.py")
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, str(learner), json.dumps(task._asdict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.parameters = self._listen()

    def learn(self, seconds: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        self._listen()

    def _listen(self) -> int:
        """Wait for the end of its turn. Raises `ValueError` if the process has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise ValueError(f"{self.name} failed:\n{self.log.read().strip()[-2000:]}")
        said = json.loads(line)
        self.points.append(Point(said["seconds"], said["tokens"], said["bits"]))
        self.done = said["done"]
        return int(said["parameters"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    @property
    def rates(self) -> list[float]:
        """Tokens per second of every turn but the first, which also sets up."""
        pairs = list(zip(self.points[:-1], self.points[1:], strict=True))
        return [(b.tokens - a.tokens) / (b.seconds - a.seconds) for a, b in (pairs[1:] or pairs)]

    def time_to(self, level: float) -> float | None:
        """Seconds of training until held-out loss was at `level`, on a line between two measurements."""
        for a, b in zip(self.points[:-1], self.points[1:], strict=True):
            if b.bits <= level:
                share = (a.bits - level) / (a.bits - b.bits) if a.bits > b.bits else 1.0
                return a.seconds + max(0.0, share) * (b.seconds - a.seconds)
        return None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parameters": self.parameters,
            "tokens_per_second": median(self.rates),
            "tokens_per_second_range": [min(self.rates), max(self.rates)],
            "curve": [point._asdict() for point in self.points],
        }


def run(options: Options) -> list[Side]:
    """Ours first, then the original at each of its learning rates."""
    text = _text(options)
    folder = original.unpacked(options.original)
    sides: list[Side] = []
    try:
        for lr in (None, *options.their_lrs):
            name = "ours" if lr is None else f"original, lr {lr:g}"
            sides.append(Side(name, _task(options, lr, text, folder)))
            print(f"{name}: {sides[-1].parameters:,} parameters", flush=True)
        _check_equal(sides)
        while not all(side.done for side in sides):
            for side in sides:
                if not side.done:
                    side.learn(options.turn)
            _show(sides, options)
    finally:
        for side in sides:
            side.close()
    return sides


def _task(options: Options, lr: float | None, text: Path, folder: Path) -> Task:
    same = {name: getattr(options, name) for name in Task._fields if name not in ("lr", "text", "original")}
    return Task(lr=lr, text=str(text.resolve()), original=str(folder.resolve()), **same)


def _text(options: Options) -> Path:
    """The built-in corpus, tokenized once."""
    folder = options.text or ROOT / "runs" / f"bench-text-{options.vocab}"
    if not (folder / "index.json").exists() or not read_index(folder)["complete"]:
        print("tokenizing Python's own source (half a minute, once)", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        Prepare(tokenizer=BPE(vocab_size=options.vocab)).write(folder)
    return folder


def _check_equal(sides: list[Side]) -> None:
    for side in sides[1:]:
        if abs(side.parameters / sides[0].parameters - 1) > 0.02:
            raise ValueError(f"{side.name} has {side.parameters:,} parameters, ours {sides[0].parameters:,}")


def _show(sides: list[Side], options: Options) -> None:
    each = "   ".join(f"{side.name} {side.points[-1].bits:.3f}" for side in sides)
    left = sum(options.seconds - side.points[-1].seconds for side in sides if not side.done)
    print(f"{sides[0].points[-1].seconds:6.0f} s   {each}   ({left / 60:.1f} minutes left)", flush=True)


def report(sides: list[Side], options: Options) -> None:
    """The table, and the file."""
    ours, *theirs = sides
    best = min(theirs, key=lambda side: side.points[-1].bits)
    level = options.level if options.level is not None else best.points[-1].bits
    reached = ours.time_to(level)
    print(f"\nlevel {level:.3f} bits per byte ({'given' if options.level else best.name + ', at its end'})")
    print(f"{'':24}{'tokens/s':>10}{'min':>8}{'max':>8}{'at the end':>12}{'to level':>11}{'ours is':>10}")
    rows = []
    for side in sides:
        time = side.time_to(level)
        ratio = time / reached if time is not None and reached is not None else None
        faster = median(ours.rates) / median(side.rates)
        cells = f"{median(side.rates):10,.0f}{min(side.rates):8,.0f}{max(side.rates):8,.0f}"
        spent = "never" if time is None else f"{time:.0f} s"
        times = "" if ratio is None else f"{ratio:.2f}x"
        print(f"{side.name:24}{cells}{side.points[-1].bits:12.3f}{spent:>11}{times:>10}")
        rows.append(
            side.to_dict() | {"seconds_to_level": time, "ours_faster": ratio, "ours_tokens_ratio": faster}
        )
    settings = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    about = machine(options.threads) | {"level": level, "settings": settings}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "train-cpu.json"
    path.write_text(json.dumps(about | {"sides": rows}, indent=1) + "\n")
    print(f"\n{path}")


def main() -> None:
    try:
        options = tyro.cli(Options, description=__doc__)
        report(run(options), options)
    except ValueError as error:
        sys.exit(f"train: {error}")
    except KeyboardInterrupt:
        sys.exit("train: interrupted, nothing is kept")


if __name__ == "__main__":
    main()
