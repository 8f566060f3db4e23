"""Remembering keys and values between calls.

A looped model runs one layer many times, so a cache is addressed by `Place`: (stage, layer, step),
where an ordinary transformer needs only the layer. What a layer remembers is its own business (GQA:
keys and values; MLA: one latent for all heads); to the cache it is a tensor with tokens on the axis
before the last, and a token's column is its position, so a row may be padded or run ahead of others.

How much of the depth is kept is a policy of the cache:

    PerLoop      a slot for every step: exact
    LastExited   a slot for every step; a token that leaves early is copied into the deeper ones
                 Schwethelm et al. 2026 (arXiv 2608.09444)
    Shared       one slot, overwritten by each step: a token is seen as it last was
                 Geiping et al. 2025 (arXiv 2502.05171), Zhu et al. 2025 (arXiv 2510.25741)
    Ring         the last `slots` steps: step n lives in slot n mod slots (Geiping et al. 2025)
    Anchor       the first `steps` steps a slot each, all later ones share one more (Geiping et al. 2025)

Whoever looks at a step that a token never took sees its latest step before that one (of a Ring, what that
step's slot holds), except under

    Skip         the token is not seen at that step (what Huginn's code does unless told otherwise)
    Deepest      then all tokens are seen as their last step left them ("always-last" in Huginn's code)
    Folded       neighbouring layers share a slot (its "compress-r"): kept to compare, not to be used

All but PerLoop show how far a token went, and tokens leave the loop early only without gradient and where
nobody watches: so with them a call with gradient sees halting tokens otherwise than one without.
Law: tests/laws/test_cache.py.
"""

from typing import NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from open_mythos.config import Config
from open_mythos.shapes import CacheEntry, Positions, Rows


class Place(NamedTuple):
    """Where in the unrolled network a layer is being run. Layers never know their own number."""

    stage: str = "prelude"  # "embed", "prelude", "loop" or "coda"
    layer: int = 0
    step: int | tuple[int, ...] = 0  # inside the loop: one for all rows, or one per row
    part: int = 0  # which of the things that the layer remembers


class Span(NamedTuple):
    """Which columns a call writes and how many it may look back on."""

    positions: Positions
    start: int | None  # all rows write start, start + 1, ...; None when each has its own positions
    end: int  # no row looks at or past this column
    rows: Rows | None = None  # the cache's rows that this batch is; None for all of them


@runtime_checkable
class Cache(Protocol):
    """What attention asks of a cache, and the loop of it."""

    @property
    def exact(self) -> bool:
        """Whether every token must run every step, because later tokens look there."""

    def extend(self, place: Place, new: CacheEntry, span: Span) -> CacheEntry:
        """Write `new` (B ... T W) at `span` and return what is held there (B ... S W), S = span.end."""

    def settle(self, layers: int, taken: int, span: Span) -> None:
        """These tokens left the loop of `layers` layers after `taken` steps; deeper steps see them so."""


class PerLoop(Config):
    exact: bool = True

    def slot(self, step: int) -> int:
        return step


class LastExited(Config):
    exact: bool = False

    def slot(self, step: int) -> int:
        return step


class Shared(Config):
    exact: bool = False

    def slot(self, step: int) -> int:
        return 0


class Ring(Config):
    slots: int
    exact: bool = False

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"a Ring cache needs at least one slot, got slots={self.slots}")

    def slot(self, step: int) -> int:
        return step % self.slots


class Anchor(Config):
    steps: int = 8
    exact: bool = False

    def slot(self, step: int) -> int:
        return min(step, self.steps)


class Skip(Config):
    exact: bool = False

    def slot(self, step: int) -> int:
        return step


class Deepest(Config):
    exact: bool = False

    def slot(self, step: int) -> int:
        return step


class Folded(Config):
    """The loop's layers are counted through all steps; `share` in a row hold their entries in one place."""

    layers: int
    share: int = 2
    exact: bool = True

    def fold(self, layer: int, step: int) -> int:
        return (step * self.layers + layer) // self.share


