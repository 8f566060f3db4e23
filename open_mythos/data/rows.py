"""Tokens as rows, and the loader that reads them in a shuffled order.

`Tokens` is a long run of ids in one or many arrays, in memory or memory-mapped. Row i of length T is
`tokens[i*T : i*T + T + 1]`: neighbours share one token, so every token but the first is a target exactly
once. `RowLoader` reads each row once per epoch, over all ranks, in an order that follows from (seed, epoch)
alone. Law: any interleaving of ranks, stops and changes of rank count reads the same samples
(tests/unit/data/test_rows.py).
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Integer

from open_mythos.data.batch import IGNORED, Batch, next_token_batch
from open_mythos.data.permute import permuted
from open_mythos.data.tokenizer import Tokenizer


def dtype_for(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """The smallest type in which every id of a vocabulary fits."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class Tokens:
    """A long run of token ids; every document ends in `eos`.

    `text_bytes` counts the UTF-8 it was made from.
    """

    def __init__(self, arrays: Sequence[np.ndarray], eos: int, text_bytes: int = 0):
        self.arrays = list(arrays)
        self.eos = eos
        self.text_bytes = text_bytes
        self._starts = np.cumsum([0, *(len(array) for array in self.arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> Integer[np.ndarray, "n"]:
        """`count` ids from `start` on, across array boundaries."""
        assert 0 <= start <= start + count <= len(self)
        which = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces, at = [], start - int(self._starts[which])
        while count > 0:
            pieces.append(self.arrays[which][at : at + count])
            count -= len(pieces[-1])
            which, at = which + 1, 0
        if len({piece.dtype for piece in pieces}) > 1:  # numpy takes float64 for some of two kinds
            pieces = [piece.astype(np.int64) for piece in pieces]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def count_rows(self, length: int) -> int:
        """How many rows of `length` inputs there are; a remainder shorter than that is left over."""
        return max(0, len(self) - 1) // length

    def rows(self, indices: Iterable[int], length: int) -> Integer[np.ndarray, "B L"]:
        """Rows by number, `length` + 1 ids each."""
        return np.stack([self.read(i * length, length + 1) for i in indices])


def tokenize(documents: Iterable[str], tokenizer: Tokenizer, at_once: int = 64) -> Tokens:
    """Documents as one run of tokens in memory, eos after each."""
    dtype, arrays, text_bytes = dtype_for(tokenizer.vocab_size), [], 0
    for texts in groups(documents, at_once):
        text_bytes += sum(len(text.encode("utf-8", errors="replace")) for text in texts)
        arrays += [np.array([*ids, tokenizer.eos], dtype) for ids in tokenizer.encode_batch(texts)]
    return Tokens([np.concatenate(arrays)] if arrays else [], tokenizer.eos, text_bytes)


def groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` items in order; the last may be shorter."""
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class RowLoader:
    """Shuffled batches without end: rank r of `world` gets its `batch` rows of every `batch * world` samples.

    The state is how many samples all ranks together have read, so it is the same on every rank, and a run may
    go on with another number of ranks. `documents` marks document boundaries in the batches.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        length: int,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        documents: bool = False,
    ):
        """Raises `ValueError` for impossible sizes, and for a corpus shorter than one row."""
        check_share(batch, rank, world)
        if length < 1:
            raise ValueError(f"the length of a row should be at least 1 token, got {length}")
        self.tokens, self.length, self.batch, self.seed = tokens, length, batch, seed
        self.rank, self.world, self.documents = rank, world, documents
        self.count = tokens.count_rows(length)
        self.seen = 0
        if self.count < 1:
            raise ValueError(
                f"the corpus is too short: {len(tokens)} tokens make no row of {length} (+1 to predict); "
                "give more text or a smaller length"
            )

    def __iter__(self) -> "RowLoader":
        return self

    def __next__(self) -> Batch:
        first = self.seen + self.rank * self.batch
        rows = self.tokens.rows(self.order(first, self.batch).tolist(), self.length)
        self.seen += self.batch * self.world
        return next_token_batch(rows, self.tokens.eos if self.documents else None)

    def order(self, first: int, count: int) -> Integer[np.ndarray, "n"]:
        """The rows that samples `first`.. are, counted over all epochs."""
        samples = np.arange(first, first + count)
        epochs, places = samples // self.count, samples % self.count
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            rows[inside] = permuted(places[inside], self.count, (self.seed, int(epoch)))
        return rows

    def state_dict(self) -> dict[str, object]:
        return {"seen": self.seen} | self._identity()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on after `state`. Raises `ValueError` if it is of other rows or another seed."""
        check_same(self._identity(), state)
        self.seen = int(str(state["seen"]))

    def _identity(self) -> dict[str, object]:
        return {"rows": self.count, "length": self.length, "tokens": len(self.tokens), "seed": self.seed}


def in_order(
    tokens: Tokens, length: int, batch: int, limit: int | None = None, stride: int | None = None
) -> Iterator[Batch]:
    """Rows from first to last, for evaluation: at most `limit` batches, the last of which may be smaller.

    A row begins `stride` tokens after the one before it, by default where that one ends. What rows share is
    asked once, of the row in which more stands before it: all but the first tokens are then predicted from
    at least length - stride others.
    """
    stride = stride or length
    starts = range(0, len(tokens) - length, stride)
    if not starts:
        raise ValueError(f"the held-out text is too short: {len(tokens)} tokens make no row of {length}")
    for number, first in enumerate(range(0, len(starts), batch)):
        if limit is not None and number >= limit:
            return
        rows = np.stack([tokens.read(start, length + 1) for start in starts[first : first + batch]])
        part = next_token_batch(rows)
        part.targets[0 if first else 1 :, : length - stride] = IGNORED
        yield part


def check_share(batch: int, rank: int, world: int) -> None:
    """Raises `ValueError` for a batch or rank that cannot be."""
    if batch < 1:
        raise ValueError(f"a batch needs at least 1 row, got {batch}")
    if not 0 <= rank < world:
        raise ValueError(f"the rank should lie in 0..{world - 1} for a world of {world}, got {rank}")


def check_same(ours: dict[str, object], state: dict[str, object]) -> None:
    """Raises `ValueError` where a saved state belongs to other data."""
    for name, value in ours.items():
        if state.get(name) != value:
            raise ValueError(
                f"the saved data state has {name} {state.get(name)!r} where this run has {value!r}"
            )
