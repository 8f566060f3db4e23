"""Our own format: config.json is the `Model`, and model.safetensors has our names, each tied weight once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_mythos.hub.family import Settings
from open_mythos.hub.links import Link, link
from open_mythos.model import Model

NAME = "open_mythos"


def recognise(config: Settings) -> bool:
    return config.get("is") == Model.__name__


def to_model(config: Settings) -> Model:
    return Model.from_dict(config)


def to_config(model: Model) -> dict[str, Any]:
    return model.to_dict()


def links(model: Model) -> Sequence[Link]:
    with torch.device("meta"):
        names = model.build().state_dict()
    return [link(name, name) for name in names if not (model.tied and name == "head.weight")]


def spare(config: Settings) -> dict[str, tuple[int, ...]]:
    return {}


def constants(model: Model) -> dict[str, Tensor]:
    return {}
