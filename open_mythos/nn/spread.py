"""Experts on several processes: rows travel to the owners of their experts, and what those say travels back.

    rows by expert  --all-to-all-->  the owner's SwiGLU, expert by expert  --all-to-all-->  weighed and added

GShard, Lepikhin et al. 2020 (arXiv 2006.16668), without its capacities: no row is dropped, however uneven the
choice. A layer's stacks are DTensors on a mesh of two axes:

    expert   process i holds experts i E/n ... (i+1) E/n, and nobody gathers those of the others
    data     processes with the same experts hold shards of them, gathered once per call, for any depth

In training every process has rows of its own, and all of one expert group have to come here equally often.
The gradient of a stack is the sum over the rows of all processes, divided by their number, as FSDP has it
for everything else.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from open_mythos.nn.experts import Down, GateUp, Rows, arrange, grouped_swiglu, reordered, run_experts, weigh

AXES = "expert", "data"


@final
class Spread:
    """Runs experts of which every process holds a part. `dtype` is what they are gathered in to be held."""

    def __init__(self, mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> None:
        self.mesh, self.dtype = mesh, dtype
        self.group = mesh.get_group("expert")
        self.parts, self.part = mesh.size(0), mesh.get_local_rank("expert")
        self._held: dict[int, Tensor] | None = None

    def layout(self, stack: Float[Tensor, "E r c"]) -> tuple[Placement, Placement]:
        """Where a stack is cut: by expert, and then over `data` along the first axis that splits evenly."""
        own = len(stack) // self.parts, *stack.shape[1:]
        even = [axis for axis, size in enumerate(own) if size % self.mesh.size(1) == 0]
        return Shard(0), Shard(even[0] if even else 0)

    def fetch(self, stack: Tensor, dtype: torch.dtype) -> Tensor:
        """This process's experts, whole. Their gradient is added up over `data` in the stack's precision."""
        if self._held is not None:
            return self._held[id(stack)].to(dtype)
        assert isinstance(stack, DTensor)
        own = stack.redistribute(
            placements=(Shard(0), Replicate()), forward_dtype=dtype, backward_dtype=stack.dtype
        )
        return averaged(own.to_local(grad_placements=(Shard(0), Partial("sum"))), self.mesh.size())

    @contextmanager
    def alike(self, stacks: Iterable[Tensor]) -> Iterator[None]:
        """A while in which all processes work on the same rows, without gradient, and stay equal to the bit.

        `stacks` are held whole meanwhile, so that nothing is gathered.
        """
        with torch.no_grad():
            self._held = {id(stack): self.fetch(stack, self.dtype) for stack in stacks}
        try:
            yield
        finally:
            self._held = None

    def run(
        self, x: Rows, gate_up: GateUp, down: Down, chosen: Int[Tensor, "M k"], weights: Float[Tensor, "M k"]
    ) -> Rows:
        """`run_experts` over all processes' experts; `gate_up` and `down` are what `fetch` returned."""
        if self._held is not None:
            return self._same_rows(x, gate_up, down, chosen, weights)
        order, back, counts = arrange(chosen.flatten(), self.parts * len(gate_up))
        asked = torch.empty_like(counts)  # rows from every process for each expert here
        dist.all_to_all_single(asked, counts, group=self.group)
        sent, got = torch.stack([counts, asked]).view(2, self.parts, -1).sum(2).tolist()
        rows = exchanged(reordered(x, order, back, chosen.shape[1]), sent, got, self.group)
        # What came is sorted by sender and then by expert; the experts want it by expert.
        kinds = torch.arange(len(gate_up), device=x.device).repeat(self.parts)
        kinds = kinds.repeat_interleave(asked, output_size=len(rows))
        there, home, counts = arrange(kinds, len(gate_up))
        y, _ = grouped_swiglu(reordered(rows, there, home, 1), gate_up, down, counts)
        y = exchanged(reordered(y, home, there, 1), got, sent, self.group)
        return weigh(y, order, back, weights)

    def _same_rows(
        self, x: Rows, gate_up: GateUp, down: Down, chosen: Int[Tensor, "M k"], weights: Float[Tensor, "M k"]
    ) -> Rows:
        """Everybody's own experts on all rows, added up: the same bits on every process, whoever decides."""
        assert not torch.is_grad_enabled()
        slot = chosen - self.part * len(gate_up)
        mine = (slot >= 0) & (slot < len(gate_up))
        y = run_experts(x, gate_up, down, slot.where(mine, 0), weights * mine)
        dist.all_reduce(y, group=self.group)
        return y


def exchanged(rows: Rows, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Rows:
    """sent[0] rows go to process 0, the next to 1, ...; so come got[0] from it, and so on. Differentiable."""
    return _Exchanged.apply(rows, sent, got, group)


def averaged(whole: Tensor, ranks: int) -> Tensor:
    """The same tensor, and a gradient divided by the number of ranks (gloo sums, and knows no average)."""
    return _Averaged.apply(whole, ranks)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = got, sent, group
        return _exchange(rows, sent, got, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient, *ctx.way_back), None, None, None


def _exchange(rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(got), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), got, sent, group=group)
    return arrived


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None
