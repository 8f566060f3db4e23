"""The toy zoo holds every variant, so that the laws are about all of them."""

from typing import get_args

import pytest

from open_mythos.loop import adapt, halt, inject, mark, route, schedule, start, update
from open_mythos.model import Model
from open_mythos.nn import attention, block, ffn, init, linear, norm
from tests.zoo import EVERY, parts

UNIONS = [
    start.Start,
    mark.Mark,
    inject.Injection,
    adapt.Adaptation,
    update.Update,
    halt.Halting,
    route.Routing,
    schedule.Schedule,
    attention.Mixer,
    block.Block,
    ffn.FFN,
    init.Init,
    linear.Linear,
    norm.Norm,
    Model.__annotations__["leave"],
]


@pytest.mark.parametrize("union", UNIONS)
def test_every_member_occurs(union: object) -> None:
    present = {type(part) for config in EVERY.values() for part in parts(config)} | {type(None)}
    assert set(get_args(union)) <= present
