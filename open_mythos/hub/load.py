"""Models from the Hub or a folder, and back.

    lm = from_pretrained("SandyResearch/parcae-370m")     or a folder; the family is read off config.json
    classifier = from_pretrained("logic_model.pt", settings={"n_thinking_steps": 10})     or a file of Chen's
    save_pretrained(lm, "mine")                           in our own format
    export(lm, "theirs", "parcae")                        in the format of the family's own code

The model is made without storage and filled tensor by tensor, so it is never held twice.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.data.network import require_hub
from open_mythos.hub import chen, huginn, llama, olmo, ouro, own, parcae, recursions, retrofit
from open_mythos.hub.family import Family, Settings, Undecided
from open_mythos.hub.links import Link, check_names, draw_off, pour
from open_mythos.hub.weights import Weights, write
from open_mythos.model import LoopedLM, Model
from open_mythos.presets.chen import ChenClassifier, Classifier

FAMILIES: tuple[Family[Any], ...] = (own, parcae, retrofit, huginn, ouro, recursions, llama, olmo, chen)
EMBEDDING = "embed.weight"
HEAD = "lm_head.weight"  # where others keep it
Pretrained = LoopedLM | ChenClassifier


def from_pretrained(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    settings: Settings | None = None,
) -> Pretrained:
    """The model in a local folder or file, or on the Hugging Face Hub under this name, ready to be run.

    Chen's models are classifiers, all others a `LoopedLM`. A file is read with the config.json beside it;
    Chen's need none (hub/chen.py). The weights keep the type they are stored in unless `dtype` names another.
    `settings` take the place of those in config.json, or say what a file does not tell.
    Raises `ValueError` if the name cannot be found, the family is unknown, the family's code does something
    that we do not, or tensors are missing, unknown, of another size, or two where there should be one.
    """
    path = _path(name)
    family, config, model = _described({**_said(path), **(settings or {})}, path)
    links, weights = family.links(model), Weights(path)
    embedding = _embedding(links)
    stand_in = _stand_in(model, weights, embedding)
    check_names(links, [*weights.names, *stand_in], family.spare(config))
    _fail_unless_tied(model, weights, embedding)
    made = materialise(model, device, dtype or weights.read(stand_in.get(embedding, embedding)).dtype)
    pour(links, lambda theirs: weights.read(stand_in.get(theirs, theirs)), made.state_dict())
    return made.eval()


def save_pretrained(lm: Pretrained, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` in our own format; `from_pretrained` reads them back."""
    export(lm, folder, own.NAME)


def export(lm: Pretrained, folder: str | Path, family: str, *, torch_file: bool = False) -> None:
    """Write the model as the named family's own code saves it, so that it loads there.

    `torch_file` adds the weights in PyTorch's own format, the only one that the code of Parcae, Chen and
    mixture-of-recursions reads.
    Raises `ValueError` if the family is unknown or its code could not run this model.
    """
    chosen = next((f for f in FAMILIES if family == f.NAME), None)
    if chosen is None:
        raise ValueError(f"there is no family {family!r}; there are {', '.join(f.NAME for f in FAMILIES)}")
    if chosen is not own and (chosen is chen) != isinstance(lm, ChenClassifier):
        raise ValueError(
            f"{family}'s code cannot run a {type(lm).__name__}: only Chen's models are classifiers"
        )
    config, folder = chosen.to_config(lm.config), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write(folder, _tensors(lm, chosen, config))
    if torch_file:
        torch.save(dict(_tensors(lm, chosen, config)), folder / "pytorch_model.bin")


def described(folder: Path) -> Model:
    """The model that a checkpoint's config.json describes, of a classifier what it reads; of its weights at
    most names and shapes are looked at.

    Raises `ValueError` where it describes none, or leaves open what no tensors beside it tell.
    """
    model = _described(read_config(folder), folder)[2]
    return model if isinstance(model, Model) else model.core


