"""Sharing a source out: who reads which rows, epoch after epoch, each row exactly once.

A source comes in parts: files, row groups of parquet files, shards of a Hub dataset. If the parts divide
evenly each reader takes whole parts; otherwise all readers go through all parts and each keeps every n-th
row. Parts that have to be downloaded are taken whole wherever there is one for each reader, even if some get
one more. In each epoch the parts come in an order drawn from (seed, epoch).
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from open_mythos.data.text import Hub, Source


@runtime_checkable
class Parts(Protocol):
    """A source that can be read part by part, each from any row on."""

    def parts(self) -> list[Any]: ...

    def rows(self, part: Any, start: int = 0) -> Iterator[tuple[int, str]]: ...


class HubParts:
    """The shards of a streamed dataset; finer ones (row groups of parquet files) if they do not divide
    evenly.

    Shards are read one at a time and ordered here: the shuffling of `datasets` 5.2 reads several in threads,
    which may wait for each other for ever, and its state does not resume.
    """

    def __init__(self, source: Hub, of: int):
        dataset = source.dataset()
        uneven = dataset.num_shards % of and hasattr(dataset, "reshard")
        self.dataset = dataset.reshard() if uneven else dataset
        self.text_field = source.text_field

    def parts(self) -> list[int]:
        return list(range(self.dataset.num_shards))

    def rows(self, part: int, start: int = 0) -> Iterator[tuple[int, str]]:
        shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=part)
        rows = enumerate(shard.skip(start) if start else shard, start)
        return ((row, record[self.text_field]) for row, record in rows if record[self.text_field])


def read_share(source: Source, seed: int, share: int, of: int) -> "Reader":
    """Reader number `share` of `of`.

    Its first `next` raises `ValueError` if there is nothing for it to read.
    """
    if isinstance(source, Hub):
        return Reader(HubParts(source, of), seed, share, of, remote=True)
    return Reader(source, seed, share, of)


class Reader:
    """Documents without end. State:

    epoch, part (in the epoch's order), row within it, all of the last one read.
    """

    def __init__(self, source: Parts, seed: int, share: int, of: int, remote: bool = False):
        self.source, self.seed, self.share, self.of = source, seed, share, of
        self.parts = source.parts()
        self.whole = len(self.parts) % of == 0 or (remote and len(self.parts) >= of)
        self.epoch, self.part, self.row = 0, 0, 0
        self._rows = self._documents()

    def __next__(self) -> str:
        return next(self._rows)

    def __iter__(self) -> "Reader":
        return self

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "part": self.part, "row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.part, self.row = state["epoch"], state["part"], state["row"]
        self._rows = self._documents()

    def _documents(self) -> Iterator[str]:
        read_something = self.part > 0 or self.row > 0
        while True:
            order = self._order()
            while self.part < len(order):
                for text in self._documents_of(order[self.part]):
                    read_something = True
                    yield text
                self.part, self.row = self.part + 1, 0
            if not read_something:
                raise ValueError(
                    f"the corpus is too short: it has no document for reader {self.share} of {self.of}"
                )
            self.epoch, self.part = self.epoch + 1, 0

    def _documents_of(self, part: Any) -> Iterator[str]:
        for row, text in self.source.rows(part, self.row):
            self.row = row + 1
            if self.whole or (row + self.part) % self.of == self.share:
                yield text

    def _order(self) -> list[Any]:
        words = np.random.SeedSequence((self.seed, self.epoch))
        order = np.random.Generator(np.random.Philox(words)).permutation(len(self.parts))
        mine = order[self.share :: self.of] if self.whole else order
        return [self.parts[i] for i in mine]
