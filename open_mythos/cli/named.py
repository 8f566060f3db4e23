"""What a word on the command line means: a model by name, file or folder; a choice written in a word."""

import difflib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from open_mythos.config import parsed

if TYPE_CHECKING:
    from open_mythos.config import Config
    from open_mythos.data.tokenizer import Tokenizer
    from open_mythos.model import LoopedLM, Model


def model_named(name: str) -> "Model":
    """The config of mythos_1b ... mythos_1t, a preset or a recipe, or in a JSON file, a run or a checkpoint.

    Raises `ValueError` for what is none of these.
    """
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        return _in_file(path / "config.json" if path.is_dir() else path)
    known = _names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:6]
        raise ValueError(
            f"there is no model, file or folder {name!r}; close to it are {', '.join(close)} "
            "(`mythos show` without a name lists all)"
        )
    return _by_name(name)


def names() -> dict[str, list[str]]:
    """The names that `model_named` knows, by where they come from."""
    from open_mythos import presets, variants
    from open_mythos.train.recipes import RECIPES

    mythos = [f"mythos_{size}" for size in variants.ROWS]
    return {"OpenMythos": mythos, "recipes": list(RECIPES), "published models": list(presets.names())}


def trained(folder: Path, step: int | None = None) -> "tuple[LoopedLM, Tokenizer]":
    """Model and tokenizer of a run, or of a folder with weights of a known family and a tokenizer.json."""
    from open_mythos.data.tokenizer import load_folder
    from open_mythos.train.load import from_pretrained, is_run, load_run

    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one that `mythos train` left, as in runs/demo")
    if is_run(folder):
        return load_run(folder, step, note)
    from open_mythos.model import LoopedLM

    lm = from_pretrained(folder)
    if not isinstance(lm, LoopedLM):
        raise ValueError(f"{folder} holds a classifier of whole sequences; give a language model")
    return lm, load_folder(folder)


def note(text: str) -> None:
    """Say one line beside the work, on standard error."""
    print(text, file=sys.stderr)


def choice(union: Any, text: str) -> "Config":
    """A variant of a union written as `Name` or `Name:field=value,field=value`.

    Raises `ValueError` that lists the variants, or the fields of the one meant.
    """
    kinds = {kind.__name__: kind for kind in get_args(union)}
    name, _, rest = text.partition(":")
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it can be {', '.join(kinds)}"
        raise ValueError(f"there is no {name!r} to choose; {hint}")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    for field, equals, _ in pairs:
        if not equals:
            raise ValueError(f"{text!r} should look like {name}:field=value, but {field!r} has no value")
    made: Config = kinds[name].from_dict({field: parsed(value) for field, _, value in pairs})
    return made


def device_named(name: str | None) -> str:
    """The device asked for, or the best there is. Raises `ValueError` if it is not there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def _in_file(path: Path) -> "Model":
    from open_mythos.hub.load import described
    from open_mythos.model import Model
    from open_mythos.train.recipe import Recipe

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    kind = _read(path).get("is")
    if kind == "Recipe":
        return Recipe.load(path).model
    if kind == "Model" or path.name != "config.json":
        return Model.load(path)
    return described(path.parent)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def _names() -> list[str]:
    return list(dict.fromkeys(name for group in names().values() for name in group))


def _by_name(name: str) -> "Model":
    from open_mythos import presets, variants
    from open_mythos.train.recipes import RECIPES

    if name.removeprefix("mythos_") in variants.ROWS:
        made: Model = getattr(variants, name)().model()
        return made
    return RECIPES[name]().model if name in RECIPES else presets.preset(name)
