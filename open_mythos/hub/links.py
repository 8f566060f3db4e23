"""A name table: which tensors in other people's files hold which of our parameters.

A `Link` says that some of theirs, laid end to end, are some of ours, laid end to end. One to one is the
usual case; one to three is a joint matrix for queries, keys and values; two to one a gate and its partner
that they keep apart and we keep in one matrix; and a matrix may lie there on its side, or once more for
every step that shares it. The same table is read both ways, so what can be loaded can be written.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Link(NamedTuple):
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shape: tuple[int, ...] | None = None  # of theirs, where it is not ours joined by rows
    turned: bool = False  # theirs is the transpose of ours
    copies: tuple[tuple[str, ...], ...] = ()  # where theirs lie once more, each time under names of their own


Names = str | Sequence[str]
Read = Callable[[str], Tensor]


def link(theirs: Names, ours: Names, shape: tuple[int, ...] | None = None, *, turned: bool = False) -> Link:
    return Link(_tuple(theirs), _tuple(ours), shape, turned)


def nest(links: Iterable[Link], theirs: str, ours: str, copies: Iterable[str] = ()) -> list[Link]:
    """The same links with their names and ours under a prefix; theirs again under each of `copies`."""

    def under(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(prefix + name for name in names)

    again = tuple(copies)
    return [
        x._replace(
            theirs=under(theirs, x.theirs),
            ours=under(ours, x.ours),
            copies=tuple(under(prefix, x.theirs) for prefix in again),
        )
        for x in links
    ]


def check_names(links: Sequence[Link], there: Iterable[str], spare: Iterable[str]) -> None:
    """Raise `ValueError` if tensors are missing, or there are some that no link and no `spare` knows."""
    there = set(there)
    known = {name for x in links for names in (x.theirs, *x.copies) for name in names}
    missing, unknown = sorted(known - there), sorted(there - known - set(spare))
    complaints = [f"it lacks {_some(missing, unknown or there)}"] if missing else []
    complaints += [f"it has the unknown {_some(unknown, missing or known)}"] if unknown else []
    if complaints:
        raise ValueError(f"the checkpoint does not fit its config.json: {'; '.join(complaints)}")


@torch.no_grad()
def pour(links: Sequence[Link], read: Read, ours: Mapping[str, Tensor]) -> None:
    """Copy what `read` gives for their names into our tensors, holding one link's tensors at a time.

    Raises `ValueError` for a tensor of another shape than its place, or a copy that is none.
    """
    for x in links:
        _fail_unless_alike(x, read)
        targets = [ours[name] for name in x.ours]
        shape = _their_shape(x, targets)
        flat = _end_to_end([_checked(name, read(name), shape, x.turned) for name in x.theirs])
        for target, part in zip(targets, flat.split([t.numel() for t in targets]), strict=True):
            target.copy_(part.view_as(target))


def draw_off(x: Link, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, made of ours; every copy with storage of its own."""
    parts = [ours[name].detach() for name in x.ours]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if x.shape is not None:
        whole = whole.reshape(x.shape)
    whole = whole.mT if x.turned else whole
    parts = [part.contiguous() for part in whole.chunk(len(x.theirs))]
    found = dict(zip(x.theirs, parts, strict=True))
    for again in x.copies:
        found |= {name: part.clone() for name, part in zip(again, parts, strict=True)}
    return found


def _fail_unless_alike(x: Link, read: Read) -> None:
    for again in x.copies:
        for first, name in zip(x.theirs, again, strict=True):
            if not torch.equal(read(first), read(name)):
                raise ValueError(f"{name} should be {first} once more, which is one weight here, but differs")


def _their_shape(x: Link, ours: Sequence[Tensor]) -> tuple[int, ...]:
    """Of each of theirs, which are equal parts of the whole."""
    rows, *rest = x.shape or (sum(len(tensor) for tensor in ours), *ours[0].shape[1:])
    shape = rows // len(x.theirs), *rest
    return shape[::-1] if x.turned else shape


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], turned: bool) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} should have the shape {shape}, by config.json, not {tuple(tensor.shape)}")
    return tensor.mT if turned else tensor


def _end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _some(names: Sequence[str], others: Iterable[str], most: int = 3) -> str:
    """A few of the names, with what the first may have been meant as."""
    close = difflib.get_close_matches(names[0], list(others), n=1)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    hint = f" (closest to {names[0]}: {close[0]})" if close else ""
    return ", ".join(names[:most]) + more + hint


def _tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
