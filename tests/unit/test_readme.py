"""What the README says of the variants is what the models say; its code runs, and all commands are valid."""

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro

from open_mythos import variants
from open_mythos.analysis.table import markdown
from open_mythos.cli import main, train
from open_mythos.cli.named import model_named
from open_mythos.train.recipes import tiny

README_FOLDER = Path(__file__).parents[2]
README = (README_FOLDER / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((README_FOLDER / "docs").glob("*.md")))]
# A line of its own, or within a sentence one with an option or an override.
COMMAND = re.compile(
    r"^    (?:mythos|torchrun .*-m open_mythos\.cli\.main) (.+)$|`mythos (\w+ [^`]*(?: --|=)[^`]*)`",
    re.MULTILINE,
)
COMMANDS = [
    alone or within
    for page in PAGES
    for alone, within in COMMAND.findall(page)
    if "..." not in alone + within
]
RUNS = ("RUN", "runs/demo", "runs/mine")
TEXTS = ("my/texts", "essays", "notes.jsonl")


@pytest.mark.parametrize("name", ["mythos_1b", "mythos_7b", "mythos_100b"])
def test_the_table_is_counted(name: str) -> None:
    *_, row = markdown([(name, getattr(variants, name)().model())]).splitlines()
    assert row in README.splitlines()


def test_the_table_has_every_variant() -> None:
    named = re.findall(r"^\| (mythos_\w+) \|", README, re.MULTILINE)
    assert named == [f"mythos_{size}" for size in variants.ROWS]


def test_the_usage_runs_word_for_word() -> None:
    code = re.search(r"```python\n(import torch\n.*?)```", README, re.DOTALL)
    assert code is not None
    seen: dict[str, object] = {}
    exec(code[1], seen)
    assert tuple(seen["out"].shape) == (2, 24)  # type: ignore[attr-defined]
    assert float(seen["A"].detach().max()) < 1  # type: ignore[attr-defined]


class Parsed(Exception):
    """Ends a verb when its options are read."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.options = options


def options_of(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def up_to(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parsed(*args: Any, **options: Any) -> None:
            raise Parsed(parse(*args, **options))

        return parsed

    parsers = (
        (tyro, "cli"),
        (tyro.extras, "subcommand_cli_from_dict"),
        (argparse.ArgumentParser, "parse_args"),
    )
    with monkeypatch.context() as patch:
        for owner, name in parsers:
            patch.setattr(owner, name, up_to(getattr(owner, name)))
        with pytest.raises(Parsed) as caught:
            main.main(argv)
    return caught.value.options


@pytest.fixture
def placeholders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs and texts that the commands speak of."""
    for run in RUNS:
        (tmp_path / run).mkdir(parents=True)
        tiny().save(tmp_path / run / "config.json")
    for text in TEXTS:
        (tmp_path / text).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("placeholders")
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(shlex.split(command, comments=True), monkeypatch)
    if isinstance(options, train.Options):
        train._plan(options)
    elif model := getattr(options, "model", ""):
        model_named(model).override(*getattr(options, "overrides", ()))


def test_there_are_commands_to_try() -> None:
    assert len(COMMANDS) >= 15
    assert {command.split()[0] for command in COMMANDS} >= {
        "train",
        "generate",
        "sweep",
        "show",
        "match",
        "plan",
    }


def test_an_override_in_the_wrong_place_is_noticed(
    placeholders: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(["train", "tiny", "--data", "my/texts", "steps=3"], monkeypatch)
    with pytest.raises(ValueError, match="right after the recipe's name"):
        train._plan(options)


def test_the_reading_order_is_a_thousand_lines() -> None:
    order = README.split("## Read it")[1].split("From there")[0]
    files = [README_FOLDER / name for name in re.findall(r"`(open_mythos/\S+\.py)`", order)]
    assert 800 <= sum(len(file.read_text().splitlines()) for file in files) <= 1200
