"""`mythos generate RUN --prompt TEXT`: continue a text with a trained model, at any depth."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from open_mythos.data.tokenizer import Tokenizer
    from open_mythos.infer.generate import Emitted
    from open_mythos.model import LoopedLM

BEFORE = 8  # tokens of the prompt that are read with those that follow
UNFINISHED = "\ufffd"  # what an incomplete character decodes to


@dataclass(frozen=True)
class Options:
    """Continue a text: `mythos generate runs/demo --prompt "def add(" --loops 8`.

    A rule is a name, as in `--exit StateChange`, or one with fields: `--exit StateChange:threshold=0.1`.
    """

    run: tyro.conf.Positional[Path]
    """The folder of a run, or of weights of a known family."""

    prompt: str | None = None
    """The text to continue. Default: what comes on standard input."""

    tokens: int = 200
    """How many tokens to add at most."""

    loops: int | None = None
    """Steps of the loop per token. Default: the mean of training."""

    exit: str | None = None
    """Leave the loop earlier: Steps, StateChange, ReadoutChange, Confidence, ..."""

    cache: str | None = None
    """How much of the depth to remember: PerLoop, LastExited, Shared, Ring:slots=4, ..."""

    warm: bool = False
    """Start each new token's thinking where that of the token before it ended."""

    temperature: float = 0.7
    """0 always takes the likeliest token."""

    top_k: int | None = None
    """Choose among so many tokens."""

    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""

    min_p: float = 0.0
    """Choose among tokens at least so many times as likely as the likeliest."""

    repetition_penalty: float = 1.0
    """Above 1, make tokens that were there less likely."""

    seed: int = 0
    """The same seed gives the same text."""

    samples: int = 1
    """How many continuations."""

    stop: tuple[str, ...] = ()
    """Texts that end the continuation where the first of them is complete."""

    step: int | None = None
    """The checkpoint of this training step. Default: the newest."""

    device: str | None = None
    """cpu, cuda, cuda:1. Default: the best there is."""

    compile: bool = False
    """For long texts: half a minute of compiling first, then each token in 60 to 85 % of the time."""

    depths: bool = False
    """Say at the end how many steps the tokens took."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="mythos generate", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    from open_mythos.cli.named import device_named, trained

    device = device_named(options.device)
    model, tokenizer = trained(options.run, options.step)
    text = sys.stdin.read() if options.prompt is None else options.prompt
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("the prompt is not valid UTF-8; give --prompt text in the terminal's encoding")
    prompt = tokenizer.encode(text)
    if not prompt:
        raise ValueError("the prompt is empty; give --prompt some text to continue, or standard input")
    made = _stream(options, model.to(device), tokenizer, prompt)
    if options.compile:
        print("compiling takes up to half a minute, and less the next time", file=sys.stderr)
    rows = [_Continuation(tokenizer, prompt, options.stop) for _ in range(options.samples)]
    if options.samples == 1:
        _print_as_it_comes(made, text, rows[0])
    else:
        _print_all(made, text, rows)
    if options.depths:
        _say_depths([depth for row in rows for depth in row.depths])
    return 0


def _stream(options: Options, model: LoopedLM, tokenizer: Tokenizer, prompt: list[int]) -> Iterator[Emitted]:
    from open_mythos.cli.named import choice
    from open_mythos.infer.generate import stream
    from open_mythos.infer.sample import Sampling
    from open_mythos.loop.exit import Exit
    from open_mythos.nn.cache import Policy

    for name in ("samples", "tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} should be at least 1, got {getattr(options, name)}")
    if "" in options.stop:
        raise ValueError("--stop should be some text, got none")
    chosen: dict[str, Any] = {
        "exit": None if options.exit is None else choice(Exit, options.exit),
        "policy": None if options.cache is None else choice(Policy, options.cache),
    }
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    return stream(
        model,
        [prompt] * options.samples,
        max_new_tokens=options.tokens,
        loops=options.loops,
        warm=options.warm,
        compile=options.compile,
        sampling=sampling,
        eos=tokenizer.eos,
        **chosen,
    )


class _Continuation:
    """The text of one row so far, up to the end of the first text that is to end it.

    Tokens do not tell: "brown" is another token inside of " brown". What a token says may depend on the one
    before it, so the last of the prompt's are read with them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: tuple[str, ...]) -> None:
        self.tokenizer, self.before, self.stop = tokenizer, [*prompt[-BEFORE:]], stop
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.text, self.ended = "", False

    def add(self, emitted: Emitted) -> None:
        if self.ended:
            return
        self.tokens.append(emitted.token)
        self.depths.append(emitted.steps)
        known = len(self.tokenizer.decode(self.before))
        self.text = self.tokenizer.decode([*self.before, *self.tokens])[known:]
        found = [self.text.find(stop) + len(stop) for stop in self.stop if stop in self.text]
        self.text = self.text[: min(found, default=None)]
        self.ended = bool(found) or emitted.finish is not None


def _print_as_it_comes(made: Iterator[Emitted], text: str, row: _Continuation) -> None:
    """Text as its characters are complete."""
    print(text, end="", flush=True)
    shown = ""
    for emitted in made:
        row.add(emitted)
        if row.text.startswith(shown) and (row.ended or not row.text.endswith(UNFINISHED)):
            print(row.text[len(shown) :], end="", flush=True)
            shown = row.text
        if row.ended:
            break
    print()


def _print_all(made: Iterator[Emitted], text: str, rows: list[_Continuation]) -> None:
    for emitted in made:
        rows[emitted.row].add(emitted)
        if all(row.ended for row in rows):
            break
    for number, row in enumerate(rows, 1):
        print(f"--- {number}\n{text}{row.text}")


def _say_depths(depths: list[int]) -> None:
    counts = {depth: depths.count(depth) for depth in sorted(set(depths))}
    spread = ", ".join(f"{count} took {depth}" for depth, count in counts.items())
    mean = sum(depths) / len(depths)
    print(f"{mean:.2f} steps per token over {len(depths)} tokens: {spread}", file=sys.stderr)
