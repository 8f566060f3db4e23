"""A trained model out of a run's folder, and `from_pretrained` for it and all others."""

from pathlib import Path

import torch
from torch import Tensor

from open_mythos.data.tokenizer import Tokenizer, load_folder
from open_mythos.hub import load as hub
from open_mythos.hub.family import Settings
from open_mythos.model import LoopedLM
from open_mythos.train import checkpoint
from open_mythos.train.parallel import load_weights
from open_mythos.train.recipe import Recipe


def from_pretrained(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    settings: Settings | None = None,
) -> hub.Pretrained:
    """The model of a run at its newest checkpoint, or what `hub.load.from_pretrained` finds by this name.

    A run has its settings in its recipe: raises `ValueError` if some are given, and all that `load_run` and
    `hub.load.from_pretrained` raise.
    """
    folder = Path(name).expanduser()
    if not is_run(folder):
        refuse_checkpoint(folder)
        return hub.from_pretrained(name, device=device, dtype=dtype, settings=settings)
    if settings:
        raise ValueError(
            f"{folder} is a run, whose model is in its recipe; leave settings={settings!r} out, they are for "
            "checkpoints of other code"
        )
    return load_run(folder)[0].to(device=device, dtype=dtype)


def is_run(folder: Path) -> bool:
    """Whether a folder is what a training run leaves, once it has saved anything."""
    return (folder / "checkpoints").is_dir()


def refuse_checkpoint(folder: Path) -> None:
    """Raise `ValueError` for one checkpoint of a run, which cannot be read without the run."""
    match = checkpoint.STEP.fullmatch(folder.name)
    if match and (folder / checkpoint.MANIFEST).is_file():
        run = folder.absolute().parent.parent
        raise ValueError(
            f"{folder} is a checkpoint of the run {run}; give the run's folder, which stands for its newest "
            f"checkpoint, and for this one `load_run(Path({str(run)!r}), step={int(match[1])})` or "
            f"--step {int(match[1])}"
        )


def load_recipe(folder: Path) -> Recipe:
    """The recipe of a run. Raises `ValueError` if the folder holds none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no config.json")
    return Recipe.load(folder / "config.json")


def load_run(
    folder: Path, step: int | None = None, tell: checkpoint.Tell = lambda said: None
) -> tuple[LoopedLM, Tokenizer]:
    """The model of a run, in eval mode, at `step` or at its newest intact checkpoint, and its tokenizer.

    `tell` hears of a newer one that is damaged.
    Raises `ValueError` if the folder is not a run's, or has no such checkpoint.
    """
    recipe = load_recipe(folder)
    weights = saved_weights(folder, step, tell)
    with torch.device("meta"):
        model = recipe.model.build()
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(
            f"the checkpoint of {folder} is not of the model in its config.json: {first}"
        ) from error
    return model.eval(), load_folder(folder / "tokenizer")


def saved_weights(
    folder: Path, step: int | None = None, tell: checkpoint.Tell = lambda said: None
) -> dict[str, Tensor]:
    """The weights of a run by their names in the model, at `step` or at its newest intact checkpoint."""
    steps = checkpoint.steps_in(folder / "checkpoints")
    if not steps or (step is not None and step not in steps):
        none = f"it has none that is whole{checkpoint.damage(folder / 'checkpoints')}"
        have = f"it has steps {', '.join(map(str, steps))}" if steps else none
        raise ValueError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}; {have}")
    tensors = _newest(folder, tell) if step is None else checkpoint.load(steps[step], only="model")[0]
    return {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}


def _newest(folder: Path, tell: checkpoint.Tell) -> dict[str, Tensor]:
    """The weights of the newest intact checkpoint, of those that look whole."""
    damaged = checkpoint.broken_in(folder / "checkpoints")
    for candidate in reversed(checkpoint.steps_in(folder / "checkpoints").values()):
        try:
            tensors, _ = checkpoint.load(candidate, only="model")
        except ValueError as error:
            damaged[candidate] = str(error)
            continue
        if said := checkpoint.passed_over(damaged, candidate):
            tell(said)
        return tensors
    raise ValueError(f"{folder} has no intact checkpoint; {'; '.join(damaged.values())}")


def begin_with(model: LoopedLM, folder: Path) -> None:
    """Give a model, sharded or not, the weights of a run. A halting rule that the run lacks stays fresh.

    Raises `ValueError` if the run's model is another.
    """
    weights = saved_weights(folder)
    ours = model.state_dict()
    fresh = {name for name in ours.keys() - weights.keys() if name.startswith("loop.halt.")}
    misfits = list((ours.keys() ^ weights.keys()) - fresh)
    misfits += [name for name in ours.keys() & weights.keys() if ours[name].shape != weights[name].shape]
    if misfits:
        raise ValueError(f"the model cannot begin with the weights of {folder}: {min(misfits)} does not fit")
    load_weights(model, weights | {name: ours[name] for name in fresh})
