"""Laws are as sharp as the models they try: a mistake shows at a hundred times the tolerance they allow."""

import pytest
import torch
from torch import Tensor

from open_mythos.loop.halt import Last
from open_mythos.loop.route import Everyone
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from tests.lively import lively
from tests.tiny import MODELS, ROUTED

EVERY = MODELS | ROUTED
# Tokens that all take every step of a plan; others may be done before it ends.
STEADY = [
    name
    for name, config in EVERY.items()
    if config.loop and isinstance(config.loop.halt, Last) and isinstance(config.loop.route, Everyone)
]
PLACED = [name for name in EVERY if name != "kohli"]  # which has no signal of position at all
TOKENS = torch.arange(3 * 9).reshape(3, 9) * 7 % 61
SHOWS = 1e-2  # the laws allow 1e-4 at most


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(model: LoopedLM, tokens: Tensor = TOKENS, steps: int = 3, positions: Tensor | None = None) -> Tensor:
    ctx = Context.counting(tokens) if positions is None else Context.ragged(tokens, positions)
    return model(tokens, None if model.loop is None else Plan(steps), ctx=ctx)


def least(change: Tensor) -> float:
    """The largest change of any logit, for the token where it is smallest."""
    return float(change.abs().amax(-1).min())


@pytest.mark.parametrize("name", EVERY)
def test_a_wrong_token(name: str) -> None:
    model, wrong = lively(EVERY[name]), TOKENS.clone()
    wrong[:, 1] += 1
    assert least((run(model, wrong) - run(model))[:, 1:]) > SHOWS


@pytest.mark.parametrize("name", PLACED)
def test_a_wrong_position(name: str) -> None:
    model, counted = lively(EVERY[name]), torch.arange(9).expand(3, -1)
    wrong = torch.where(counted < 4, counted, counted + 1)
    assert least((run(model, positions=wrong) - run(model, positions=counted))[:, 4:]) > SHOWS


@pytest.mark.parametrize("name", STEADY)
def test_a_wrong_step(name: str) -> None:
    model = lively(EVERY[name])
    assert least(run(model, steps=4) - run(model)) > SHOWS
