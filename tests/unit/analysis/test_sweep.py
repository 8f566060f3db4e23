"""Every number of a sweep is that of a run of its own; the report reads what is written."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from open_mythos.analysis.record import Record
from open_mythos.analysis.sweep import sweep, write_sweep
from open_mythos.data.rows import Tokens
from open_mythos.loop.schedule import Plan
from open_mythos.nn.tally import Tally
from open_mythos.train.evaluate import held_out_bits
from tests.lively import lively
from tests.tiny import MODELS

LOOPED = [name for name, config in MODELS.items() if config.loop is not None]
TEXT = Tokens([np.random.default_rng(0).integers(0, 61, 200).astype(np.uint16)], eos=0, text_bytes=531)
OPTIONS = {"rows": 12, "batch": 5, "precision": "float32"}


@pytest.mark.parametrize("name", LOOPED)
def test_every_depth_is_as_in_a_run_of_its_own(name):
    model = lively(MODELS[name])
    found = sweep(model, TEXT, 9, loops=[1, 2, 5], **OPTIONS)
    assert found.loops == [1, 2, 5]
    alone = [
        held_out_bits(model, TEXT, 9, rows=15, batch=5, plan=Plan(n), precision="float32") for n in (1, 2, 5)
    ]
    np.testing.assert_allclose(found.bits_per_byte, alone, rtol=1e-5)
    np.testing.assert_allclose(np.array(found.nats_per_token) / np.log(2) * 200 / 531, alone, rtol=1e-5)


def test_motion_is_that_of_the_states():
    model = lively(MODELS["huginn"])
    states = [torch.zeros(3, 9, 32)]  # its start without a generator
    batch = torch.from_numpy(TEXT.rows(range(3), 9).astype(np.int64))[:, :-1]
    with torch.no_grad():
        model(batch, 4, watch=lambda n, state: states.append(state.h))
    found = sweep(model, TEXT, 9, loops=[4], rows=3, precision="float32")
    steps = [((b - a).norm(dim=-1) / b.norm(dim=-1)).mean() for a, b in pairwise(states)]
    np.testing.assert_allclose(found.relative_step, steps, rtol=1e-5)
    np.testing.assert_allclose(found.state_norm, [h.norm(dim=-1).mean() for h in states[1:]], rtol=1e-5)
    assert found.relative_step[0] == pytest.approx(1)


def test_the_load_of_the_experts_is_told_for_each_loop():
    model = lively(MODELS["mythos-mla"])
    found, tally = sweep(model, TEXT, 9, loops=[3], rows=3, precision="float32"), Tally()
    batch = torch.from_numpy(TEXT.rows(range(3), 9).astype(np.int64))[:, :-1]
    with torch.no_grad():
        model(batch, 3, tally=tally)
    loads = [(load / load.sum()).tolist() for load in tally.loads["loop", 0]]
    np.testing.assert_allclose(found.expert_load, loads, rtol=1e-6)
    assert sweep(lively(MODELS["ouro"]), TEXT, 9, rows=3).expert_load == []


def test_the_report_reads_what_is_written(tmp_path):
    model = lively(MODELS["mythos-gqa-act"]).train()
    found = sweep(model, TEXT, 9, **OPTIONS)
    assert model.training
    assert found.loops == list(range(1, 13))
    path = write_sweep(tmp_path, found)
    assert json.loads(path.read_text())["trained_loops"] == 3
    record = Record.read(tmp_path)
    assert list(record.depth_curve.values()) == found.bits_per_byte
    assert record.held_out == found.bits_per_byte[2]
    assert len(record.swept("relative_step")) == len(record.swept("state_norm")) == 12
    assert record.expert_load.shape == (12, 8)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("fixed-depth", {}, "no loop"),
        ("ouro", {"loops": [0, 1]}, "at least one step, got 0"),
        ("ouro", {"length": 2_000_000}, "do not fit the model's context"),
        ("ouro", {"length": 500}, "too short"),
    ],
)
def test_what_cannot_be_measured_is_said(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sweep(lively(MODELS[name]), TEXT, **({"length": 9} | options))
