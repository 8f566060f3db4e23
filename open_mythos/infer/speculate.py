"""Self-speculative decoding: the model drafts at few steps of its loop and checks at many.

    draft     a handful of tokens, one after the other, each after `draft_loops` steps
    verify    all of them in one call of `loops` steps; keep those up to the first that it disagrees with, and
              put its own choice in that one's place

Geiping et al. 2025 (arXiv 2502.05171), section 5.4. Drafts share the cache: what they wrote is overwritten
when they are verified. At threshold one the text is that of greedy generation at full depth; below it, a
draft passes whose probability reaches that share of the largest. Law: tests/laws/test_speculate.py.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.cache import KVCache
from open_mythos.nn.context import Context
from open_mythos.nn.mode import evaluating


class Speculated(NamedTuple):
    """The new tokens, and how the drafts fared: how many, how many were kept, and calls to verify them."""

    tokens: list[int]
    drafted: int = 0
    kept: int = 0
    calls: int = 0


@torch.inference_mode()
def speculate(
    model: LoopedLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    draft_loops: int,
    loops: int | None = None,
    lookahead: int = 8,
    threshold: float = 1.0,
    eos: Collection[int] = (),
) -> Speculated:
    """Continue one prompt greedily. `loops` is the mean of training unless said; `eos` ends the text.

    Raises `ValueError` if there is no prompt or no loop, a number is out of range, or the text would not fit
    the context.
    """
    ends, loops = frozenset(eos), model.steps if loops is None else loops
    _check(model, prompt, max_new_tokens, min(draft_loops, loops), lookahead, threshold)
    read = _Reader(model, KVCache(1, len(prompt) + max_new_tokens - 1))  # nobody reads the last one
    drafted = kept = calls = 0
    with evaluating(model):
        new = [int(read(prompt, 0, loops)[-1].argmax())]
        while len(new) < max_new_tokens and not ends.intersection(new):
            at = len(prompt) + len(new) - 1  # of the newest token, which nobody has read yet
            drafts = _draft(read, new[-1], at, draft_loops, min(lookahead, max_new_tokens - len(new)))
            passed = _verify(read([new[-1], *drafts[:-1]], at, loops), drafts, threshold)
            agreed = len(passed) - (passed != drafts)
            drafted, kept, calls = drafted + len(drafts), kept + agreed, calls + 1
            new += passed
    stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
    return Speculated(new[:stop], drafted, kept, calls)


class _Reader(NamedTuple):
    """Reads tokens into the cache and says what comes after each of them."""

    model: LoopedLM
    cache: KVCache

    def __call__(self, tokens: Sequence[int], start: int, loops: int) -> Float[Tensor, "T V"]:
        line = torch.tensor([list(tokens)], device=self.model.embed.weight.device)
        logits: Tensor = self.model(line, Plan(loops), ctx=Context.counting(line, start, self.cache))
        return logits[0]


def _draft(read: _Reader, newest: int, at: int, loops: int, count: int) -> list[int]:
    drafts: list[int] = []
    for i in range(count):
        drafts.append(int(read([(newest, *drafts)[-1]], at + i, loops)[-1].argmax()))
    return drafts


def _verify(logits: Float[Tensor, "T V"], drafts: list[int], threshold: float) -> list[int]:
    """The drafts that pass, then, where one did not, the choice at full depth."""
    best = logits.argmax(-1).tolist()
    p = logits.float().softmax(-1)
    likely = p[range(len(drafts)), drafts] >= threshold * p.amax(-1)
    for i, draft in enumerate(drafts):
        if draft != best[i] and (threshold >= 1 or not likely[i]):
            return [*drafts[:i], best[i]]
    return drafts


def _check(
    model: LoopedLM, prompt: Sequence[int], budget: int, fewest: int, lookahead: int, threshold: float
) -> None:
    if model.loop is None:
        raise ValueError("a model without a loop has no shallower self to draft with; use generate")
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token to continue")
    if min(budget, fewest, lookahead) < 1 or not 0 < threshold <= 1:
        raise ValueError(
            f"max_new_tokens, loops and lookahead are at least 1 and the threshold is in (0, 1], got "
            f"{budget}, {fewest}, {lookahead} and {threshold}"
        )
    if len(prompt) + budget - 1 > model.config.context:  # the last new token is not read again
        raise ValueError(
            f"{len(prompt)} tokens and {budget} new ones do not fit the context of {model.config.context}"
        )
