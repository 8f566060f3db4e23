"""What layers have to report beside their output: costs for the loss, and the load of the experts.

A `Tally` rides on the `Context` of one call and is read once, before the backward pass. (Under
activation checkpointing the forward runs again inside backward and reports again; by then nobody
listens.)
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

Where = tuple[str, int]  # stage, layer


@dataclass
class Tally:
    """`costs`: name -> sum of scalars. `loads`: (stage, layer) -> tokens per expert, one entry per visit."""

    costs: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    loads: dict[Where, list[Int[Tensor, "E"]]] = field(default_factory=dict)

    def cost(self, name: str, value: Float[Tensor, ""]) -> None:
        self.costs[name] = self.costs[name] + value if name in self.costs else value

    def load(self, where: Where, counts: Int[Tensor, "E"]) -> None:
        self.loads.setdefault(where, []).append(counts)

    def add(self, other: "Tally") -> None:
        """All that the other was told."""
        for name, value in other.costs.items():
            self.cost(name, value)
        for where, counts in other.loads.items():
            self.loads.setdefault(where, []).extend(counts)

    def total_loads(self) -> dict[Where, Int[Tensor, "E"]]:
        """Tokens per expert over all visits of each layer."""
        return {where: torch.stack(counts).sum(0) for where, counts in self.loads.items()}
