"""Our own format: config.json is the `Model` or the `Classifier`, and model.safetensors has our names, each
tied weight once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_mythos.hub.family import Settings
from open_mythos.hub.links import Link, link
from open_mythos.model import Model
from open_mythos.presets.chen import Classifier

NAME = "open_mythos"
KINDS: dict[str, type[Model] | type[Classifier]] = {"Model": Model, "Classifier": Classifier}


def recognise(config: Settings) -> bool:
    return config.get("is") in KINDS


def to_model(config: Settings) -> Model | Classifier:
    return KINDS[config["is"]].from_dict(config)


def to_config(model: Model | Classifier) -> dict[str, Any]:
    return model.to_dict()


def links(model: Model | Classifier) -> Sequence[Link]:
    with torch.device("meta"):
        names = model.build().state_dict()
    core, head = (model, "head.weight") if isinstance(model, Model) else (model.core, "core.head.weight")
    return [link(name, name) for name in names if not (core.tied and name == head)]


def spare(config: Settings) -> dict[str, tuple[int, ...]]:
    return {}


def constants(model: Model | Classifier) -> dict[str, Tensor]:
    return {}
