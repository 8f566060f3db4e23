"""mythos match CONFIG --on params,flops,memory: the model to compare with, equal in what is named within 2 %.

CONFIG is the name of a model or recipe, a folder, or a JSON file. A looped model is answered with a fixed-
depth one, and a fixed-depth one with a looped one of `--loops` steps. Where no model is equal in all that
is named, as a loop does more with a parameter than any layer without one, there is a model for each.
`--out` writes the answer as a config that every other verb reads.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from open_mythos.analysis.match import Match


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mythos match", description=__doc__)
    parser.add_argument("config", help="a model or recipe by name, a folder with config.json, or a JSON file")
    parser.add_argument("--on", default="params", help="any of params, flops, training, memory, with commas")
    parser.add_argument(
        "--loops", type=int, default=4, help="steps of the loop, when it is the answer that loops"
    )
    parser.add_argument("--out", type=Path, help="write the answer there, as JSON")
    given = parser.parse_args(argv)
    from open_mythos.analysis.match import NoMatchError, match
    from open_mythos.cli.named import model_named

    model, on = model_named(given.config), tuple(given.on.split(","))
    try:
        found = {given.on: match(model, on, loops=given.loops)}
    except NoMatchError as error:
        if len(on) == 1:
            raise
        print(f"{error}. One for each:")
        found = {what: match(model, (what,), loops=given.loops) for what in on}
    for what, one in found.items():
        _show(given.config, what, one)
        if given.out is not None:
            to = given.out if len(found) == 1 else given.out.with_stem(f"{given.out.stem}-{what}")
            one.model.save(to)
            print(f"written to {to}")
    return 0


def _show(name: str, what: str, found: "Match") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", name, f"equal in {what}", "off")
    rows = {
        "parameters": (found.wanted.params, found.cost.params),
        "FLOPs per token": (found.wanted.flops, found.cost.flops),
        "training FLOPs per token": (found.wanted.training, found.cost.training),
        "cache bytes per token": (found.wanted.memory, found.cost.memory),
    }
    for title, (wanted, got) in rows.items():
        table.add_row(title, f"{wanted:,.0f}", f"{got:,.0f}", f"{got / wanted - 1:+.1%}")
    Console().print(table)
    kind = "fixed depth" if found.model.loop is None else f"{_steps(found)} steps"
    experts = "" if found.experts is None else f", {found.experts} experts"
    print(f"{kind}: {found.layers} layers, feed-forward width {found.width}{experts}")


def _steps(found: "Match") -> int:
    assert found.model.loop is not None
    return found.model.loop.schedule.mean_steps
