"""Training on many processes with PyTorch's own means: torchrun, gloo or NCCL, FSDP2, DTensor.

    torchrun --nproc-per-node 8 -m open_mythos.cli.main train mythos_3b ...

What a loop asks of sharding:

- The whole loop is one unit. Its weights are gathered once forward and once backward, for any depth; were a
  layer the unit, it would be 2 T + 1 times.
- No rank can leave the loop alone: inside it nothing is communicated, so ranks may take different numbers of
  turns (each its rows of the one draw that all ranks make from the same generator).
- Sums over targets are divided by the count of valid targets on all ranks; FSDP averages gradients over
  ranks, so each rank's loss is multiplied by their number.

Weights stay in float32, a shard on each rank; they are gathered in the precision of the arithmetic (on CUDA)
and gradients are added up in float32. Zhao et al. 2023, arXiv 2304.11277; pytorch.org/docs, fully_shard.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """The processes that train together. Every method but `of_plan` is to be called on all of them."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    aside: dist.ProcessGroup | None = None  # for what ranks say to each other beside training

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks; alone, the value itself."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def most(self, *values: float) -> list[float]:
        """The largest of each number over ranks: what all agree on."""
        if self.size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return agreed.tolist()

    def first(self, do: Callable[[], T]) -> T:
        """Rank 0 does it; all get what it returns, or raise its `ValueError`."""
        if self.size == 1:
            return do()
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = do()
            except ValueError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said, src=0, device=CPU)
        if said[1] is not None:
            raise ValueError(said[1])
        result: T = said[0]
        return result

    def each(self, mine: T) -> list[T]:
        """What every rank has to say, in the order of ranks."""
        if self.size == 1:
            return [mine]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, mine)
        return said

    def of_plan(self, plan: Plan) -> Plan:
        """This rank's rows of a plan for the rows of all ranks."""
        return Plan(self._mine(plan.steps), self._mine(plan.grad))

    def _mine(self, numbers: Any) -> Any:
        if not isinstance(numbers, tuple):
            return numbers
        rows = len(numbers) // self.size
        return numbers[self.rank * rows : (self.rank + 1) * rows]


ALONE = World()


def launched() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def restarted() -> bool:
    """Whether the launcher started this work anew after a failure or a requeue."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


def own_device(name: str) -> torch.device:
    """The device of that name which is this process's own: each process of a machine has one GPU."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


@contextmanager
def join(device: torch.device, timeout: float = 600.0) -> Iterator[World]:
    """Meet the other processes that the launcher started; without a launcher, work alone.

    `timeout` is how many seconds to wait for any of them, now and later. Raises `ValueError` if they do not
    all arrive.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # The loop's `e` passes through FSDP's hook as a view; nothing here writes into a state.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    on_cuda = device.type == "cuda"
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=_meeting_place(timeout),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
            device_id=device if on_cuda else None,
        )
        dist.barrier(device_ids=[device.index or 0] if on_cuda else None)
    except (dist.DistError, RuntimeError) as error:
        raise ValueError(
            f"rank {rank} waited {timeout:.0f} seconds and did not find all {size} processes: start "
            f"every one with the same MASTER_ADDR and MASTER_PORT ({str(error).splitlines()[0]})"
        ) from error
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("data",))
    yield World(rank, size, mesh, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))
    dist.destroy_process_group()  # after an error it might wait for ranks that are gone


def _meeting_place(timeout: float) -> Store:
    """Where ranks find each other's addresses.

    torchrun (2.13) keeps one store over its restarts, and in it the addresses of processes that are dead.
    With a single launcher its count of restarts tells them apart; launchers on several machines may count
    apart, so there set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and torchrun opens a new store each time.
    """
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt {attempt}", store)


def shard(model: LoopedLM, world: World, dtype: torch.dtype) -> LoopedLM:
    """Spread the weights over the ranks; `dtype` is what they are gathered in. The model, for chaining.

    Autocast should be on too where `dtype` is not float32, so that products never meet two precisions.
    """
    if world.mesh is None:
        return model
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    loops = [] if model.loop is None else [model.loop]
    for unit in (*model.prelude, *loops, *model.coda, model):
        fully_shard(unit, mesh=world.mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "features")
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights on every rank for a while, for code that calls parts of the model by themselves."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def at_hand(parameter: Tensor) -> Tensor:
    """A parameter whole, for use outside of the unit that it is sharded with; its gradient is averaged over
    ranks, as FSDP does. All ranks take part."""
    if not isinstance(parameter, DTensor):
        return parameter
    placements = [Partial("sum")] * parameter.device_mesh.ndim
    return _Shared.apply(parameter.full_tensor(grad_placements=placements), parameter.device_mesh.size())


class _Shared(torch.autograd.Function):
    """The same tensor, and a gradient divided by the number of ranks (gloo sums, and knows no average)."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


def spread_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of a whole tensor, laid out over the ranks as `parameter` is. Nothing is communicated."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or not value.ndim:
        return value.clone()
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole weights into a model that may be sharded."""
    ours = model.state_dict()
    model.load_state_dict(
        {name: spread_like(ours[name], value) if name in ours else value for name, value in weights.items()}
    )
