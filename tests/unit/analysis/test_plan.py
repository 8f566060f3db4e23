"""A plan's numbers come from the model: checked against models and optimizers that are really built."""

import pytest
import torch

from open_mythos.analysis.plan import (
    GPUS,
    Mesh,
    Work,
    activation_bytes,
    forecast,
    memory,
    mesh_that_fits,
    optimizer_numbers,
    training_flops,
)
from open_mythos.loop.schedule import Fixed
from open_mythos.model import Model
from open_mythos.presets import preset
from open_mythos.train.optim import AdamW, MuonAdamW
from tests.tiny import MODELS

H100 = GPUS["h100"]
MYTHOS = MODELS["mythos-mla"]


def deep(model: Model, steps: int, grad: int | None = None) -> Model:
    assert model.loop is not None
    return model.replace(loop=model.loop.replace(schedule=Fixed(steps=steps, grad=grad)))


@pytest.mark.parametrize("optimiser", [AdamW(), MuonAdamW()])
@pytest.mark.parametrize("name", ["mythos-mla", "huginn", "fixed-depth"])
def test_the_optimizer_remembers_as_much_as_is_planned(name: str, optimiser: AdamW | MuonAdamW) -> None:
    model = MODELS[name].build()
    built = optimiser.build(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    held = built.state_dict()["state"].values()
    numbers = sum(value.numel() for entries in held for value in entries.values() if value.ndim)
    assert optimizer_numbers(MODELS[name], optimiser) == numbers


def test_activations_grow_with_the_turns_that_carry_gradient_and_hardly_when_recomputed() -> None:
    at = [activation_bytes(deep(MYTHOS, steps), remat=False) for steps in (2, 4, 8)]
    assert (at[2] - at[1]) == pytest.approx(2 * (at[1] - at[0]))
    again = [activation_bytes(deep(MYTHOS, steps), remat=True) for steps in (2, 4, 8)]
    assert again[1] - again[0] == pytest.approx(2 * 2 * 2 * MYTHOS.dim)
    assert again[2] < at[2] / 3
    assert activation_bytes(deep(MYTHOS, 8, grad=2), remat=False) == pytest.approx(at[0])


def test_recomputing_costs_a_pass_through_the_loop_and_frozen_turns_cost_a_third() -> None:
    kept, again = (training_flops(deep(MYTHOS, 4), Work(length=16, remat=remat)) for remat in (False, True))
    more = training_flops(deep(MYTHOS, 5), Work(length=16, remat=False)) - kept  # one turn, three passes
    assert again - kept == pytest.approx(4 * more / 3)
    frozen = training_flops(deep(MYTHOS, 5, grad=4), Work(length=16, remat=False))
    assert frozen - kept == pytest.approx(more / 3)


def test_what_is_kept_is_cut_over_all_gpus_and_what_is_gathered_is_not() -> None:
    one, two, eight = (memory(MYTHOS, Mesh(n), Work(length=16)) for n in (1, 2, 8))
    assert one.gathered == 0
    assert two.weights == one.weights / 2 == 4 * eight.weights
    assert two.optimizer == 4 * eight.optimizer
    assert two.gathered == eight.gathered > 0
    apart = memory(MYTHOS, Mesh(4, 2), Work(length=16))
    assert apart.gathered < eight.gathered
    assert apart.weights == eight.weights
    with pytest.raises(ValueError, match="cannot be shared out evenly by expert_parallel=3"):
        memory(MYTHOS, Mesh(1, 3), Work(length=16))
    dense = MODELS["fixed-depth"]
    with pytest.raises(ValueError, match="this model has none"):
        memory(dense, Mesh(4, 2), Work(length=16))


def test_time_and_money_follow_from_speed() -> None:
    plan = forecast(MYTHOS, Mesh(4), Work(length=16), H100, tokens=1e9, utilisation=0.5)
    assert plan.tokens_per_second == pytest.approx(0.5 * 989e12 * 4 / plan.flops_per_token)
    assert plan.days * 86400 * plan.tokens_per_second == pytest.approx(1e9)
    assert plan.cost == pytest.approx(plan.days * 24 * 4 * H100.hourly)
    assert plan.fits


def test_large_variants_are_planned_without_being_built() -> None:
    """At 50B the routed experts are what does not fit; at 1T the shared ones do not either."""
    work, mesh = Work(length=512), Mesh(1024)
    plan = forecast(preset("mythos_50b"), mesh, work, H100, tokens=30e9, utilisation=0.4)
    assert not plan.fits
    assert plan.memory.gathered > 3e11
    there = mesh_that_fits(preset("mythos_50b"), mesh, work, H100)
    assert there is not None
    assert there.expert > 1
    assert there.gpus == 1024
    assert memory(preset("mythos_50b"), there, work).total < H100.memory
    assert mesh_that_fits(preset("mythos_1t"), mesh, work, H100) is None


@pytest.mark.parametrize("text", ["", "8x", "0", "2x2x2", "-4", "many"])
def test_a_mesh_is_one_or_two_numbers(text: str) -> None:
    assert Mesh.spoken("8X64") == Mesh(8, 64)
    with pytest.raises(ValueError, match="a mesh is a number of GPUs"):
        Mesh.spoken(text)


@pytest.mark.parametrize(("tokens", "utilisation"), [(0, 0.4), (1e9, 0), (1e9, 1.5)])
def test_impossible_wishes_are_refused(tokens: float, utilisation: float) -> None:
    with pytest.raises(ValueError, match=r"tokens|peak"):
        forecast(MYTHOS, Mesh(1), Work(length=16), H100, tokens, utilisation)
