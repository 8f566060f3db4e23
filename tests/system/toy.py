"""A run so small that it can be killed fifty times, and the processes to kill."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from open_mythos.data.corpus import CorpusConfig, Reasoning, Streamed
from open_mythos.data.puzzles import KHop, Parity
from open_mythos.data.text import Files
from open_mythos.data.tokenizer import Bytes
from open_mythos.train.fit import Every, Run
from open_mythos.train.metrics import read_rows
from open_mythos.train.recipe import Data, Recipe
from open_mythos.train.recipes import for_model, small_mythos
from open_mythos.train.step import TrainState

CPU = torch.device("cpu")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["open_mythos.cli.train", "open_mythos.train.fit", "tests.system.toy"])


def text(folder: Path) -> tuple[str, ...]:
    """Files with something to learn."""
    folder.mkdir(exist_ok=True)
    for number in range(24):
        words = (f"{number + i} {'is' if i % 3 else 'was'} {(number * i) % 7}" for i in range(80))
        (folder / f"{number:02}.txt").write_text("\n".join(words))
    return (str(folder),)


def data(kind: str, folder: Path) -> Data:
    if kind == "puzzles":
        return Reasoning(puzzles=(KHop(), Parity()))
    files = Files(paths=text(folder / "text"))
    if kind == "stream":
        return Streamed(
            source=files, tokenizer=Bytes(), held_out=0.2, held_out_documents=3, window=8, workers=2
        )
    return CorpusConfig(source=files, tokenizer=Bytes(), held_out=0.2)


def recipe(folder: Path, kind: str = "text", **changes: object) -> Recipe:
    """Two-dimensional heads, one thread, float32: milliseconds per update."""
    model = small_mythos(dim=16, heads=2, vocab=320, mean=2)
    few = {"eval_every": 10**6, "sample_every": 10**6, "save_every": 1, "eval_rows": 4}
    length = 256 if kind == "puzzles" else 16
    made = for_model(model).replace(
        data=data(kind, folder), length=length, batch=4, precision="float32", **few
    )
    return made.replace(**changes)


def train(recipe: Recipe, folder: Path, hooks: Sequence[Every] = ()) -> TrainState:
    """Begin, or go on from the newest checkpoint if there is one."""
    torch.set_num_threads(1)
    run = Run(recipe, recipe.data.build(), folder, CPU)
    begun = any((folder / "checkpoints").glob("step-*"))
    return run.fit(run.resume() if begun else run.begin(), hooks)


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl")}


def training(recipe: Recipe, folder: Path) -> BaseProcess:
    """`train` in a process of its own, which starts in milliseconds."""
    process = FORKS.Process(target=train, args=(recipe, folder))
    process.start()
    return process


def commanding(argv: Sequence[str], said: Path) -> BaseProcess:
    """The `mythos` command in a process of its own; what it says goes to the file `said`."""
    process = FORKS.Process(target=_command, args=(tuple(argv), said))
    process.start()
    return process


def _command(argv: tuple[str, ...], said: Path) -> None:
    from open_mythos.cli.main import main

    torch.set_num_threads(1)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(argv))


def torchrun(processes: int, *argv: str, restarts: int = 0) -> "subprocess.Popen[str]":
    """Several processes on this machine, run by torch's launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.Popen(
        [*launcher, str(processes), "--max-restarts", str(restarts), *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
