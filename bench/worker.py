"""One of the two sides, in a process of its own.

People run one model and not two in turns. In a process that both share, each leaves memory in the pieces that
the other has to live with, and what the C library is told for one it is told for both. So each side waits for
its turn in a process of its own.
"""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import original
import torch
from clock import Clock, Timer
from sides import Precision, Sides

from open_mythos.infer.compiled import CompiledVerbs
from open_mythos.train.allocator import keep_freed_memory

Side = Literal["theirs", "ours"]


@dataclass(frozen=True)
class Setting:
    """What a worker needs to build its side; it builds both, so that the weights are the same."""

    side: Side
    settings: dict[str, Any]
    folder: Path
    device: str
    threads: int
    clock: Clock
    keep_freed: bool
    compiled: bool


@dataclass(frozen=True)
class Work:
    """`task` is a method of `Sides`."""

    task: str
    batch: int
    length: int
    precision: Precision


class Worker:
    def __init__(self, process: Any, pipe: Connection) -> None:
        self._process, self._pipe = process, pipe

    def prepare(self, work: Work) -> float:
        """Make ready for `sample`; gives a first estimate, in seconds."""
        return self._ask(work)

    def sample(self, repeats: int) -> float:
        """Seconds per run, over so many in a row."""
        return self._ask(repeats)

    def _ask(self, request: Work | int) -> float:
        self._pipe.send(request)
        try:
            answer: float | str = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process of one side ended, exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


@contextmanager
def working(setting: Setting) -> Iterator[Worker]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(setting, there), daemon=True)
    process.start()
    there.close()
    try:
        yield Worker(process, here)
    finally:
        here.close()
        process.join()


def _serve(setting: Setting, pipe: Connection) -> None:
    if setting.keep_freed:
        keep_freed_memory()
    torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    timer = Timer(device, setting.clock)
    sides = Sides.build(original.load(setting.folder), setting.settings, device)
    run = None
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            if isinstance(request, Work):
                if setting.compiled and run is None:
                    _compile(sides, request.task)
                prepared = sides.at(request.precision)
                run = getattr(prepared, request.task)(request.batch, request.length)[setting.side == "ours"]
                if setting.compiled:
                    run()  # so that compiling is no part of the estimate
                pipe.send(timer.warm(run))
            else:
                pipe.send(timer.seconds(run, request))
        except Exception as error:
            pipe.send(f"{setting.side}: {type(error).__name__}: {error}")


def _compile(sides: Sides, task: str) -> None:
    """The original whole, its shapes fixed; of ours the step of the loop, or what `generate` compiles."""
    sides.theirs = torch.compile(sides.theirs, dynamic=False)
    if task == "decode":
        sides.verbs = CompiledVerbs(sides.lm)
    else:
        sides.lm.loop.step = torch.compile(sides.lm.loop.step, dynamic=False)
