"""What the README says of the variants is what the models say of themselves, and its code runs."""

import re
from pathlib import Path

import pytest

from open_mythos import variants
from open_mythos.analysis.table import markdown

README_FOLDER = Path(__file__).parents[2]
README = (README_FOLDER / "README.md").read_text()


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


def test_the_reading_order_is_a_thousand_lines() -> None:
    order = README.split("## Read it")[1].split("From there")[0]
    files = [README_FOLDER / name for name in re.findall(r"`(open_mythos/\S+\.py)`", order)]
    assert 800 <= sum(len(file.read_text().splitlines()) for file in files) <= 1200
