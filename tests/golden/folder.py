"""Where the golden sets lie: outputs of released code at toy size, and the weights that they came from."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from open_mythos.hub.family import Family
from open_mythos.hub.links import draw_off
from open_mythos.hub.load import from_pretrained
from open_mythos.model import LoopedLM

BESIDE = Path(__file__).parents[2].parent / "shared" / "reference" / "golden"
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


class Golden(NamedTuple):
    folder: Path
    lm: LoopedLM
    data: dict[str, Tensor]
    meta: dict[str, Any]
    config: dict[str, Any]


def golden(name: str) -> Golden:
    """Skips the test where the set is not there."""
    folder = Path(os.environ.get("OPEN_MYTHOS_GOLDEN", BESIDE)) / name
    if not folder.is_dir():
        pytest.skip(f"no golden set {name}; set OPEN_MYTHOS_GOLDEN to the folder that holds them")
    meta, config = (json.loads((folder / f"{part}.json").read_text()) for part in ("meta", "config"))
    return Golden(folder, from_pretrained(folder), load_file(folder / "data.safetensors"), meta, config)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach(), want, **TOLERANCE)


def gradients(lm: LoopedLM, family: Family) -> dict[str, Tensor]:
    """Of every parameter, under the name that the family has for it."""
    ours = {name: parameter.grad for name, parameter in lm.named_parameters() if parameter.grad is not None}
    found: dict[str, Tensor] = {}
    for x in family.links(lm.config):
        if all(name in ours for name in x.ours):
            found |= draw_off(x, ours)
    return found


def check_gradients(
    lm: LoopedLM, family: Family, data: dict[str, Tensor], norms: dict[str, float | None]
) -> None:
    """Every stored gradient to 1e-5, and the norm of every other one; unused parameters have none."""
    got = gradients(lm, family)
    stored = {name.removeprefix("train.grad."): data[name] for name in data if name.startswith("train.grad.")}
    for name, want in stored.items():
        close(got[name], want)
    for name, norm in norms.items():
        assert (norm is None) == (name not in got), name
        if norm is not None:
            assert float(got[name].norm()) == pytest.approx(norm, abs=1e-5), name


def check_start(lm: LoopedLM, family: Family, spread: dict[str, float], mean: dict[str, float]) -> None:
    """Means and spreads of freshly made weights are as theirs, up to four standard errors of a draw."""
    lm.reset_parameters()
    for x in family.links(lm.config):
        for name, tensor in draw_off(x, lm.state_dict()).items():
            error = 4 * spread[name] / tensor.numel() ** 0.5
            assert float(tensor.mean()) == pytest.approx(mean[name], abs=error + 1e-6), name
            assert float(tensor.std()) == pytest.approx(spread[name], abs=error + 1e-6), name
