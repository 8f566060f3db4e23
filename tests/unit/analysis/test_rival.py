"""The original as a rival: as many parameters, its own way of learning."""

import numpy as np
import pytest
import torch

from open_mythos.analysis.rival import recipe_like, settings_like
from open_mythos.data.rows import RowLoader, Tokens
from open_mythos.loop.halt import ACT
from open_mythos.main import OpenMythos
from open_mythos.presets.baseline import Shape, llama
from open_mythos.train.recipe import Recipe
from open_mythos.train.recipes import small_mythos
from open_mythos.train.step import TrainState, train_step

OURS = small_mythos(dim=64, heads=2, vocab=512, mean=3)
RECIPE = Recipe(model=OURS, length=16, batch=4, steps=1000)


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_it_has_as_many_parameters(dim: int) -> None:
    ours = small_mythos(dim=dim, heads=dim // 32, vocab=512)
    with torch.device("meta"):
        theirs = OpenMythos(settings_like(ours, context=16))
        assert size(theirs) == pytest.approx(size(ours.build()), rel=0.02)


def test_it_learns_as_its_script_says() -> None:
    recipe = recipe_like(RECIPE)
    assert recipe.model.loop is not None
    assert recipe.model.loop.halt == ACT(threshold=0.99, as_released=True)
    assert recipe.lr.warmup == 35  # 2,000 of 57,220 updates, of 1,000
    tokens = Tokens([np.random.default_rng(0).integers(512, size=1000)], eos=0)
    state = TrainState.begin(recipe, RowLoader(tokens, length=16, batch=4), torch.device("cpu"))
    groups = state.optimizer.param_groups
    assert {(g["full_lr"], g["weight_decay"], g["betas"]) for g in groups} == {(3e-4, 0.1, (0.9, 0.95))}
    assert train_step(state, recipe, [next(state.loader)])["loops"] == 3
    assert not any(name.endswith("ffn.bias") and buffer.any() for name, buffer in state.model.named_buffers())


def test_its_loops_may_be_drawn_for_each_batch() -> None:
    loop = recipe_like(RECIPE, random=True).model.loop
    assert loop is not None
    drawn = {loop.schedule.draw(torch.Generator().manual_seed(i), 4).steps for i in range(40)}
    assert drawn == {1, 2, 3, 4, 5}
    assert loop.schedule.mean_steps == 3
    assert loop.adapt.steps == 5


def test_what_it_cannot_equal_is_said() -> None:
    with pytest.raises(ValueError, match="loops over MLA and a mixture of experts"):
        settings_like(llama(Shape(vocab=64, dim=32, layers=1, heads=2, kv_heads=2, width=32)), 16)
    with pytest.raises(ValueError, match="give the recipe a number"):
        recipe_like(RECIPE.replace(steps=None, seconds=1.0))
