"""What training and evaluation are handed: token ids and what should follow each of them.

    tokens   t_0  t_1  ...  t_{T-1}
    targets  t_1  t_2  ...  t_T          (-100 where nothing is asked)

With `documents`, each position carries the number of its document in the row, so attention can stay inside
documents; the first token of a document is then nobody's target, since its predecessor may not see it coming.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

IGNORED = -100


class Batch(NamedTuple):
    """Ids, what follows them (-100: not asked), and the number of each position's document in its row."""

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    documents: Int[Tensor, "B T"] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch elsewhere; pinned memory makes the copy asynchronous."""
        documents = None if self.documents is None else self.documents.to(device, non_blocking=True)
        tokens, targets = (part.to(device, non_blocking=True) for part in (self.tokens, self.targets))
        return Batch(tokens, targets, documents)


@runtime_checkable
class Loader(Protocol):
    """Batches without end, and a state of plain JSON data from which exactly the following batches come."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state: dict[str, object]) -> None: ...


def next_token_batch(rows: Integer[np.ndarray, "B L"], eos: int | None = None) -> Batch:
    """Rows of T+1 ids as T inputs and T targets. Given `eos`, documents are told apart at it.

    Raises `ValueError` for rows shorter than two tokens.
    """
    if rows.shape[1] < 2:
        raise ValueError(
            f"a row needs at least 2 tokens, one to read and one to predict; got {rows.shape[1]}"
        )
    whole = torch.from_numpy(rows.astype(np.int64))
    tokens, targets = whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
    if eos is None:
        return Batch(tokens, targets)
    ends = tokens == eos
    documents = ends.cumsum(1) - ends.long()  # an end belongs to the document it ends
    return Batch(tokens, targets.masked_fill(ends, IGNORED), documents)
