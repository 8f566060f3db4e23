"""`mythos show MODEL`: a picture of the loop, and what it costs: parameters, FLOPs, cache bytes."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from open_mythos.analysis.compute import Parameters
    from open_mythos.config import Config
    from open_mythos.model import Model
    from open_mythos.nn.block import Block
    from open_mythos.nn.cache import Policy

SEAMS = ("start", "route", "mark", "inject", "layers", "adapt", "update", "halt", "schedule")
MOST = 1_000_000  # loops


@dataclass(frozen=True)
class Options:
    """Draw a model and count what it costs: `mythos show mythos_1b loop.schedule.steps=8`.

    Without a name, list the names.
    """

    model: tyro.conf.Positional[str] = ""
    """mythos_1b ... mythos_1t, a published model, a recipe, a JSON file, or the folder of a run."""

    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Dotted assignments to the model's config; values are JSON."""

    loops: int | None = None
    """Count for so many loops. Default: the mean of training."""

    context: int = 1024
    """Tokens that attention looks back on, where FLOPs are counted for one context."""

    table: bool = False
    """Print the table of all OpenMythos variants, as in the README."""

    json: bool = False
    """Print the model's config as JSON and nothing else."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="mythos show", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    from rich.console import Console

    from open_mythos.cli.named import model_named, names

    if options.table:
        print(_variants())
        return 0
    console = Console(highlight=False)
    if not options.model:
        for title, group in names().items():
            console.print(f"[bold]{title}[/]\n  {' '.join(group)}")
        return 0
    model = model_named(options.model).override(*options.overrides)
    if options.json:
        import json

        print(json.dumps(model.to_dict(), indent=2))
        return 0
    _show(options, model, console)
    return 0


def _variants() -> str:
    from open_mythos import variants
    from open_mythos.analysis.table import markdown

    return markdown(
        (f"mythos_{size}", getattr(variants, f"mythos_{size}")().model()) for size in variants.ROWS
    )


def _show(options: Options, model: Model, console: Console) -> None:
    from open_mythos.analysis.compute import parameters

    if options.loops is not None and options.loops < 1:
        raise ValueError(f"a loop takes at least one step, got loops={options.loops}")
    if options.loops is not None and options.loops > MOST:
        raise ValueError(f"a cache is counted for up to {MOST:,} steps, got loops={options.loops}")
    if options.context < 0:
        raise ValueError(f"a context has no fewer than 0 tokens, got context={options.context}")
    loops = options.loops or model.loop.schedule.mean_steps if model.loop is not None else 0
    counted = parameters(model, loops)
    console.print(f"[bold]{options.model}[/]  {_headline(counted, loops)}\n")
    for line in picture(model, loops):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    for table in (_parameters(counted), _flops(model, loops, options.context), _caches(model, loops)):
        console.print(table)


def picture(model: Model, loops: int) -> list[str]:
    """The model from tokens to logits, one line per stage, seam and part of a layer."""
    lines = [f"tokens -> embed {model.vocab:,} x {model.dim:,}"]
    lines += [*_seam("  ngrams    ", model.ngrams), *_stage("  prelude   ", model.prelude)]
    lines += _seam("  enter     ", model.enter)
    if model.loop is not None:
        lines.append(f"  ╭─ loop, {loops} times " + "─" * 40)
        for name in SEAMS:
            value, label = getattr(model.loop, name), f"  │ {name:<9} "
            lines += _stage(label, value) if name == "layers" else _seam(label, value)
        lines.append("  ╰" + "─" * 57)
    lines += [*_seam("  leave     ", model.leave), *_stage("  coda      ", model.coda)]
    lines += _seam("  norm      ", model.norm)
    return [
        *lines,
        f"-> head {'tied to embed' if model.tied else f'{model.dim:,} x {model.vocab:,}'} -> logits",
    ]


def _seam(label: str, config: Config | None) -> list[str]:
    return [] if config is None else [label + spell(config)]


def _stage(label: str, blocks: tuple[Block, ...]) -> list[str]:
    """Equal blocks in a row as one, what it is made of below."""
    lines = []
    margin = "  │           " if "│" in label else " " * 12
    for block, group in groupby(blocks):
        bare = [f.name for f in fields(block) if f.name not in ("mixer", "ffn") and _differs(block, f)]
        chosen = ", ".join(f"{name}={_value(getattr(block, name))}" for name in bare)
        lines.append(f"{label}{len(list(group))} x {type(block).__name__}{f'({chosen})' if chosen else ''}")
        lines += [f"{margin}  {spell(block.mixer)}", f"{margin}  {spell(block.ffn)}"]
        label = margin
    return lines


def spell(config: Config) -> str:
    """A config in a line: its name, and what was chosen other than by default."""
    chosen = [f"{f.name}={_value(getattr(config, f.name))}" for f in fields(config) if _differs(config, f)]  # type: ignore[arg-type]
    return type(config).__name__ + (f"({', '.join(chosen)})" if chosen else "")


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    return (
        spell(value)
        if hasattr(value, "to_dict")
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _differs(config: Config, field: Any) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return bool(getattr(config, field.name) != default)


def _headline(counted: Parameters, loops: int) -> str:
    depth = f", {loops} loops" if loops else ", no loop"
    return f"{_short(counted.total)} parameters, {_short(counted.active)} active per token{depth}"


def _parameters(counted: Parameters) -> Table:
    table = _table("parameters", "count", "share")
    rows = counted.by_part | {"total": counted.total}
    for name, count in rows.items():
        table.add_row(
            name, f"{count:,}", f"{count / counted.total:.1%}", style="bold" if name == "total" else ""
        )
    table.add_section()
    for name, count in {
        "tables": counted.tables,
        "in matrices": counted.matrices,
        "in routed experts": counted.experts,
        "in the loop": counted.looped,
        "active per token": counted.active,
        "active, counted once per loop": counted.unrolled,
    }.items():
        table.add_row(name, f"{count:,}", f"{count / counted.total:.1%}")
    return table


def _flops(model: Model, loops: int, context: int) -> Table:
    from open_mythos.analysis.compute import flops

    counted = flops(model)
    table = _table("FLOPs per token", "in matrices", f"attention at {context:,} tokens")
    table.add_row("prelude, coda, head", _short(counted.once), _short(counted.once_attention * context))
    if model.loop is not None:
        turn = counted.per_loop, counted.per_loop_attention * context
        table.add_row("one loop", *map(_short, turn))
        turns = model.loop.route.turns(loops)
        table.add_row(
            f"all, {loops} loops" + ("" if turns == loops else f", {turns:g} for a token on average"),
            _short(counted.token(turns)),
            _short((counted.once_attention + turns * counted.per_loop_attention) * context),
            style="bold",
        )
    return table


def _caches(model: Model, loops: int) -> Table:
    from open_mythos.analysis.compute import cache_bytes
    from open_mythos.nn.cache import Anchor, LastExited, PerLoop, Ring, Shared

    table = _table("cache", "bytes per token", "at 4k tokens")
    policies: list[Policy] = (
        [PerLoop(), LastExited(), Anchor(), Ring(slots=4), Shared()] if loops else [PerLoop()]
    )
    for policy in policies:
        held = cache_bytes(model, policy, loops or None)
        table.add_row(spell(policy), f"{held:,}", f"{held * 4096 / 2**20:,.0f} MiB")
    table.caption = "in 2-byte numbers"
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(show_edge=False, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"