@final
class KVCache:
    """Preallocated buffers, one per (stage, layer, slot), each (rows, ..., capacity + 1, W).

    The extra column takes what padding writes. A step that is reached for the first time starts as a
    copy of the step before it, so that more loops than before never look at nothing.
    """

    def __init__(self, rows: int, capacity: int, policy: "Policy | None" = None) -> None:
        if rows < 1 or capacity < 1:
            raise ValueError(f"a cache needs room for at least one row and token, got {rows} x {capacity}")
        self.rows, self.capacity = rows, capacity
        self.policy: Policy = policy if policy is not None else PerLoop()
        self._held: dict[tuple[str, int, int, int], Tensor] = {}
        self._depth = torch.zeros(rows, capacity + 1, dtype=torch.int32)  # steps that each token took
        self._slots: dict[int | None, Slots] = {}
        self.kept: dict[object, Tensor] = {}  # what calls work out once for all of them (Context.kept)

    @property
    def exact(self) -> bool:
        return self.policy.exact

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        return sum(held.numel() * held.element_size() for held in self._held.values())

    def extend(self, place: Place, new: CacheEntry, span: Span) -> CacheEntry:
        if span.end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens per row, but {span.end} were asked for")
        if span.rows is None and len(new) != self.rows:
            raise ValueError(f"the cache is for {self.rows} rows, the batch has {len(new)}")
        held = self._put(place, new, span)
        if place.stage != "loop" or not isinstance(self.policy, Skip | Deepest):
            return held
        self._count(place, span)
        return held if isinstance(self.policy, Skip) else self._deepest(place, held, span)

    def missing(self, place: Place, span: Span) -> Bool[Tensor, "B S"] | None:
        """Which of the tokens that one could look back on are not there at this step."""
        if place.stage != "loop" or not isinstance(self.policy, Skip):
            return None
        return self._depths(span) <= _steps(place, span)

    def _put(self, place: Place, new: CacheEntry, span: Span) -> CacheEntry:
        if isinstance(place.step, int):
            held = self._buffer(place, place.step, new)
            _write(held, new, span)
            return _read(held, span)
        parts = new.new_zeros(*new.shape[:-2], span.end, new.shape[-1])
        for step in sorted(set(place.step)):
            here = torch.tensor([i for i, s in enumerate(place.step) if s == step], device=new.device)
            held = self._buffer(place, step, new)
            part = _take(span, here)
            _write(held, new[here], part)
            parts[here] = _read(held, part)
        return parts

    def slots(self, span: Span, step: int | None = None) -> "Slots | None":
        """What all layers see at this step of the loop, or without one outside of the loop. None where nobody
        has been yet, where more than one slot is looked at, and where `span` does not fit."""
        if isinstance(self.policy, Skip | Deepest | Folded) or not self._fits(span):
            return None
        slot = None if step is None else self.policy.slot(step)
        if slot not in self._slots:
            here = {
                (stage, layer, part): held
                for (stage, layer, n, part), held in self._held.items()
                if (stage != "loop" if slot is None else stage == "loop" and n == slot)
            }
            if not here:
                return None
            self._slots[slot] = Slots(here)
        return self._slots[slot]

    def _fits(self, span: Span) -> bool:
        return span.end <= self.capacity and (span.rows is not None or len(span.positions) == self.rows)

    def settle(self, layers: int, taken: int, span: Span) -> None:
        if taken < 1 or isinstance(self.policy, Skip | Deepest | Folded):
            return
        source = self.policy.slot(taken - 1)
        for (stage, layer, slot, part), held in self._held.items():
            if stage == "loop" and layer < layers and slot >= taken:
                _write(held, _read_at(self._held[stage, layer, source, part], span), span)

    def keep(self, rows: Tensor) -> None:
        """Only these rows from now on, in this order."""
        self._held = {key: held[rows] for key, held in self._held.items()}
        self._depth = self._depth[rows.to(self._depth.device)]
        self._slots.clear()
        self.rows = len(rows)

    def _buffer(self, place: Place, step: int, like: Tensor) -> Tensor:
        layer, slot = self._address(place, step)
        key = place.stage, layer, slot, place.part
        if key not in self._held:
            shape = self.rows, *like.shape[1:-2], self.capacity + 1, like.shape[-1]
            before = self._held.get((place.stage, layer, slot - 1, place.part))
            self._held[key] = like.new_zeros(shape) if before is None else before.clone()
            self._slots.clear()
        return self._held[key]

    def _address(self, place: Place, step: int) -> tuple[int, int]:
        """Layer and slot."""
        if place.stage != "loop":
            return place.layer, 0
        if isinstance(self.policy, Folded):
            return 0, self.policy.fold(place.layer, step)
        return place.layer, self.policy.slot(step)

    def _count(self, place: Place, span: Span) -> None:
        """The tokens of `span` are at this step."""
        self._depth = self._depth.to(span.positions.device)
        rows = span.rows if span.rows is not None else torch.arange(self.rows, device=span.positions.device)
        columns = _columns(self._depth[..., None], span)
        self._depth[rows[:, None], columns] = (_steps(place, span) + 1).expand(columns.shape).int()

    def _depths(self, span: Span) -> Int[Tensor, "B S"]:
        depth = self._depth[:, : span.end]
        return depth if span.rows is None else depth[span.rows]

    def _deepest(self, place: Place, held: CacheEntry, span: Span) -> CacheEntry:
        """All at this step where they all took it, else each token at its last one."""
        depth, step = self._depths(span), _steps(place, span)
        gap = ((depth > 0) & (depth <= step)).any(1, keepdim=True)
        at = torch.where(gap, depth - 1, step)
        for (stage, layer, slot, part), buffer in self._held.items():
            if (stage, layer, part) == (place.stage, place.layer, place.part):
                here = (at == slot).view(len(at), *[1] * (held.ndim - 3), -1, 1)
                held = torch.where(here, _read(buffer, span).to(held.dtype), held)
        return held


