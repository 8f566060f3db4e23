"""Training straight from a source, without preparing it: read, tokenize, pack, shuffle, on the fly.

    documents of this reader -> tokens -> window of rows -> shuffled -> batches

Shards of the source (files, parquet row groups) are shuffled anew each epoch and shared out over ranks and
workers (`shares.py`); rows are shuffled inside a window, since a stream has no random access. The state is
where the window began and how much of it is consumed: on resume the window is read again, so nothing is lost
and nothing repeats. (The shuffle buffer of `datasets` is not in its state: 29 of 1000 rows lost and 4
repeated.) Law: a stream stopped anywhere and resumed gives the very same batches
(tests/unit/data/test_stream.py).
"""

from collections.abc import Iterator

import numpy as np

from open_mythos.config import Config
from open_mythos.data.batch import Batch, Loader, next_token_batch
from open_mythos.data.prefetch import InTurn, Prefetch
from open_mythos.data.rows import check_same, check_share, dtype_for
from open_mythos.data.shares import Reader, read_share
from open_mythos.data.text import Files, Hub, Stdlib, is_held_out
from open_mythos.data.tokenizer import Tokenizer

AT_ONCE = 16  # documents tokenized together


class Stream(Config):
    """Batches of `batch` rows of `length` tokens per rank, from a source read for ever.

    `window` rows are shuffled together; documents of the `held_out` fraction are passed over; `documents`
    marks document boundaries; each of `workers` threads reads its own share of the rank's and has `ahead`
    batches ready.
    """

    source: Stdlib | Files | Hub = Stdlib()
    length: int = 1024
    batch: int = 8
    window: int = 1024
    held_out: float = 0.0
    documents: bool = False
    seed: int = 0
    workers: int = 1
    ahead: int = 4

    def __post_init__(self) -> None:
        for name in ("length", "batch", "window", "workers", "ahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stream.{name} should be at least 1, got {getattr(self, name)}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"Stream.held_out should lie in [0, 1), got {self.held_out}")

    def build(self, tokenizer: Tokenizer, rank: int = 0, world: int = 1) -> Loader:
        """The loader of one rank; its state is that rank's own and needs the same `world` and `workers`."""
        check_share(self.batch, rank, world)
        shares = [(rank * self.workers + worker, world * self.workers) for worker in range(self.workers)]
        loaders = [StreamLoader(self, tokenizer, share, of) for share, of in shares]
        return InTurn([Prefetch(loader, self.ahead) for loader in loaders])

    def held_out_documents(self, limit: int) -> Iterator[str]:
        """The first `limit` held-out documents of the source, for evaluation."""
        found = (text for text in self.source.documents() if is_held_out(text, self.held_out))
        return (text for text, _ in zip(found, range(limit), strict=False))


class StreamLoader:
    """Share number `share` of `of` equal shares of the stream, in the calling thread."""

    def __init__(self, config: Stream, tokenizer: Tokenizer, share: int = 0, of: int = 1):
        self.config, self.tokenizer, self.share, self.of = config, tokenizer, share, of
        self.reader: Reader = read_share(config.source, config.seed, share, of)
        self.carry = np.zeros(0, dtype_for(tokenizer.vocab_size))
        self.number = -1  # of the window at hand; each has its own order
        self.taken = 0
        self.rows = np.zeros((0, config.length + 1), self.carry.dtype)
        self.start = self._place()

    def __iter__(self) -> "StreamLoader":
        return self

    def __next__(self) -> Batch:
        rows = np.stack([self._next_row() for _ in range(self.config.batch)])
        return next_token_batch(rows, self.tokenizer.eos if self.config.documents else None)

    def state_dict(self) -> dict[str, object]:
        return {"start": self.start, "taken": self.taken} | self._identity()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on after `state`. Raises `ValueError` if it is of another share, world size or stream."""
        ours = self._identity()
        if state.get("of") != self.of:
            raise ValueError(
                f"a stream read by {state.get('of')} readers (ranks x workers) cannot go on with {self.of}: "
                "rows "
                "would be lost or repeated; resume with as many, or prepare the data (`mythos data prepare`)"
            )
        check_same(ours, state)
        start = state["start"]
        assert isinstance(start, dict)
        self.reader.load_state_dict(start["reader"])
        self.carry = np.array(start["carry"], self.carry.dtype)
        self.number, self.rows = start["number"], self.rows[:0]
        self.start, self.taken = start, 0
        if taken := int(str(state["taken"])):
            self._fill_window()
            self.taken = taken

    def _place(self) -> dict[str, object]:
        return {"reader": self.reader.state_dict(), "carry": self.carry.tolist(), "number": self.number}

    def _identity(self) -> dict[str, object]:
        config = self.config
        same = {
            "length": config.length,
            "window": config.window,
            "seed": config.seed,
            "held_out": config.held_out,
        }
        return {"share": self.share, "of": self.of, "source": config.source.to_dict(), **same}

    def _next_row(self) -> np.ndarray:
        if self.taken == len(self.rows):
            self._fill_window()
        self.taken += 1
        row: np.ndarray = self.rows[self.taken - 1]
        return row

    def _fill_window(self) -> None:
        """Read on until there are `window` rows, and shuffle them; neighbours share one token."""
        self.start = self._place()
        length, count = self.config.length, self.config.window
        pieces, size = [self.carry], len(self.carry)
        while size < count * length + 1:
            pieces += self._read_some()
            size = sum(map(len, pieces))
        ids = np.concatenate(pieces)
        self.carry = ids[count * length :]
        self.number, self.taken = self.number + 1, 0
        order = _order(self.config.seed, self.share, self.number, count)
        self.rows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length][:count][order]

    def _read_some(self) -> list[np.ndarray]:
        texts: list[str] = []
        while len(texts) < AT_ONCE:
            text = next(self.reader)
            if not is_held_out(text, self.config.held_out):
                texts.append(text)
        found = self.tokenizer.encode_batch(texts)
        return [np.array([*ids, self.tokenizer.eos], self.carry.dtype) for ids in found]


def _order(seed: int, share: int, number: int, count: int) -> np.ndarray:
    words = np.random.SeedSequence((seed, share, number))
    return np.random.Generator(np.random.Philox(words)).permutation(count)
