"""A trained model out of a run's folder."""

from pathlib import Path

import torch

from open_mythos.data.tokenizer import Tokenizer, load_folder
from open_mythos.model import LoopedLM
from open_mythos.train import checkpoint
from open_mythos.train.recipe import Recipe


def load_recipe(folder: Path) -> Recipe:
    """The recipe of a run. Raises `ValueError` if the folder holds none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no config.json")
    return Recipe.load(folder / "config.json")


def load_run(folder: Path, step: int | None = None) -> tuple[LoopedLM, Tokenizer]:
    """The model of a run, in eval mode, at `step` or at its newest intact checkpoint, and its tokenizer.

    Raises `ValueError` if the folder is not a run's, or has no such checkpoint.
    """
    recipe = load_recipe(folder)
    steps = checkpoint.steps_in(folder / "checkpoints")
    if not steps or (step is not None and step not in steps):
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "it has none that is whole"
        raise ValueError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}; {have}")
    tensors, _ = checkpoint.load(steps[step if step is not None else max(steps)], only="model")
    with torch.device("meta"):
        model = recipe.model.build()
    weights = {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(
            f"the checkpoint of {folder} is not of the model in its config.json: {first}"
        ) from error
    if recipe.model.tied:
        model.head.weight = model.embed.weight
    return model.eval(), load_folder(folder / "tokenizer")
