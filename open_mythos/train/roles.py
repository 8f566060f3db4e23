"""What each parameter is for, read off the modules and never off a name.

matrix   a linear map: the weight of `nn.Linear`, or what a module declares in `matrices()`
table    rows looked up by index: the weight of `nn.Embedding`, also when the head shares it
head     the weight of the model's own `head`, when it is not shared with a table
vector   everything else: norms, biases, gates, decays, and matrices too thin to orthogonalise

A module whose parameters hold several maps side by side says so:

    def matrices(self) -> dict[str, Blocks]: return {"gate_up": 2, "down": 1}

A key names a parameter of the module, or a child `nn.Linear`. The value counts the equal blocks of
rows that are maps of their own, or lists the blocks' heights; 0 says that it is no matrix at all.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

Kind = Literal["matrix", "table", "head", "vector"]
Blocks = int | tuple[int, ...]


class Role(NamedTuple):
    kind: Kind
    blocks: Blocks = 1


@runtime_checkable
class HasMatrices(Protocol):
    """A module that tells which of its parameters are (stacks of) matrices."""

    def matrices(self) -> dict[str, Blocks]: ...


@runtime_checkable
class HasHead(Protocol):
    """A model that ends in a linear readout."""

    head: nn.Linear


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every trainable parameter, by its name in `model.named_parameters()`.

    Raises `ValueError` where a module declares a matrix that it does not have or cannot be cut so.
    """
    found: dict[Tensor, Role] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found[module.weight] = Role("matrix")
    found.update(_declared(model))
    if isinstance(model, HasHead):
        found[model.head.weight] = Role("head")
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            found[module.weight] = Role("table")
    return {
        name: _unless_thin(parameter, found.get(parameter, Role("vector")))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def heights(rows: int, blocks: Blocks) -> tuple[int, ...]:
    """Rows of each block."""
    return (rows // blocks,) * blocks if isinstance(blocks, int) else blocks


def _declared(model: nn.Module) -> Iterator[tuple[Tensor, Role]]:
    for path, module in model.named_modules():
        own = dict(module.named_parameters(remove_duplicate=False))
        if not isinstance(module, HasMatrices):
            continue
        for name, blocks in module.matrices().items():
            parameter = _named(own, name, path or type(module).__name__)
            if not _can_be_cut(parameter, blocks):
                raise ValueError(
                    f"{path or type(module).__name__} declares {name} of shape {tuple(parameter.shape)} as "
                    f"{blocks} block(s) of rows; it should be (rows, columns) or a stack of such, cut evenly"
                )
            yield parameter, Role("matrix", blocks) if blocks else Role("vector")


def _can_be_cut(parameter: Tensor, blocks: Blocks) -> bool:
    if blocks == 0:
        return True
    return parameter.ndim in (2, 3) and sum(heights(parameter.shape[-2], blocks)) == parameter.shape[-2]


def _named(own: dict[str, nn.Parameter], name: str, owner: str) -> nn.Parameter:
    for candidate in (name, f"{name}.weight"):
        if candidate in own:
            return own[candidate]
    raise ValueError(f"{owner} declares a matrix {name!r}; it has {', '.join(own) or 'none'}")


def _unless_thin(parameter: nn.Parameter, role: Role) -> Role:
    """A row vector has nothing to orthogonalise: it is a vector, whatever holds it."""
    if role.kind != "matrix":
        return role
    if parameter.ndim < 2:
        return Role("vector")
    return (
        role if min(parameter.shape[-1], *heights(parameter.shape[-2], role.blocks)) >= 2 else Role("vector")
    )
