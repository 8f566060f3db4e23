"""When to stop looking, judged from outside: rules that need no training.

After every step a rule says for which tokens this was enough. Rules on the state cost nothing; rules on
what would be read out run the coda and the head at every check.

    Steps            a prescribed number of steps
    StateChange      |h_n - h_{n-1}| / |h_n| below a threshold          Huginn (arXiv 2502.05171)
    StateTurn        1 - cos(h_n, h_{n-1}) below a threshold            Huginn's code
    ReadoutChange    KL(p_{n-1} || p_n) between successive readouts       Huginn
                     `reverse`: KL(p_n || p_{n-1})                       Kohli et al. 2026 (arXiv 2604.07822)
    PeakChange       the same, after the improbable has been made alike Huginn's code (min-p KL)
    EntropyChange    |H(p_n) - H(p_{n-1})| below a threshold            Huginn's code
    SameToken        the likeliest token stayed the same for so long    Huginn's code
    Confidence       entropy of the readout below a threshold           Popescu et al. 2026 (arXiv 2607.20519)

`measure` says the quantity, `enough` whether it will do. `least` steps are always taken, and the rule is
asked every `every` steps. Where a rule offers `together`, all tokens of a row may be made to leave at once:
when its last one has had enough or, for rules on the state, when they have on average. Huginn's code reads a
prompt so.
"""

from collections.abc import Callable, Sequence
from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.loop.state import State
from open_mythos.nn.precision import at_least_float32
from open_mythos.shapes import Logits, PerToken

Readout = Callable[[State], Logits]
Enough = Bool[Tensor, "B T"]


class Steps(Config):
    steps: int
    least: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        _at_least_one(self, "steps")

    def enough(self, before: State, after: State, readout: Readout, notes: "Notes | None" = None) -> Enough:
        return after.taken >= self.steps


class StateChange(Config):
    threshold: float = 0.03
    least: int = 2
    every: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self)

    def measure(
        self, before: State, after: State, readout: Readout, notes: "Notes | None" = None
    ) -> PerToken:
        dtype = at_least_float32(after.h)
        moved = torch.linalg.vector_norm(after.h - before.h, dim=-1, dtype=dtype)
        change = moved / torch.linalg.vector_norm(after.h, dim=-1, dtype=dtype)
        return _on_average(change, after, self.together)

    def enough(self, before: State, after: State, readout: Readout, notes: "Notes | None" = None) -> Enough:
        return self.measure(before, after, readout, notes) < self.threshold


class StateTurn(Config):
    """Nothing has turned away from a state of zero."""

    threshold: float = 1e-3
    least: int = 2
    every: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self)

    def measure(
        self, before: State, after: State, readout: Readout, notes: "Notes | None" = None
    ) -> PerToken:
        turn = 1 - F.cosine_similarity(after.h.float(), before.h.float(), dim=-1)
        return _on_average(turn, after, self.together)

    def enough(self, before: State, after: State, readout: Readout, notes: "Notes | None" = None) -> Enough:
        return self.measure(before, after, readout, notes) < self.threshold


class ReadoutChange(Config):
    threshold: float = 1e-3
    entropy: float | None = None  # also ask for an entropy below this, in nats (Kohli et al.: 3)
    reverse: bool = False
    least: int = 2
    every: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self)

    def measure(
        self, before: State, after: State, readout: Readout, notes: "Notes | None" = None
    ) -> PerToken:
        """The divergence; infinite where the readout is not sure enough."""
        old, new = _successive(before, after, readout, notes if self.every == 1 else None)
        moved = _divergence(new, old) if self.reverse else _divergence(old, new)
        return moved if self.entropy is None else moved.masked_fill(_entropy(new) >= self.entropy, torch.inf)

    def enough(self, before: State, after: State, readout: Readout, notes: "Notes | None" = None) -> Enough:
        return _as_the_last(
            self.measure(before, after, readout, notes) < self.threshold, after, self.together
        )


class PeakChange(Config):
    """Before they are compared, probabilities below `share` of the largest become 1 / V each."""

    threshold: float = 1e-5
    share: float = 0.1
    least: int = 2
    every: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self)

    def measure(
        self, before: State, after: State, readout: Readout, notes: "Notes | None" = None
    ) -> PerToken:
        old, new = _successive(before, after, readout, notes if self.every == 1 else None)
        return _divergence(self._peaks(old), self._peaks(new))

    def enough(self, before: State, after: State, readout: Readout, notes: "Notes | None" = None) -> Enough:
        return _as_the_last(
            self.measure(before, after, readout, notes) < self.threshold, after, self.together
        )

    def _peaks(self, logs: Logits) -> Logits:
        p = logs.exp()
        p = p.masked_fill(p < self.share * p.amax(-1, keepdim=True), 1 / p.shape[-1])
        return (p / p.sum(-1, keepdim=True)).log()


