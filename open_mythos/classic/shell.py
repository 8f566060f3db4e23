"""What the original's parts have in common here: each is a shell around a module of the core.

A part is saved and loaded under the original's names, alone or inside other modules, and some of them may be
left out. What a shell shows of its core can be read and its weights written; another module has to be put
into the core, which is what runs, so an assignment here raises instead of changing nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from open_mythos.hub import original
from open_mythos.hub.original import Joint, Joints


class Shell(nn.Module):
    def __setattr__(self, name: str, value: Any) -> None:
        shown = getattr(type(self), name, None)
        if not isinstance(shown, property):
            super().__setattr__(name, value)
        elif shown.fset is None:
            raise AttributeError(
                f"{type(self).__name__}.{name} shows a part of the core; replace it there "
                "(docs/compatibility.md says where), or write into its weights"
            )
        else:
            object.__setattr__(self, name, value)


class Part(Shell, ABC):
    """A shell whose module is `core`."""

    core: Any

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.training = core.training
        self.register_state_dict_post_hook(_saved)
        self.register_load_state_dict_pre_hook(_loading)

    @abstractmethod
    def joints(self) -> Iterator[tuple[str, Joint]]:
        """How each weight of `core` is made of the original's."""


def _saved(part: Part, state: dict[str, Tensor], prefix: str, local: Any) -> None:
    original.name_back(state, prefix, dict(part.joints()))


def _loading(part: Part, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    _, _, missing, _, complaints = rest
    held = dict(part.named_parameters()) | dict(part.named_buffers())
    complaints += original.adopt(state, prefix, Joints(dict(part.joints())), held, missing)
