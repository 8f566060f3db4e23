"""`mythos sweep RUN --loops 1:32`: held-out loss against the number of loops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from open_mythos.analysis.sweep import Sweep
    from open_mythos.data.rows import Tokens
    from open_mythos.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """Measure a trained model at many depths in one pass: `mythos sweep runs/demo --loops 1:32`.

    Writes sweep.json into the folder, from which `mythos report` draws.
    """

    run: tyro.conf.Positional[Path]
    """The folder that training left, as in runs/demo."""

    loops: str | None = None
    """Depths as 1:32, 1:32:4 or 1,2,4,8. Default: 1 to four times the trained depth."""

    data: tuple[str, ...] = ()
    """Files or folders of text, all of which is measured. Default: the text that the run held out."""

    length: int | None = None
    """Tokens per row. Default: as in training."""

    rows: int = 64
    """How many rows to measure."""

    batch: int = 16
    """Rows at a time."""

    step: int | None = None
    """The checkpoint of this training step. Default: the newest."""

    device: str | None = None
    """cpu, cuda, cuda:1. Default: the best there is."""

    save: bool = True
    """Write sweep.json into the folder."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="mythos sweep", args=argv)
    for name in ("rows", "batch", "length"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} should be at least 1, got {value}")
    loops = None if options.loops is None else depths(options.loops)
    from open_mythos.analysis.sweep import sweep, write_sweep
    from open_mythos.cli.named import device_named, note
    from open_mythos.train.allocator import keep_freed_memory
    from open_mythos.train.load import load_recipe, load_run

    keep_freed_memory()
    device = device_named(options.device)
    recipe = load_recipe(options.run)
    model, tokenizer = load_run(options.run, options.step, note)
    text = _text(options, tokenizer)
    length = options.length if options.length is not None else recipe.length
    found = sweep(model.to(device), text, length, loops=loops, rows=options.rows, batch=options.batch)
    _show(found)
    if options.save:
        print(write_sweep(options.run, found))
    return 0


def depths(text: str) -> list[int]:
    """1:32 (both ends), 1:32:4 (every fourth) or 1,2,4. Raises `ValueError` for anything else."""
    try:
        if ":" not in text:
            found = [int(part) for part in text.split(",")]
        else:
            first, last, *every = (int(part) for part in text.split(":"))
            found = list(range(first, last + 1, *every))
    except (ValueError, TypeError):
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"loops should be depths of at least 1 as in 1:32, 1:32:4 or 1,2,4,8; got {text!r}")
    return found


def _text(options: Options, tokenizer: Tokenizer) -> Tokens:
    from open_mythos.data.corpus import CorpusConfig
    from open_mythos.data.rows import tokenize
    from open_mythos.data.text import source
    from open_mythos.train.load import load_recipe

    if options.data:
        return tokenize(source(*options.data).documents(), tokenizer)
    data = load_recipe(options.run).data
    if isinstance(data, CorpusConfig):  # the run's own tokenizer, whatever has become of the source since
        return tokenize(data.split()[1], tokenizer)
    corpus = data.build()
    if corpus.puzzle is not None:
        raise ValueError("the run learned puzzles, which have no held-out text; give some with --data")
    return corpus.held_out


def _show(found: Sweep) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False)
    for column in ("loops", "bits per byte", "nats per token", "relative step", "state norm"):
        table.add_column(column, justify="right")
    for n, bits, nats in zip(found.loops, found.bits_per_byte, found.nats_per_token, strict=True):
        step, norm = found.relative_step[n - 1], found.state_norm[n - 1]
        bold = "bold" if n == found.trained_loops else ""
        table.add_row(str(n), f"{bits:.4f}", f"{nats:.4f}", f"{step:.3g}", f"{norm:.3g}", style=bold)
    Console().print(table)
