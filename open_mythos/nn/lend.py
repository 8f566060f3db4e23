"""Keys and values of the first step, lent to all later ones.

Recursive key/value sharing, Bae et al. 2025 (arXiv 2507.10524): one slot of cache however deep the loop, and
a token that no longer thinks is still seen, as it was at its first step.

The state of the loop carries what its tokens' first step remembered, flat, layer after layer; `Lender`
takes the cache's place for one step and hands each layer its part, so that training without a cache and
generation with one attend alike. Rows may be at different steps: those at the first write, the others read.
(Later steps still project keys and values, which nobody reads.) Law: tests/laws/test_cache.py.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from open_mythos.nn.cache import Cache, Place, Span
from open_mythos.shapes import CacheEntry, Steps

First = Float[Tensor, "B T _"]


@final
class Lender:
    """The cache of one step. `behind` is the real one, which holds the first step's entries alone."""

    exact = False

    def __init__(self, first: First, step: Steps, behind: Cache | None) -> None:
        self.first, self.behind = first, behind
        self._writes = (step == 0)[:, None, None]
        self._parts: list[First] = []

    def extend(self, place: Place, new: CacheEntry, span: Span) -> CacheEntry:
        """What the first step of this layer said, of this batch's tokens or of all that the cache holds."""
        flat = new.transpose(1, -2).flatten(2)  # B t W
        at = sum(part.shape[-1] for part in self._parts)
        part = self.first[..., at : at + flat.shape[-1]]
        # Who is at the first step brings all its tokens; where fewer came, nobody is.
        if flat.shape[1] == part.shape[1]:
            part = torch.where(self._writes, flat.to(part.dtype), part)
        self._parts.append(part)
        entry = part.unflatten(2, (*new.shape[1:-2], new.shape[-1])).transpose(1, -2)
        if self.behind is None:
            return entry
        return self.behind.extend(Place(place.stage, place.layer, 0, place.part), entry, span)

    def settle(self, layers: int, taken: int, span: Span) -> None:
        """No step but the first is remembered."""

    def result(self) -> First:
        """The state's part after this step."""
        return torch.cat(self._parts, dim=-1) if self._parts else self.first
