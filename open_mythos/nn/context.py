"""Everything about one call that is not the hidden state.

A `Context` is frozen and handed down; `at` makes the one for the next layer. It knows where the
tokens sit (`positions`, and on the host `start` and `end`, so that nothing waits for the device), what is
remembered (`cache`), and what has been worked out once for this call (`once`).

Padding has a position below zero. A token sees the tokens at and before its own position that are
not padding; with `documents`, only those of its own document; with `mask`, only where it is true.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from open_mythos.nn.cache import Cache, KVCache, Place, Slots, Span
from open_mythos.nn.lend import Lender
from open_mythos.nn.tally import Tally
from open_mythos.shapes import CacheEntry, Mask, Positions, Rows, Steps, Tokens

DOCUMENTS_AND_CACHE = (
    "a cache does not remember which document a token belongs to; give each document a row or a cache of its "
    "own, and leave documents out"
)


class Sight(NamedTuple):
    """What queries may look at: the lower triangle (`causal`), `mask`, or with neither everything."""

    causal: bool = False
    mask: Mask | None = None


class Columns(NamedTuple):
    """The tokens that may be looked at, where only some of them ask."""

    positions: Positions
    documents: Int[Tensor, "B S"] | None


@dataclass(frozen=True)
class Context:
    positions: Positions
    start: int | None = None  # every row holds positions start, start + 1, ...
    end: int = 0  # no position reaches it
    tokens: Tokens | None = None
    documents: Int[Tensor, "B T"] | None = None
    mask: Mask | None = None
    cache: Cache | None = None
    rows: Rows | None = None
    tally: Tally | None = None
    entered: Int[Tensor, ""] | None = None  # how many tokens went into the loop, for means of the tally
    progress: Float[Tensor, ""] | None = None  # how much of training is done, 0 to 1; none outside of it
    lender: Lender | None = None  # has the layers' keys and values, where the steps of a loop share them
    columns: Columns | None = None
    place: Place = Place()
    step: Steps | None = None
    memo: dict[object, Tensor] = field(default_factory=dict)
    casts: dict[object, Tensor] = field(default_factory=dict)

    @classmethod
    def counting(cls, tokens: Tokens, start: int = 0, cache: Cache | None = None) -> "Context":
        """Every row holds positions start, start + 1, ..."""
        end = start + tokens.shape[1]
        positions = torch.arange(start, end, device=tokens.device).expand(tokens.shape)
        return cls(positions, start, end, tokens=tokens, cache=cache)

    @classmethod
    def ragged(
        cls, tokens: Tokens, positions: Positions, cache: Cache | None = None, end: int | None = None
    ) -> "Context":
        """Each row has positions of its own, below zero for padding. `end` saves asking the device."""
        end = int(positions.max()) + 1 if end is None else end
        return cls(positions, None, end, tokens=tokens, cache=cache)

    @classmethod
    def padded(cls, tokens: Tokens, real: Int[Tensor, "B T"], cache: Cache | None = None) -> "Context":
        """From a mask that is 1 on tokens and 0 on padding, on either side."""
        positions = torch.where(real.bool(), real.long().cumsum(1) - 1, -1)
        return cls.ragged(tokens, positions, cache)

    @property
    def span(self) -> Span:
        return Span(self.positions, self.start, self.end, self.rows)

    def but(self, **changes: Any) -> "Context":
        """The same but for these parts. Made for every layer of every step, so the rest is not looked at."""
        if torch.compiler.is_compiling():  # it follows only this
            return replace(self, **changes)
        new = object.__new__(Context)
        new.__dict__.update(self.__dict__, **changes)
        return new

    def at(self, stage: str, layer: int) -> "Context":
        return self.but(place=Place(stage, layer, *self.place[2:]))

    def with_tally(self, tally: Tally) -> "Context":
        return self.but(tally=tally)

    def turn(self, step: Steps, host: Sequence[int]) -> "Context":
        """The context of one step. A cache wants to know the step on the host; layers want a tensor,
        so that a compiled step serves every depth."""
        if self.cache is None:
            return self.but(step=step)
        known = host[0] if len(set(host)) == 1 else tuple(host)
        return self.but(step=step, place=Place(step=known))

    def take(self, rows: Tensor, length: int | None = None) -> "Context":
        """Only these rows of the batch, and only their first `length` tokens."""
        t = slice(None, length)
        cut = 0 if length is None else self.positions.shape[1] - length
        owners = self.rows if self.rows is not None else torch.arange(len(self.positions), device=rows.device)
        return self.but(
            positions=self.positions[rows, t],
            end=self.end - cut if self.start is not None else self.end,
            tokens=None if self.tokens is None else self.tokens[rows, t],
            documents=None if self.documents is None else self.documents[rows, t],
            mask=self._cut_mask(rows, length),
            rows=None if self.cache is None else owners[rows],
            memo={},
        )

    def _cut_mask(self, rows: Tensor, length: int | None) -> Mask | None:
        if self.mask is None:
            return None
        mask = self.mask if len(self.mask) != len(self.positions) else self.mask[rows]
        if length is None:
            return mask
        # What is looked at ends with the tokens that look, or else where the cache's longest row does.
        cut = mask.shape[-2] - length if self._whole or self.start is not None else 0
        return mask[:, :, :length, : mask.shape[-1] - cut]

    def extend(self, new: CacheEntry, part: int = 0) -> CacheEntry:
        """Remember `new` (B ... T W) and return all that is held there (B ... S W)."""
        if self.cache is None:
            return new
        return self.cache.extend(Place(*self.place[:3], part), new, self.span)

    @property
    def fresh(self) -> bool:
        """The layer's own keys and values are all there are to look at, so there is nothing to fetch."""
        return not isinstance(self.cache, Lender) and self._whole

    @property
    def _whole(self) -> bool:
        """Nothing came before this call's own tokens, and all of them ask."""
        cache = self.cache.behind if isinstance(self.cache, Lender) else self.cache
        return self.columns is None and (cache is None or self.start == 0)

    def borrowing(self) -> "Context":
        """For layers that attend with the keys and values of the loop's first step, where it lends them."""
        return self if self.lender is None else self.but(cache=self.lender)

    def once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """`make()` the first time in this call, its result ever after."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def kept(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, which depends on nothing but `key`: worked out once for all calls without gradient that
        use the same cache, or else once per call.

        Kept apart for calls with and without gradient: what is made without has no way back.
        """
        grad, book = torch.is_grad_enabled(), self.casts
        if isinstance(self.cache, KVCache) and not grad and not torch.compiler.is_compiling():
            book = self.cache.kept
        if (key, grad) not in book:
            book[key, grad] = make()
        return book[key, grad]

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`, converted once and not once per step."""
        if weight.dtype == dtype:
            return weight
        if isinstance(self.cache, Slots):  # for a compiler, which converts what it reads as it reads it
            return weight.to(dtype)
        return self.kept((weight, _version(weight), dtype), lambda: weight.to(dtype))

    def fetched(
        self, weight: Tensor, dtype: torch.dtype, fetch: Callable[[Tensor, torch.dtype], Tensor]
    ) -> Tensor:
        """`fetch(weight, dtype)`, once per call and always with a way back: processes that communicate do it
        equally often, whether or not some of their steps go without gradient."""
        key = id(weight), dtype
        if key not in self.casts:
            with torch.enable_grad():
                self.casts[key] = fetch(weight, dtype)
        return self.casts[key]

    def sight(self, attention: Literal["causal", "full"] = "causal") -> Sight:
        """What this call's queries may look at, among the columns that `extend` returned."""
        sight = self._ordinary(attention)
        if self.fresh or not isinstance(self.cache, KVCache):
            return sight
        gaps = self.cache.missing(self.place, self.span)
        if gaps is None:
            return sight
        there = ~gaps[:, None, None].expand(-1, -1, self.positions.shape[1], -1)
        return Sight(mask=there if sight.mask is None else there & sight.mask)

    def _ordinary(self, attention: Literal["causal", "full"]) -> Sight:
        plain = self.mask is None and self.documents is None
        if plain and self.start is not None:
            if attention == "full" or (self.positions.shape[1] == 1 and not self._whole):
                return Sight()
            if self._whole:
                return Sight(causal=True)
        return Sight(mask=self.once(("sight", attention), lambda: self._mask(attention)))

    def _mask(self, attention: str) -> Mask:
        ask = self.positions[:, :, None]
        there = self.columns or Columns(self.positions, self.documents)
        if self._whole or self.columns is not None:
            columns = there.positions[:, None, :]
            visible = (columns >= 0) & ((columns <= ask) if attention == "causal" else (ask >= 0))
        else:
            if self.documents is not None:
                raise ValueError(DOCUMENTS_AND_CACHE)
            columns = torch.arange(self.end, device=ask.device)
            visible = (columns <= ask.clamp_min(0)).expand(len(ask), -1, -1)
        if self._whole:  # Padding looks at itself: of no columns not every kernel has a softmax.
            visible = visible | torch.eye(ask.shape[1], dtype=torch.bool, device=ask.device)
        if self.documents is not None and there.documents is not None:
            visible = visible & (self.documents[:, :, None] == there.documents[:, None, :])
        visible = visible[:, None]
        visible = visible if self.mask is None else visible & self.mask
        return visible if self.columns is None else visible | (ask < 0)[:, None]


def _version(weight: Tensor) -> int:
    """Changes whenever the weight does, where that is counted."""
    return 0 if torch.compiler.is_compiling() or weight.is_inference() else weight._version
