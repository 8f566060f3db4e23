"""The original's cache, a plain dict that the caller holds, over buffers that double when they are full.

    {"prelude_0": {"k": B S G K, "v": B S G K}, "recurrent_loop_0": ..., "coda_0": ...}      GQA
    {"prelude_0": {"c_kv": B S R, "k_rope": B S 1 K}, ...}                                   MLA

What the dict shows is the truth: entries may be cloned, cut or reordered, and a shallow copy of the dict
goes its own way. Only when an entry still shows all that its buffer holds is the buffer written further in
place. A loop that earlier tokens never ran sees them as the loop before it did. Law: a cache changes nothing,
wherever the prompt is cut (tests/unit/classic/test_cache.py).
"""

from collections.abc import Callable, Mapping, MutableMapping
from typing import final

import torch
from torch import Tensor

from open_mythos.nn.cache import Place, Span
from open_mythos.shapes import CacheEntry

Entries = MutableMapping[str, dict[str, Tensor]]


@final
class DictCache:
    """A cache of the core (`nn.cache.Cache`) that lives in the caller's dict.

    `kv_rank` is the width of MLA's latent, `key` the name of the only entry when a layer runs by itself.
    """

    exact = True

    def __init__(self, entries: Entries, kv_rank: int, key: str | None = None) -> None:
        self.entries, self.kv_rank = entries, kv_rank
        self._name: Callable[[Place], str] = name_of if key is None else lambda place: key

    def length(self, key: str | None = None) -> int:
        """Tokens remembered under `key`, or by the longest entry."""
        entries = self.entries.values() if key is None else filter(None, [self.entries.get(key)])
        return max((tensor.shape[1] for entry in entries for tensor in entry.values()), default=0)

    def extend(self, place: Place, new: CacheEntry, span: Span) -> CacheEntry:
        key, past = self._name(place), span.end - new.shape[-2]
        entry = self.entries.get(key, {})
        held = entry.reusable(place.part, past, new) if isinstance(entry, Entry) else None
        if held is None:
            held = _Held.of(self._past(place, entry, past, new), span.end, self.kv_rank)
        if torch.is_grad_enabled():  # a graph may keep what it was given, so nothing is written in place
            whole = torch.cat([held.shown.to(new.dtype), new], dim=-2)
            held = _Held(whole.detach(), span.end, self.kv_rank)
        else:
            whole = held.append(new)
        self.entries[key] = Entry.extended(entry, place.part, held)
        return whole

    def settle(self, layers: int, taken: int, span: Span) -> None:
        """Deeper loops are filled in when they are first asked for."""

    def _past(self, place: Place, entry: Mapping[str, Tensor], past: int, like: Tensor) -> Tensor:
        """The first `past` tokens; those that never ran this loop as the loop before saw them."""
        shown = _shown(entry, place.part, like)
        have = shown.shape[-2]
        if have and len(shown) != len(like):
            raise ValueError(f"the cache is for a batch of {len(shown)} rows, got {len(like)}")
        if have >= past:
            return shown[..., :past, :]
        step = place.step
        if place.stage != "loop" or not isinstance(step, int) or step == 0:
            raise ValueError(
                f"the cache holds {have} tokens for {self._name(place)!r} where others hold {past}"
            )
        before = _shown(self.entries[self._name(place._replace(step=step - 1))], place.part, like)
        return torch.cat([shown.to(before.dtype), before[..., have:past, :]], dim=-2)


@final
class Entry(dict[str, Tensor]):
    """What one layer remembers, by the original's names, and the buffers that it shows."""

    held: "dict[int, _Held]"

    @classmethod
    def extended(cls, before: Mapping[str, Tensor], part: int, held: "_Held") -> "Entry":
        entry = cls({**before, **held.views(part)})
        entry.held = {**getattr(before, "held", {}), part: held}
        return entry

    def reusable(self, part: int, past: int, like: Tensor) -> "_Held | None":
        """The buffer, if it may be written further: the entry shows all of it, untouched."""
        held = self.held.get(part)
        if held is None or held.used != past or len(held.data) != len(like):
            return None
        untouched = all(_same(self[name], view) for name, view in held.views(part).items())
        return held if untouched and held.data.is_inference() == like.is_inference() else None


@final
class _Held:
    """A buffer (B ... capacity W), of which `used` tokens are written."""

    def __init__(self, data: Tensor, used: int, kv_rank: int) -> None:
        self.data, self.used, self.kv_rank = data, used, kv_rank

    @classmethod
    def of(cls, shown: Tensor, wanted: int, kv_rank: int) -> "_Held":
        """A buffer of its own, holding `shown`, with as much room again as is wanted now."""
        return cls(_roomier(shown, 2 * wanted), shown.shape[-2], kv_rank)

    @property
    def shown(self) -> Tensor:
        return self.data[..., : self.used, :]

    def views(self, part: int) -> dict[str, Tensor]:
        """By the original's names, tokens on the second axis."""
        if self.data.ndim == 4:
            return {"kv"[part]: self.shown.transpose(1, 2)}  # B S G K
        latent, k_rope = self.shown[..., : self.kv_rank], self.shown[..., self.kv_rank :]
        return {"c_kv": latent, "k_rope": k_rope[:, :, None]}

    def append(self, new: Tensor) -> Tensor:
        end = self.used + new.shape[-2]
        if end > self.data.shape[-2]:
            self.data = _roomier(self.shown, 2 * end)
        self.data[..., self.used : end, :] = new.to(self.data.dtype)
        self.used = end
        return self.shown


def name_of(place: Place) -> str:
    """The original's name for a place: prelude_0, recurrent_loop_3, coda_0."""
    return f"recurrent_loop_{place.step}" if place.stage == "loop" else f"{place.stage}_{place.layer}"


def _shown(entry: Mapping[str, Tensor], part: int, like: Tensor) -> Tensor:
    """What the entry shows of this part, laid out as the core wants it: B ... S W."""
    names = ("kv"[part],) if like.ndim == 4 else ("c_kv", "k_rope")
    if not all(name in entry for name in names):
        return like.new_empty(*like.shape[:-2], 0, like.shape[-1])
    if like.ndim == 4:
        return entry[names[0]].transpose(1, 2)
    return torch.cat([entry["c_kv"], entry["k_rope"][:, :, 0]], dim=-1)


def _roomier(held: Tensor, capacity: int) -> Tensor:
    room = held.new_empty(*held.shape[:-2], capacity, held.shape[-1])
    room[..., : held.shape[-2], :] = held
    return room


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both look at the same numbers in memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
