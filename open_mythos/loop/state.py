"""Where each token stands in the loop."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from open_mythos.shapes import Hidden, PerToken


class State(NamedTuple):
    """What flows from step to step. `left` is the halting mass not yet spent: a token with none is done."""

    e: Hidden  # the encoded input, injected at every step
    h: Hidden  # the state of the loop
    answer: Hidden  # what it would hand to the coda now
    left: PerToken
    taken: Int[Tensor, "B T"]  # steps until the token was done, or so far
    past: Float[Tensor, "B T N D"]  # what it remembers of earlier steps; mostly nothing, N = 0
    first: Float[Tensor, "B T W"]  # keys and values of its first step, where all steps share them, else W = 0

    @classmethod
    def begin(cls, e: Hidden, h: Hidden) -> "State":
        left = torch.ones(h.shape[:-1], dtype=torch.float32, device=h.device)
        # The answer is a copy, or a compiled step sees two names for one tensor on the first step only.
        return cls(
            e,
            h,
            h.clone(),
            left,
            torch.zeros_like(left, dtype=torch.int32),
            h.new_zeros(*h.shape[:2], 0, h.shape[2]),
            h.new_zeros(*h.shape[:2], 0),
        )

    def but(self, **changes: Tensor) -> "State":
        """The same but for these parts. (Out of the compiler of torch 2.11, `_replace` comes back empty.)"""
        return State(**{**self._asdict(), **changes})

    def take(self, rows: Tensor, length: int | None = None) -> "State":
        """Only these rows of the batch, and only their first `length` tokens."""
        return State(*(part[rows, :length] for part in self))

    @classmethod
    def join(cls, states: Sequence["State"]) -> "State":
        """The rows of `states`, one below the other."""
        return cls(*(torch.cat(parts) for parts in zip(*states, strict=True)))
