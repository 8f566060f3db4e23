"""What a family of published models has to say about itself, and how a new one is added.

A family is a module with the members of `Family`. Write one beside `parcae.py`, add it to `FAMILIES` in
`load.py`, and `from_pretrained`, `export` and the commands know it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from open_mythos.config import Config
from open_mythos.hub.links import Link
from open_mythos.hub.weights import Weights

Settings = Mapping[str, Any]  # a config.json
M = TypeVar("M", bound=Config)  # Model, or what a classifier is built of


@runtime_checkable
class Family(Protocol[M]):
    NAME: str

    def recognise(self, config: Settings) -> bool:
        """Whether a checkpoint with this config.json is one of ours."""

    def to_model(self, config: Settings) -> M:
        """The same model in our terms. Raises `ValueError` for a setting that we cannot honour."""

    def to_config(self, model: M) -> dict[str, Any]:
        """A config.json from which their code builds `model`. Raises `ValueError` if it cannot."""

    def links(self, model: M) -> Sequence[Link]:
        """Their names for the parameters of `model`."""

    def spare(self, config: Settings) -> dict[str, tuple[int, ...]]:
        """Tensors, with their shapes, that their files may hold and that change nothing."""

    def constants(self, model: M) -> dict[str, Tensor]:
        """Those of the spare ones that their code reads and that are not zero."""


@runtime_checkable
class Undecided(Family[M], Protocol[M]):
    """A family whose config.json leaves something open, or is not there, and whose tensors tell."""

    def completed(self, config: Settings, weights: Weights) -> Settings:
        """The config.json and what it leaves open. Raises `ValueError` for tensors of no known model, and
        for what they do not tell."""


def need(config: Settings, name: str, *known: Any, family: str) -> Any:
    """config[name], which must be one of `known`; the first of them where nothing is said."""
    value = config.get(name, known[0])
    if value not in known:
        wanted = " or ".join(repr(k) for k in known)
        raise ValueError(f"this {family} checkpoint has {name}={value!r}; supported is {wanted}")
    return value


def fail_unless_same(want: Config, got: Config, family: str) -> None:
    """Raise `ValueError`, naming the first difference that matters, unless their code would run `want`."""
    difference = _difference(want.to_dict(), got.to_dict(), "model")
    if difference:
        raise ValueError(f"{family}'s code cannot run this model: {difference}")


def _difference(want: Any, got: Any, path: str) -> str:
    if isinstance(want, dict) and isinstance(got, dict) and want.keys() == got.keys():
        pairs = [(want[key], got[key], f"{path}.{key}") for key in want if key not in ("init", "schedule")]
    elif isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
        pairs = [(w, g, f"{path}.{i}") for i, (w, g) in enumerate(zip(want, got, strict=True))]
    else:
        return "" if want == got else f"{path} is {want!r}, and would be {got!r}"
    return next((text for pair in pairs if (text := _difference(*pair))), "")
