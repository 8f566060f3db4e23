import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from open_mythos.train.muon import BatchedMuon, PolarExpress
from open_mythos.train.nested import flatten, unflatten
from open_mythos.train.optim import AdamW, Muon, MuonAdamW, Optimizer
from tests.unit.train.test_roles import Model

CONFIGS = [MuonAdamW(), MuonAdamW(muon=Muon(warmup=3, polynomial=PolarExpress())), AdamW()]


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    optimizer.step()
    optimizer.zero_grad()


def test_muon_gets_the_matrices_and_adamw_the_rest() -> None:
    model = Model(tied=True)
    muon, adamw = MuonAdamW().build(model).parts
    assert isinstance(muon, BatchedMuon)
    assert {id(p) for p in muon.blocks} == {
        id(p)
        for p in (model.ffn.gate_up.weight, model.ffn.down.weight, model.experts.gate_up, model.experts.down)
    }
    held = sum(len(group["params"]) for part in (muon, adamw) for group in part.param_groups)
    assert held == len(list(model.parameters()))


def test_decay_spares_tables_and_vectors() -> None:
    model = Model(tied=False)
    optimizer = AdamW(lr=1.0, weight_decay=0.5, table_scale=0.1).build(model)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert of[id(model.ffn.down.weight)]["weight_decay"] == 0.5
    assert of[id(model.head.weight)]["weight_decay"] == 0.5
    assert of[id(model.embed.weight)]["weight_decay"] == 0.0
    assert of[id(model.norm.weight)]["weight_decay"] == 0.0
    assert of[id(model.embed.weight)]["lr"] == 0.1
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("config", CONFIGS)
def test_stopping_and_resuming_changes_nothing(config: MuonAdamW | AdamW) -> None:
    straight = Model(tied=True)
    second = copy.deepcopy(straight)
    optimizer = config.build(straight)
    for seed in range(2):
        step(straight, optimizer, seed)
    paused = copy.deepcopy(straight.state_dict())
    tensors, meta = flatten(optimizer.state_dict())
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    for seed in range(2, 4):
        step(straight, optimizer, seed)

    second.load_state_dict(paused)
    resumed = config.build(second)
    resumed.load_state_dict(unflatten(saved, meta))
    for seed in range(2, 4):
        step(second, resumed, seed)
    assert resumed.steps == 4
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_takes_a_copy() -> None:
    model = Model(tied=True)
    optimizer = AdamW().build(model)
    step(model, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    step(model, optimizer, 1)
    assert_close(
        saved["state"]["norm.weight"]["exp_avg"], kept["state"]["norm.weight"]["exp_avg"], atol=0, rtol=0
    )


def test_a_schedule_scales_every_rate() -> None:
    optimizer = MuonAdamW(muon=Muon(lr=0.5), adamw=AdamW(lr=0.25)).build(Model(tied=True))
    optimizer.scale_lr(0.1)
    optimizer.scale_lr(0.5)  # of the configured rate, not of the last
    assert {group["lr"] for group in optimizer.param_groups} == {0.25, 0.125}


def test_zero_lr_moves_nothing() -> None:
    model = Model(tied=True)
    before = copy.deepcopy(model.state_dict())
    optimizer = MuonAdamW().build(model)
    optimizer.scale_lr(0.0)
    step(model, optimizer, 0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_foreign_state_is_refused() -> None:
    model = Model(tied=True)
    optimizer = AdamW().build(model)
    with pytest.raises(ValueError, match="'other'"):
        optimizer.load_state_dict({"steps": 1, "state": {"other": {"exp_avg": torch.zeros(2)}}})
    with pytest.raises(ValueError, match="shape"):
        optimizer.load_state_dict({"steps": 1, "state": {"norm.weight": {"exp_avg": torch.zeros(2)}}})


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to optimise"):
        AdamW().build(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_survive_json(config: MuonAdamW | AdamW) -> None:
    assert type(config).from_dict(config.to_dict()) == config


def test_bf16_parameters_train() -> None:
    model = Model(tied=True).bfloat16()
    target = torch.randn(16, 8, dtype=torch.bfloat16)
    optimizer = MuonAdamW(muon=Muon(lr=0.05)).build(model)
    losses = []
    for _ in range(20):
        loss = (model.ffn.down(model.ffn.gate_up(target)[:, :6]) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
