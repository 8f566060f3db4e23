"""Models from the Hub or a folder, and back.

    lm = from_pretrained("SandyResearch/parcae-370m")     or a folder; the family is read off config.json
    save_pretrained(lm, "mine")                           in our own format
    export(lm, "theirs", "parcae")                        in the format of the family's own code

The model is made without storage and filled tensor by tensor, so it is never held twice.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.data.network import require_hub
from open_mythos.hub import huginn, llama, olmo, ouro, own, parcae
from open_mythos.hub.family import Family
from open_mythos.hub.links import check_names, draw_off, pour
from open_mythos.hub.weights import Weights, write
from open_mythos.model import LoopedLM, Model

FAMILIES: tuple[Family, ...] = (own, parcae, huginn, ouro, llama, olmo)
EMBEDDING = "embed.weight"


def from_pretrained(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LoopedLM:
    """The model in a local folder, or on the Hugging Face Hub under this name, ready to be run.

    Its weights keep the type they are stored in unless `dtype` names another.
    Raises `ValueError` if the name cannot be found, the family is unknown, the family's code does something
    that we do not, or tensors are missing, unknown or of another size.
    """
    folder = _folder(name)
    config = read_config(folder)
    family = recognise(config)
    model = _model(family, config)
    links, weights = family.links(model), Weights(folder)
    embedding = next(x.theirs[0] for x in links if EMBEDDING in x.ours)
    stand_in = _stand_in(model, weights, embedding)
    check_names(links, [*weights.names, *stand_in], family.spare(config))
    lm = materialise(model, device, dtype or weights.read(stand_in.get(embedding, embedding)).dtype)
    pour(links, lambda theirs: weights.read(stand_in.get(theirs, theirs)), lm.state_dict())
    return lm.eval()


def save_pretrained(lm: LoopedLM, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` in our own format; `from_pretrained` reads them back."""
    export(lm, folder, own.NAME)


def export(lm: LoopedLM, folder: str | Path, family: str, *, torch_file: bool = False) -> None:
    """Write the model as the named family's own code saves it, so that it loads there.

    `torch_file` adds the weights in PyTorch's own format, the only one that Parcae's loader looks for.
    Raises `ValueError` if the family is unknown or its code could not run this model.
    """
    chosen = next((f for f in FAMILIES if family == f.NAME), None)
    if chosen is None:
        raise ValueError(f"there is no family {family!r}; there are {', '.join(f.NAME for f in FAMILIES)}")
    config, folder = chosen.to_config(lm.config), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write(folder, _tensors(lm, chosen, config))
    if torch_file:
        torch.save(dict(_tensors(lm, chosen, config)), folder / "pytorch_model.bin")


def recognise(config: dict[str, Any]) -> Family:
    """The family of a checkpoint by its config.json. Raises `ValueError` if nobody knows it."""
    for family in FAMILIES:
        if family.recognise(config):
            return family
    signs = {key: config[key] for key in ("model_type", "architectures", "_class_name") if key in config}
    known = ", ".join(f.NAME for f in FAMILIES)
    raise ValueError(f"config.json is of no family known here ({known}); it says {signs or 'nothing of it'}")


def described(folder: Path) -> Model:
    """The model that a checkpoint's config.json describes. Raises `ValueError` where it describes none."""
    config = read_config(folder)
    return recognise(config).to_model(config)


def _model(family: Family, config: dict[str, Any]) -> Model:
    try:
        return family.to_model(config)
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}, which a {family.NAME} model needs") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises `ValueError` if there is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no config.json, so it is not a checkpoint") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(config).__name__}")
    return config


def materialise(model: Model, device: str | torch.device, dtype: torch.dtype) -> LoopedLM:
    """The model with storage whose contents are still anything."""
    with torch.device("meta"):
        lm = model.build()
    return lm.to(dtype).to_empty(device=device)


def _tensors(lm: LoopedLM, family: Family, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    ours, constants = lm.state_dict(), family.constants(lm.config)
    for x in family.links(lm.config):
        yield from draw_off(x, ours).items()
    for name, shape in family.spare(config).items():
        tied_head = name == "lm_head.weight"
        filler = ours[EMBEDDING].clone() if tied_head else torch.zeros(shape, dtype=ours[EMBEDDING].dtype)
        yield name, constants.get(name, filler)


def _stand_in(model: Model, weights: Weights, embedding: str) -> dict[str, str]:
    """Of two tied tensors a file may hold either."""
    head = "lm_head.weight"
    return {embedding: head} if model.tied and embedding not in weights and head in weights else {}


def _folder(name: str | Path) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if isinstance(name, Path) or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {name}, and it is not of the form owner/name of the Hub")
    return _download(str(name))


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
