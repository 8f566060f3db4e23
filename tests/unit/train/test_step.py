"""An update happens whole or not at all."""

from pathlib import Path

import pytest
import torch

from open_mythos.train.fit import Run
from open_mythos.train.step import _Sums, _update
from tests.system import toy


@pytest.mark.parametrize("loss", [torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_is_no_update_whatever_its_gradient(loss: float, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    state = Run(recipe, recipe.data.build(), tmp_path / "run", toy.CPU).begin()
    before = [p.detach().clone() for p in state.model.parameters()]

    def update(loss: float) -> bool:
        """Whether a finite gradient moved the weights."""
        for p in state.model.parameters():
            p.grad = torch.ones_like(p)
        _update(state, recipe, _Sums(loss=torch.tensor(loss)))
        return not all(map(torch.equal, before, state.model.parameters()))

    assert not update(loss)
    assert state.skipped == 1
    assert update(1.0)
    assert state.skipped == 0