@final
class Slots:
    """The buffers of a `KVCache` that one step writes and reads, where it was before: for a compiled step,
    which must not depend on which step it is. `held` goes by stage, layer and part."""

    exact = True

    def __init__(self, held: dict[tuple[str, int, int], Tensor]) -> None:
        self.held = held

    def extend(self, place: Place, new: CacheEntry, span: Span) -> CacheEntry:
        held = self.held[place.stage, place.layer, place.part]
        _write(held, new, span)
        return _read(held, span)

    def settle(self, layers: int, taken: int, span: Span) -> None:
        """The cache itself is told."""


@final
class GrowingCache:
    """The simplest cache that is right for rows in step; the oracle for every faster one."""

    exact = True

    def __init__(self) -> None:
        self._held: dict[Place, Tensor] = {}

    def extend(self, place: Place, new: CacheEntry, span: Span) -> CacheEntry:
        held = self._held.get(place)
        if held is None or held.shape[-2] < span.end:  # else steps share it, and it is there already
            self._held[place] = new if held is None else torch.cat([held, new], dim=-2)
        return self._held[place]

    def settle(self, layers: int, taken: int, span: Span) -> None:
        """Rows in step leave together, so nobody looks deeper than they went."""


def _steps(place: Place, span: Span) -> Int[Tensor, "#B 1"]:
    """The step that each row of the batch is at."""
    steps = [place.step] if isinstance(place.step, int) else list(place.step)
    return torch.tensor(steps, device=span.positions.device)[:, None]


def _columns(held: Tensor, span: Span) -> Positions:
    """Where each token goes; padding goes to the extra column."""
    spare = held.shape[-2] - 1
    return torch.where(span.positions < 0, spare, span.positions)


def _write(held: Tensor, new: Tensor, span: Span) -> None:
    new = new.to(held.dtype)
    if span.start is not None and span.rows is None:
        held[..., span.start : span.start + new.shape[-2], :] = new
        return
    rows = span.rows if span.rows is not None else torch.arange(len(new), device=new.device)
    held.transpose(1, -2)[rows[:, None], _columns(held, span)] = new.transpose(1, -2)


def _read(held: Tensor, span: Span) -> Tensor:
    held = held[..., : span.end, :]
    return held if span.rows is None else held[span.rows]


def _read_at(held: Tensor, span: Span) -> Tensor:
    """What is held at exactly the columns of `span`: B ... T W."""
    rows = span.rows if span.rows is not None else torch.arange(len(span.positions), device=held.device)
    return held.transpose(1, -2)[rows[:, None], _columns(held, span)].transpose(1, -2)


def _take(span: Span, here: Tensor) -> Span:
    rows = here if span.rows is None else span.rows[here]
    return Span(span.positions[here], span.start, span.end, rows)


Policy = PerLoop | LastExited | Shared | Ring | Anchor | Skip | Deepest | Folded
