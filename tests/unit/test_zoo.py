"""The toy zoo holds every variant, so that the laws are about all of them."""

from typing import Any, get_args, get_type_hints

import pytest

from open_mythos.config import Config
from open_mythos.loop.core import Loop
from open_mythos.model import Model
from open_mythos.nn import attention, block, ffn, linear, norm
from tests.zoo import EVERY, every, parts

UNIONS: dict[str, Any] = {
    "block": block.Block,
    "mixer": attention.Mixer,
    "ffn": ffn.FFN,
    "linear": linear.Linear,
    "norm": norm.Norm,
    "leave": get_type_hints(Model)["leave"],
    "init": get_type_hints(Model)["init"],
} | {name: union for name, union in get_type_hints(Loop).items() if name != "layers"}


@pytest.mark.parametrize("name", UNIONS)
def test_every_member_occurs(name: str) -> None:
    present = {type(part) for config in EVERY.values() for part in parts(config)} | {type(None)}
    assert set(get_args(UNIONS[name])) <= present


def test_a_variant_that_needs_a_number_is_told_where_to_give_it() -> None:
    class Needy(Config):
        size: int

    with pytest.raises(TypeError, match=r"NEEDS of tests/zoo\.py"):
        every(Needy | None)