def recognise(config: Settings) -> Family[Any]:
    """The family of a checkpoint by its config.json. Raises `ValueError` if nobody knows it."""
    for family in FAMILIES:
        if family.recognise(config):
            return family
    if config.get("is") == "Recipe":
        raise ValueError(
            "config.json is the recipe of a training run; open_mythos.from_pretrained and `mythos generate` "
            "read the run's folder, once it holds checkpoints/"
        )
    signs = {key: config[key] for key in ("model_type", "architectures", "_class_name") if key in config}
    known = ", ".join(f.NAME for f in FAMILIES)
    raise ValueError(f"config.json is of no family known here ({known}); it says {signs or 'nothing of it'}")


def _described(config: Settings, path: Path) -> tuple[Family[Any], Settings, Model | Classifier]:
    alone = path.is_file() and not any(family.recognise(config) for family in FAMILIES)
    family = chen if alone else recognise(config)  # Chen's files come without a config.json
    if isinstance(family, Undecided):
        config = family.completed(config, Weights(path))
    try:
        return family, config, family.to_model(config)
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}, which a {family.NAME} model needs") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises `ValueError` if there is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no config.json, so it is not a checkpoint; of Chen's models name the .pt itself"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(config).__name__}")
    return config


def materialise(model: Model | Classifier, device: str | torch.device, dtype: torch.dtype) -> Pretrained:
    """The model with storage whose contents are still anything."""
    with torch.device("meta"):
        made = model.build()
    return made.to(dtype).to_empty(device=device)


def _tensors(lm: Pretrained, family: Family[Any], config: Settings) -> Iterator[tuple[str, Tensor]]:
    ours, constants = lm.state_dict(), family.constants(lm.config)
    for x in family.links(lm.config):
        yield from draw_off(x, ours).items()
    for name, shape in family.spare(config).items():
        yield name, constants[name] if name in constants else _filler(name, shape, ours[EMBEDDING])


def _filler(name: str, shape: tuple[int, ...], embedding: Tensor) -> Tensor:
    tied_head = name == HEAD
    return embedding.clone() if tied_head else torch.zeros(shape, dtype=embedding.dtype)


def _embedding(links: Sequence[Link]) -> str:
    """Their name for the table of tokens."""
    return next(x.theirs[0] for x in links if {EMBEDDING, f"core.{EMBEDDING}"} & {*x.ours})


def _stand_in(model: Model | Classifier, weights: Weights, embedding: str) -> dict[str, str]:
    """Of two tied tensors a file may hold either."""
    return {embedding: HEAD} if _tied(model) and embedding not in weights and HEAD in weights else {}


def _fail_unless_tied(model: Model | Classifier, weights: Weights, embedding: str) -> None:
    if not _tied(model) or embedding not in weights or HEAD not in weights:
        return
    if not torch.equal(weights.read(embedding), weights.read(HEAD)):
        raise ValueError(
            f"{HEAD} and {embedding} differ, though config.json ties them; if the head is one of its own, "
            "say there that it is not tied"
        )


def _tied(model: Model | Classifier) -> bool:
    return isinstance(model, Model) and model.tied


def _path(name: str | Path) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if isinstance(name, Path) or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {name}, no file, nor is it of the form owner/name of the Hub")
    return _download(str(name))


def _said(path: Path) -> dict[str, Any]:
    """The config.json of a folder, or beside a file, where it may be absent."""
    folder = path if path.is_dir() else path.parent
    return read_config(folder) if path.is_dir() or (folder / "config.json").exists() else {}


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f"{name} is no folder here, and to ask the Hub for it needs: pip install 'open_mythos[hf]'"
        ) from None
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        require_hub(name, "name a folder")
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):  # some have PyTorch's own format only
            snapshot_download(name, allow_patterns=["*.bin", "*.bin.index.json", "model.pt"])
        return folder
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"the Hub does not give out {name}: {error}") from error
