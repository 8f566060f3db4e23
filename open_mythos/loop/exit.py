"""When to stop looking, judged from outside: rules that need no training.

After every step a rule says for which tokens this was enough. Rules on the state cost nothing; rules on
what would be read out run the coda and the head at every check.

    Steps            a prescribed number of steps
    StateChange      |h_n - h_{n-1}| / |h_n| below a threshold          Huginn (arXiv 2502.05171)
    ReadoutChange    KL(p_{n-1} || p_n) between successive readouts
                     Huginn; Kohli et al. 2026 (arXiv 2604.07822)
    Confidence       entropy of the readout below a threshold           Popescu et al. 2026 (arXiv 2607.20519)

`least` steps are always taken, and the rule is asked every `every` steps.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from open_mythos.config import Config
from open_mythos.loop.state import State
from open_mythos.shapes import Logits

Readout = Callable[[State], Logits]
Enough = Bool[Tensor, "B T"]


class Steps(Config):
    steps: int
    least: int = 1
    every: int = 1

    def enough(self, before: State, after: State, readout: Readout) -> Enough:
        return after.taken >= self.steps


class StateChange(Config):
    threshold: float = 0.03
    least: int = 2
    every: int = 1

    def enough(self, before: State, after: State, readout: Readout) -> Enough:
        moved = torch.linalg.vector_norm(after.h - before.h, dim=-1, dtype=torch.float32)
        return moved < self.threshold * torch.linalg.vector_norm(after.h, dim=-1, dtype=torch.float32)


class ReadoutChange(Config):
    threshold: float = 1e-3
    entropy: float | None = None  # also ask for an entropy below this, in nats (Kohli et al.)
    least: int = 2
    every: int = 1

    def enough(self, before: State, after: State, readout: Readout) -> Enough:
        old, new = readout(before).float().log_softmax(-1), readout(after).float().log_softmax(-1)
        settled = (old.exp() * (old - new)).sum(-1) < self.threshold
        return settled if self.entropy is None else settled & (-(new.exp() * new).sum(-1) < self.entropy)


class Confidence(Config):
    entropy: float = 0.5  # nats
    least: int = 1
    every: int = 1

    def enough(self, before: State, after: State, readout: Readout) -> Enough:
        new = readout(after).float().log_softmax(-1)
        return -(new.exp() * new).sum(-1) < self.entropy


Exit = Steps | StateChange | ReadoutChange | Confidence