class EntropyChange(Config):
    threshold: float = 1e-3  # nats
    least: int = 2
    every: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self)

    def measure(
        self, before: State, after: State, readout: Readout, notes: "Notes | None" = None
    ) -> PerToken:
        old, new = _successive(before, after, readout, notes if self.every == 1 else None)
        return (_entropy(new) - _entropy(old)).abs()

    def enough(self, before: State, after: State, readout: Readout, notes: "Notes | None" = None) -> Enough:
        return _as_the_last(
            self.measure(before, after, readout, notes) < self.threshold, after, self.together
        )


class SameToken(Config):
    """`times` checks in a row found the same token as the check before. Has to be asked from the start on."""

    times: int = 5
    least: int = 1
    every: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self, "times")

    def measure(
        self, before: State, after: State, readout: Readout, notes: "Notes | None" = None
    ) -> PerToken:
        if notes is None:
            raise ValueError("SameToken counts over several steps, so whoever asks it must hand it notes")
        top = readout(after).argmax(-1)
        last, count = notes.read("top", torch.full_like(top, -1)), notes.read("count", torch.zeros_like(top))
        assert last is not None
        assert count is not None
        count = torch.where(top == last, count + 1, 0)
        notes.write("top", top)
        notes.write("count", count)
        return count.float()

    def enough(self, before: State, after: State, readout: Readout, notes: "Notes | None" = None) -> Enough:
        return _as_the_last(self.measure(before, after, readout, notes) >= self.times, after, self.together)


class Confidence(Config):
    entropy: float = 0.5  # nats
    least: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        _at_least_one(self)

    def enough(self, before: State, after: State, readout: Readout, notes: "Notes | None" = None) -> Enough:
        return _entropy(readout(after).float().log_softmax(-1)) < self.entropy


@final
class Notes:
    """What a rule wrote down at its last check, for every token of a call, while rows and tokens leave."""

    def __init__(self, rows: int, tokens: int) -> None:
        self.total, self.length = rows, tokens
        self.rows, self.tokens = list(range(rows)), tokens
        self._written: dict[str, Tensor] = {}
        self._of: dict[str, set[int]] = {}  # the rows for which it was

    def of(self, rows: Sequence[int], tokens: int) -> "Notes":
        """From now on of these rows of the call, and their first so many tokens."""
        self.rows, self.tokens = list(rows), tokens
        return self

    def read(self, name: str, default: Tensor | None = None) -> Tensor | None:
        """What was written for these rows; `default` for those of which nothing was, or in place of all."""
        known = [row in self._of.get(name, ()) for row in self.rows]
        if default is None or not any(known):
            return self._written[name][self.rows, : self.tokens] if all(known) else default
        kept = self._written[name][self.rows, : self.tokens]
        there = torch.tensor(known, device=kept.device).view(-1, *[1] * (kept.ndim - 1))
        return torch.where(there, kept, default)

    def write(self, name: str, value: Tensor) -> None:
        if name not in self._written:
            self._written[name] = value.new_zeros(self.total, self.length, *value.shape[2:])
        self._written[name][self.rows, : self.tokens] = value.detach()
        self._of.setdefault(name, set()).update(self.rows)


def _at_least_one(rule: Config, *names: str) -> None:
    for name in ("least", "every", *names):
        if (value := getattr(rule, name)) < 1:
            raise ValueError(f"{type(rule).__name__}.{name} must be at least 1, got {value}")


def _successive(before: State, after: State, readout: Readout, notes: Notes | None) -> tuple[Logits, Logits]:
    """Log-probabilities before and after the step. Read out in this order: a cache keeps the last."""
    old = None if notes is None else notes.read("readout")
    if old is None:
        old = readout(before).float().log_softmax(-1)
    new = readout(after).float().log_softmax(-1)
    if notes is not None:
        notes.write("readout", new)
    return old, new


def _divergence(p: Logits, q: Logits) -> PerToken:
    """KL(p || q)."""
    return (p.exp() * (p - q)).sum(-1)


def _entropy(logs: Logits) -> PerToken:
    return -(logs.exp() * logs).sum(-1)


def _on_average(quantity: PerToken, after: State, together: bool) -> PerToken:
    """With `together`, its mean over a row's tokens. (Padding takes no step.)"""
    if not together:
        return quantity
    real = after.taken > 0
    total = torch.where(real, quantity, 0).sum(1, keepdim=True)
    return (total / real.sum(1, keepdim=True)).expand_as(quantity)


def _as_the_last(enough: Enough, after: State, together: bool) -> Enough:
    """With `together`, what holds for the last of a row's tokens."""
    if not together:
        return enough
    place = torch.arange(enough.shape[1], device=enough.device)
    last = ((after.taken > 0) * place).argmax(1, keepdim=True)
    return enough.gather(1, last).expand_as(enough)


Exit = Steps | StateChange | StateTurn | ReadoutChange | PeakChange | EntropyChange | SameToken | Confidence
