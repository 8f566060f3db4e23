"""Ours against the original package open-mythos 0.5.0: the same weights, one interleaved run.

    python bench/vs_openmythos.py [--quick] [--tasks forward train decode ...] [--device cuda]

Logits are checked equal first, of a forward pass and of a cached step. Then both sides run in turn, A B A B,
each in a process of its own. Every pair gives a ratio; the table shows the median of the ratios, the smallest
and the largest. Above one, ours is faster. `share` is what ours reaches of the best rate of a plain matrix
product, which takes its turn after every pair.

In bfloat16 both run under autocast (a model of the original turned to it raises); --lowered compares
inference with our weights in bfloat16 and the original's under autocast. On a CPU `mythos train` and `sweep`
have the C library keep what is freed, so ours trains and reads whole sequences with that; --keep-freed none
leaves it out, and all gives it to both sides in every task, which tells what is due to the models alone.
--compiled puts both under `torch.compile`: the original whole, its shapes fixed, as well as can be; ours as
`train` and `generate` compile it. Results go to bench/results/ as JSON, those of a given number of threads
and of each of these choices to files of their own.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import counts
import flops
import machine
import memory
import original
import torch
import tyro
from clock import Clock, Comparison, Timer
from sides import LATENT_LAYERS, ONE_LAYER, SIZES, Mixer, Precision, Sides, arithmetic
from worker import Setting, Side, Work, working

Task = Literal["forward", "train", "decode", "attention", "memory", "cache", "counts"]
TASKS: tuple[Task, ...] = ("forward", "train", "decode", "attention", "memory", "cache", "counts")
TOLERANCE = 1e-4
HEADER = f"{'':40}{'theirs':>12}{'ours':>12}{'ratio':>8}{'min':>7}{'max':>7}{'pairs':>7}{'share':>8}"


@dataclass
class Options:
    tasks: tuple[Task, ...] = TASKS
    mixers: tuple[Mixer, ...] = ("mla", "gqa")
    dims: tuple[Literal[256, 512], ...] = (256, 512)
    precisions: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    long: int = 2048  # tokens of the long sequence in forward and train (dim 256 only); 0 to leave it out
    tokens: int = 2048  # of a larger batch in train, in sequences of 256; 0 to leave it out
    contexts: tuple[int, ...] = (128, 1024, 4096)
    batches: tuple[int, ...] = (1, 8)
    quick: bool = False  # one size, one mixer, float32, little time per row
    lowered: bool = False  # only inference in bfloat16, with our weights in it too
    compiled: bool = False  # both sides under torch.compile (up to a minute of warming up per row)
    threads: int | None = None
    clock: Clock = "wall"  # "cpu" with --threads 1 where the machine is not ours alone
    keep_freed: Literal["ours", "none", "all"] = "ours"  # "ours": where `mythos train` and `sweep` do
    budget: float = 6.0  # seconds per row, at least three pairs
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    original: Path | None = None  # folder of an unpacked wheel; else pip downloads it
    out: Path = Path(__file__).parent / "results"


class Bench:
    """Runs rows, prints them, and keeps them."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.folder = original.unpacked(options.original)
        self.module = original.load(self.folder)
        self.timer = Timer(self.device, options.clock, options.budget)
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        options = self.options
        print(f"{machine.name(self.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        for dim, mixer in product(options.dims, options.mixers) if options.tasks != ("attention",) else ():
            self._model(dim, mixer)
        if "attention" in options.tasks:
            self._latent_layers()
        self._save()

    def _model(self, dim: int, mixer: Mixer) -> None:
        name, rows, settings = f"dim {dim} {mixer}", SIZES[dim].rows, SIZES[dim].settings(mixer)
        sides = Sides.build(self.module, settings, self.device)
        _check_equal(name, sides)
        print(f"\n{HEADER}")
        for task, cases in self._cases(dim, rows).items():
            self._compare(sides, settings, name, [Work(task, *case) for case in cases])
        if "cache" in self.options.tasks:
            self._pair(name, "cache, bytes per token", *sides.cache_bytes())
        if "counts" in self.options.tasks:
            self._counts(sides, name, rows)
        if "memory" in self.options.tasks:
            self._memory(name, dim, mixer, rows)

    def _cases(self, dim: int, rows: int) -> dict[Task, list[tuple[int, int, Precision]]]:
        """For each task (sequences, tokens of each or of context, precision)."""
        options = self.options
        lengths = [(rows, 256)] + [(1, options.long)] * bool(options.long and dim == 256)
        cases: dict[Task, list[tuple[int, int]]] = {
            "forward": lengths,
            "train": lengths + [(options.tokens // 256, 256)] * (options.tokens >= 256),
            "decode": [(batch, context) for context in options.contexts for batch in options.batches],
        }
        precisions = ("lowered",) if options.lowered else options.precisions
        return {
            task: [(*case, precision) for precision in precisions for case in found]
            for task, found in cases.items()
            if task in options.tasks
        }

    def _compare(self, sides: Sides, settings: dict[str, Any], name: str, works: list[Work]) -> None:
        """Works of one task, each side in one process for all of them. `sides` is to count operations."""
        with ExitStack() as stack:
            theirs, ours = (
                stack.enter_context(working(self._setting(side, settings, works[0].task)))
                for side in ("theirs", "ours")
            )
            for work in works:
                once = theirs.prepare(work), ours.prepare(work)
                rate = partial(self.timer.matmul_rate, arithmetic(work.precision))
                timing = self.timer.alternate(theirs.sample, ours.sample, once, rate)
                self._keep(sides, name, work, timing)

    def _setting(self, side: Side, settings: dict[str, Any], task: str) -> Setting:
        keep = {"all": True, "none": False, "ours": side == "ours" and task in ("train", "forward")}
        options = self.options
        return Setting(
            side,
            settings,
            self.folder,
            options.device,
            torch.get_num_threads(),
            options.clock,
            keep_freed=self.device.type == "cpu" and keep[options.keep_freed],
            compiled=options.compiled,
        )

    def _keep(self, sides: Sides, name: str, work: Work, timing: Comparison) -> None:
        rate = None
        if work.task in ("forward", "train"):
            run = getattr(sides.at(work.precision), work.task)(work.batch, work.length)[1]
            rate = flops.count(run) / timing.ours
        share = None if rate is None else rate / timing.matmul_rate
        note = "compiled" if self.options.compiled else ""
        label = f"{name} {work.task} {work.batch}x{work.length} {work.precision} {note}"
        spread = f"{timing.ratio:8.2f}{timing.low:7.2f}{timing.high:7.2f}{timing.pairs:7d}"
        times = f"{timing.theirs * 1e3:9.1f} ms{timing.ours * 1e3:9.1f} ms"
        print(f"{label:40}{times}{spread}{'' if share is None else f'{share:8.0%}'}", flush=True)
        self.rows.append(
            {"model": name, "task": work.task, "batch": work.batch, "length": work.length}
            | {"precision": work.precision, "note": note}
            | {"flop_per_second": rate, "share_of_peak": share}
            | timing.to_dict()
        )

    def _latent_layers(self) -> None:
        """MLA's attention alone, one token against a long context."""
        print(f"\n{HEADER}")
        cases = ((1, 4096), (1, 8192), (4, 1024))
        for name, dims in LATENT_LAYERS.items():
            settings = ONE_LAYER | dims
            sides = Sides.build(self.module, settings, self.device)
            works = [Work("attention", *case, p) for p in self.options.precisions for case in cases]
            self._compare(sides, settings, name, works)

    def _counts(self, sides: Sides, name: str, rows: int) -> None:
        """Kernels and waits; on a CPU operations and reads."""
        kind = ("kernels", "waits") if self.device.type == "cuda" else ("operations", "host reads")
        for task, batch, length in (("forward", rows, 256), ("train", rows, 256), ("decode", 1, 128)):
            theirs, ours = (counts.count(run, self.device) for run in getattr(sides, task)(batch, length))
            self._pair(name, f"{task} {batch}x{length}, {kind[0]}", theirs.launched, ours.launched)
            self._pair(name, f"{task} {batch}x{length}, {kind[1]}", theirs.waited, ours.waited)

    def _memory(self, name: str, dim: int, mixer: Mixer, rows: int) -> None:
        cases = [("train", rows, 256)]
        if self.options.long and dim == 256:
            cases += [("forward", 1, self.options.long), ("train", 1, self.options.long)]
        for task, batch, length in cases:
            arguments = task, dim, mixer, batch, length, self.device.type, self.folder
            peaks = [memory.peak(side, *arguments) for side in ("theirs", "ours")]
            self._pair(name, f"{task} {batch}x{length}, peak MiB", *peaks)

    def _pair(self, name: str, what: str, theirs: float, ours: float) -> None:
        """Two numbers that need no timing."""
        ratio = f"{theirs / ours:8.2f}" if ours else f"{'':8}"
        print(f"{name + ' ' + what:40}{theirs:12,.0f}{ours:12,.0f}{ratio}", flush=True)
        self.rows.append({"model": name, "task": what, "theirs": theirs, "ours": ours})

    def _save(self) -> None:
        about = {
            "machine": machine.name(self.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "clock": self.options.clock,
            "keep_freed": self.options.keep_freed,
        }
        self.options.out.mkdir(parents=True, exist_ok=True)
        given = "" if self.options.threads is None else f"-{self.options.threads}-threads"
        given += "-lowered" if self.options.lowered else ""
        given += "-compiled" if self.options.compiled else ""
        given += {"ours": "", "none": "-keep-nothing", "all": "-keep-freed"}[self.options.keep_freed]
        path = self.options.out / f"vs_openmythos-{self.device.type}{given}.json"
        path.write_text(json.dumps(about | {"rows": self.rows}, indent=1) + "\n")
        print(f"\n{path}")


def _check_equal(name: str, sides: Sides) -> None:
    """Raises `ValueError` unless both sides give the same logits."""
    for what, runs in (("forward", sides.forward(2, 64)), ("decode", sides.decode(2, 64))):
        theirs, ours = (run() for run in runs)
        error = (theirs - ours).abs().max().item()
        if not error < TOLERANCE:
            raise ValueError(f"{name}: logits of {what} differ by {error:.1e}, so times mean nothing")
        print(f"{name} {what}: logits differ by {error:.1e} at most, the largest is {theirs.abs().max():.1f}")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.quick:
        options.dims, options.mixers, options.precisions = (256,), ("mla",), ("float32",)
        options.contexts, options.batches, options.tokens, options.budget = (128, 1024), (1,), 0, 2.0
    if options.lowered and options.compiled:
        sys.exit("vs_openmythos: --lowered and --compiled are two comparisons; give one of them")
    if options.lowered:
        options.tasks = tuple(task for task in options.tasks if task in ("forward", "decode"))
    if options.compiled:
        options.tasks = tuple(task for task in options.tasks if task in ("forward", "train", "decode"))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        Bench(options).run()
    except ValueError as error:
        sys.exit(f"vs_openmythos: {error}")


if __name__ == "__main__":
    main()
