"""What a call leaves alone: the world's random numbers, the inputs, and the numbers under recomputation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from open_mythos.loop.core import LoopCore
from open_mythos.loop.route import Everyone, ExpertChoice
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.nn.moe import MoE
from open_mythos.nn.tally import Tally, Where
from tests.zoo import EVERY, LOOPED, awake, close, gradients, parts, words

MIXTURES = [
    name
    for name, config in LOOPED.items()
    if isinstance(config.loop.route, Everyone) and any(isinstance(part, MoE) for part in parts(config.loop))
]


def same_luck(call: Callable[[], object]) -> bool:
    """Whether `call` leaves the global generators where they were. (Python's own is the type checker's.)"""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    call()
    return torch.equal(before[0], torch.get_rng_state()) and bool(
        (before[1] == np.random.get_state()[1]).all()
    )


@pytest.mark.parametrize("name", EVERY)
def test_the_model_draws_nothing(name: str) -> None:
    model, tokens = awake(EVERY[name]), words()
    rng = torch.Generator().manual_seed(0)
    assert same_luck(lambda: model(tokens, rng=rng))
    assert same_luck(lambda: model.train()(tokens, Plan((2, 3), 1)).sum().backward())
    if not isinstance(model.loop, LoopCore) or not isinstance(model.loop.config.route, ExpertChoice):
        close(model.train()(tokens), model.eval()(tokens))  # (that one ranks the sequence in training only)


@pytest.mark.parametrize("name", ["parcae", "huginn"])
def test_noise_comes_from_the_generator_handed_in(name: str) -> None:
    model, tokens = awake(EVERY[name]), words()
    one, again, other = (model(tokens, rng=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    assert not torch.allclose(one, model(tokens))


@pytest.mark.parametrize("name", EVERY)
def test_inputs_stay_as_they_were(name: str) -> None:
    model, tokens = awake(EVERY[name]), words()
    before, held = tokens.clone(), {key: t.clone() for key, t in model.state_dict().items()}
    with torch.no_grad():
        model(tokens)
    assert torch.equal(tokens, before)
    assert all(torch.equal(t, held[key]) for key, t in model.state_dict().items())


class Reads(TorchFunctionMode):
    """How often values are read on the host, for each of which a GPU would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func in (Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__bool__, Tensor.nonzero)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_between_steps_the_loop_asks_once_who_is_still_in_it() -> None:
    model, tokens = awake(EVERY["universal"]), words(3, 5)
    ctx = Context.counting(tokens)
    state = model.encode(tokens, ctx)
    with Reads() as reads:
        state = model.loop(state, ctx, Plan(4))
    assert reads.count == int(state.taken.max()) - 1 > 1  # after the last step nobody is


class Lesson(NamedTuple):
    loss: Tensor  # with all costs
    costs: dict[str, Tensor]  # as tallied before the backward pass
    loads: dict[Where, Tensor]
    grads: dict[str, Tensor]


def learn(model: LoopedLM, tokens: Tensor, plan: Plan) -> Lesson:
    tally = Tally()
    loss = model(tokens, plan, tally=tally).log_softmax(-1)[..., 0].mean() + sum(tally.costs.values())
    costs, loads = dict(tally.costs), tally.total_loads()
    loss.backward()
    return Lesson(loss, costs, loads, gradients(model))


@pytest.mark.parametrize("name", LOOPED)
def test_recomputation_changes_no_number(name: str) -> None:
    plan = Plan((4, 2), (2, 2))
    config = EVERY[name].override("loop.layers.*.ffn.balance=0.1") if "mythos" in name else EVERY[name]
    model, frugal, tokens = awake(config), awake(config), words()
    frugal.loop.remat = True
    plain, again = learn(model, tokens, plan), learn(frugal, tokens, plan)
    assert torch.equal(plain.loss, again.loss)
    close(again.costs, plain.costs, 0)
    close(again.loads, plain.loads, 0)
    close(again.grads, plain.grads, 1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_loads_count_every_choice_once(name: str) -> None:
    model, tokens, tally = awake(EVERY[name]), words(3, 5), Tally()
    model(tokens, Plan((1, 2, 4)), tally=tally)
    (where, loads), *others = tally.loads.items()
    moe = next(part for part in parts(EVERY[name].loop) if isinstance(part, MoE))
    assert where == ("loop", 0)
    assert not others
    # Rows in the loop at each of four turns: 3, 2, 1, 1.
    assert [int(load.sum()) for load in loads] == [rows * 5 * moe.chosen for rows in (3, 2, 1, 1)]
    assert torch.equal(tally.total_loads()[where], torch.stack(loads).sum(0))
