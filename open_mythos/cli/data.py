"""`mythos data`: tokenise text ahead of training, check what was written, look at text and puzzles."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from open_mythos.data.shards import Prepare


@dataclass(frozen=True)
class PrepareOptions:
    """Tokenise text into a folder of memory-mapped shards, which training reads in any order and on any
    ranks.

    Killed on the way, the same command goes on where it stopped.
    """

    folder: tyro.conf.Positional[Path]
    """Where the shards go."""
    data: tuple[str, ...] = ("python",)
    """Files and folders (text, code, jsonl, parquet), a Hub dataset as owner/name[:config], or python."""
    tokenizer: str = "bpe"
    """bytes, bpe (trained on this text), a folder with a tokenizer.json, or owner/name of the Hub."""
    vocab_size: int = 4096
    """Of the bpe."""
    held_out: float = 0.05
    """The fraction of documents kept from training."""
    text_field: str = "text"
    """The column of jsonl, parquet and Hub rows that holds the text."""
    part_tokens: int = 100_000_000
    """How many tokens go into one shard."""
    limit: int | None = None
    """Stop after so many documents."""

    def plan(self) -> "Prepare":
        """What these options ask for. Raises `ValueError` for data or a tokenizer that is not there."""
        from open_mythos.data.shards import Prepare
        from open_mythos.data.text import Stdlib, source
        from open_mythos.data.tokenizer import tokenizer_named

        found = source(*self.data)
        return Prepare(
            source=found if isinstance(found, Stdlib) else found.replace(text_field=self.text_field),
            tokenizer=tokenizer_named(self.tokenizer, self.vocab_size),
            held_out=self.held_out,
            part_tokens=self.part_tokens,
            limit=self.limit,
        )


@dataclass(frozen=True)
class ShowOptions:
    """Print examples of a puzzle (khop, addition, reachability, ..), or documents of a text."""

    what: tyro.conf.Positional[str]
    """A puzzle, a file or folder, a Hub dataset as owner/name[:config], or python."""
    difficulty: int | None = None
    """Of the puzzle; without it, each difficulty it is trained and tested on."""
    count: int = 3
    """Examples per difficulty, or documents."""
    seed: int = 0
    """Which examples."""
    override: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """Settings of the puzzle, as in entities=40."""


@dataclass(frozen=True)
class CheckOptions:
    """Compare a prepared folder with its checksums, and print what it holds."""

    folder: tyro.conf.Positional[Path]
    """A folder written by `mythos data prepare`."""


def main(argv: list[str]) -> int:
    verbs: dict[str, Callable[..., Any]] = {
        "prepare": PrepareOptions,
        "show": ShowOptions,
        "check": CheckOptions,
    }
    _run(tyro.extras.subcommand_cli_from_dict(verbs, prog="mythos data", args=argv))
    return 0


def _run(options: PrepareOptions | ShowOptions | CheckOptions) -> None:
    if isinstance(options, PrepareOptions):
        _prepare(options)
    elif isinstance(options, ShowOptions):
        _show(options)
    else:
        _check(options.folder)


def _prepare(options: PrepareOptions) -> None:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("reading the text", total=None)

        def tell(documents: int, tokens: int) -> None:
            bar.update(task, description=f"{documents:,} documents, {tokens:,} tokens")

        options.plan().write(options.folder, tell)
    _describe(options.folder)


def _check(folder: Path) -> None:
    from open_mythos.data.shards import open_corpus

    open_corpus(folder, verify=True)
    _describe(folder)
    print("every shard agrees with its checksum")


def _describe(folder: Path) -> None:
    from open_mythos.data.shards import SPLITS, read_index

    index = read_index(folder)
    print(f"{folder}: a vocabulary of {index['vocab_size']:,}, {index['documents']:,} documents")
    for split in SPLITS:
        tokens, size = (sum(shard[name] for shard in index["shards"][split]) for name in ("tokens", "bytes"))
        per_token = f", {size / tokens:.2f} bytes per token" if tokens else ""
        print(f"  {split.replace('_', '-'):9} {tokens:>15,} tokens{per_token}")


def _show(options: ShowOptions) -> None:
    from open_mythos.data.puzzles import PUZZLES

    name = options.what.lower()
    is_text = name == "python" or "/" in name or Path(options.what).exists()
    if name in PUZZLES or not is_text:
        _show_puzzle(options)
    else:
        _show_text(options)


def _show_puzzle(options: ShowOptions) -> None:
    from rich.console import Console

    from open_mythos.data.puzzles import examples_of, puzzle_named, vocab_size

    puzzle = puzzle_named(options.what).override(*options.override)
    say: Callable[..., None] = Console(highlight=False, soft_wrap=True).print
    say(f"{puzzle}\n{vocab_size(puzzle)} words", markup=False)
    chosen = (*puzzle.train, *puzzle.test) if options.difficulty is None else (options.difficulty,)
    for difficulty in chosen:
        split = (
            "train"
            if difficulty in puzzle.train
            else "test"
            if difficulty in puzzle.test
            else "neither split"
        )
        say(f"\ndifficulty {difficulty} ({split})", style="bold")
        for example in examples_of(puzzle, difficulty, options.count, options.seed):
            say(" ".join(example.question), end=" ", markup=False)
            say(" ".join(example.answer), style="bold green", markup=False)


def _show_text(options: ShowOptions) -> None:
    import itertools

    from open_mythos.data.text import source

    for number, text in enumerate(itertools.islice(source(options.what).documents(), options.count)):
        print(f"--- document {number}: {len(text):,} characters\n{text[:600]}")
