"""Training on many processes with PyTorch's own means: torchrun, gloo or NCCL, FSDP2, DTensor.

    torchrun --nproc-per-node 8 -m open_mythos.cli.main train mythos_3b ...

What a loop asks of sharding:

- The whole loop is one unit. Its weights are gathered once forward and once backward, for any depth; were a
  layer the unit, it would be 2 T + 1 times.
- No rank can leave the loop alone: inside it nothing is communicated, so ranks may take different numbers of
  turns (each its rows of the one draw that all ranks make from the same generator).
- With `expert_parallel` n they do communicate there: n ranks in a row hold 1/n of the routed experts each and
  send each other tokens (nn/spread.py). So these n take the same depths, row by row, and halting lets no
  token leave before the plan's end.
- Sums over targets are divided by the count of valid targets on all ranks; FSDP averages gradients over
  ranks, so each rank's loss is multiplied by their number.

Weights stay in float32, a shard on each rank; they are gathered in the precision of the arithmetic (on CUDA)
and gradients are added up in float32. Zhao et al. 2023, arXiv 2304.11277; pytorch.org/docs, fully_shard.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from open_mythos.loop.route import Everyone
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM, Model
from open_mythos.nn.moe import MixtureOfExperts, MoE
from open_mythos.nn.spread import AXES, Spread, averaged

T = TypeVar("T")
P = TypeVar("P", bound=Tensor)
CPU = torch.device("cpu")
# Seconds for gloo's threads to let go of the last tensors: caches of DTensor keep the threads alive, and one
# that lets go while the interpreter shuts down aborts the process (pytorch/pytorch, issue 190489).
LETTING_GO = 0.2


@dataclass(frozen=True)
class World:
    """The processes that train together. Every method but `of_plan` is to be called on all of them."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    aside: dist.ProcessGroup | None = None  # for what ranks say to each other beside training
    expert_parallel: int = 1  # how many ranks share out the routed experts
    apart: DeviceMesh | None = None  # where these lie, if more than one

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

    def require(self, expert_parallel: int) -> None:
        """Raise `ValueError` if so many ranks cannot share out the experts."""
        _check_number(self.size, expert_parallel)
        assert self.expert_parallel == expert_parallel, "to be said when joining"

    @property
    def plans(self) -> int:
        """How many ranks have depths of their own: those who share out experts take the same, in step."""
        return self.size // self.expert_parallel

    def of_plan(self, plan: Plan) -> Plan:
        """This rank's rows of a plan for the rows of as many ranks as have plans."""
        return Plan(self._mine(plan.steps), self._mine(plan.grad))

    def _mine(self, numbers: Any) -> Any:
        if not isinstance(numbers, tuple):
            return numbers
        rows, plan = len(numbers) // self.plans, self.rank // self.expert_parallel
        return numbers[plan * rows : (plan + 1) * rows]


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
def join(device: torch.device, timeout: float = 600.0, expert_parallel: int = 1) -> Iterator[World]:
    """Meet the other processes that the launcher started; without a launcher, work alone.

    `timeout` is how many seconds to wait for any of them, now and later; `expert_parallel` how many of them
    share out the routed experts. Raises `ValueError` if they do not all arrive, or are no multiple of that.
    """
    _check_number(int(os.environ["WORLD_SIZE"]) if launched() else 1, expert_parallel)
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
    aside = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    apart = expert_mesh(device.type, size, expert_parallel) if expert_parallel > 1 else None
    yield World(rank, size, mesh, aside, expert_parallel, apart)
    dist.destroy_process_group()  # after an error it might wait for ranks that are gone
    time.sleep(LETTING_GO)


def expert_mesh(device: str, size: int, expert_parallel: int) -> DeviceMesh:
    """Ranks in a row, which are likely to be on one machine, hold different experts."""
    ranks = torch.arange(size).view(-1, expert_parallel).T
    return DeviceMesh(device, ranks, mesh_dim_names=AXES)


def _check_number(processes: int, expert_parallel: int) -> None:
    if processes % expert_parallel:
        raise ValueError(
            f"expert_parallel={expert_parallel} needs a multiple of {expert_parallel} processes, and there "
            f"{'is 1' if processes == 1 else f'are {processes}'}; start them with torchrun --nproc-per-node, "
            "or give another expert_parallel (a saved run goes on with any)"
        )


def check_expert_parallel(model: Model, parts: int) -> None:
    """Raise `ValueError` unless the routed experts of `model` can be shared out in so many parts."""
    if parts < 1:
        raise ValueError(f"expert_parallel is a number of processes, at least 1, got {parts}")
    if parts == 1:
        return
    counts = expert_counts(model)
    if not counts:
        raise ValueError(f"expert_parallel={parts} shares out the experts of an MoE, and this model has none")
    if odd := [count for count in counts if count % parts]:
        raise ValueError(f"{odd[0]} experts cannot be shared out evenly by expert_parallel={parts}")
    if model.loop is not None and not isinstance(model.loop.route, Everyone):
        raise ValueError(
            f"with expert_parallel={parts} all processes meet at every step of the loop, but "
            f"model.loop.route={type(model.loop.route).__name__} skips a step for which it chose no token; "
            'leave one of the two out (model.loop.route={"is": "Everyone"})'
        )


def expert_counts(model: Model) -> set[int]:
    """How many routed experts the layers have that have some."""
    loop = model.loop.layers if model.loop is not None else ()
    mixtures = (block.ffn for block in (*model.prelude, *loop, *model.coda))
    return {ffn.experts for ffn in mixtures if isinstance(ffn, MoE)}


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
    apart = _spread(model, Spread(world.apart, dtype)) if world.apart is not None else set()
    for unit in (*model.prelude, *loops, *model.coda, model):
        fully_shard(unit, mesh=world.mesh, mp_policy=policy, ignored_params=apart)
    register_fsdp_forward_method(model, "features")
    return model


def _spread(model: LoopedLM, spread: Spread) -> set[nn.Parameter]:
    """Leave each rank its part of the routed experts. These parameters, which FSDP is not to touch."""
    apart = set()
    for layer in _mixtures(model):
        for name in ("gate_up", "down"):
            stack = getattr(layer, name).detach()
            layout = spread.layout(stack)
            own = nn.Parameter(distribute_tensor(stack, spread.mesh, layout, src_data_rank=None))
            setattr(layer, name, own)
            apart.add(own)
        layer.spread = spread
    if model.loop is not None:
        model.loop.lockstep = True
    return apart


def _mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights on every rank for a while, for code that calls parts of the model by themselves.

    Experts that are shared out stay so: all ranks have to do the same meanwhile, on the same tokens.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    apart = [layer for layer in _mixtures(model) if layer.spread is not None]
    stacks = [stack for layer in apart for stack in (layer.gate_up, layer.down)]
    try:
        with apart[0].spread.alike(stacks) if apart and apart[0].spread else nullcontext():
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
    return averaged(parameter.full_tensor(grad_placements=placements), parameter.device_mesh.size())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over ranks, without a way back. All ranks take part.

    One axis of its mesh after the other: torch 2.11 refuses to do at once those of `expert_mesh`.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for axis in reversed(range(len(placements))):
        placements[axis] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def norm_over_ranks(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all `tensors` together, of which every rank may hold shards. All ranks take part."""
    own = nn.utils.get_total_norm([t.to_local() if isinstance(t, DTensor) else t for t in tensors])
    if not isinstance(tensors[0], DTensor):
        return own
    mesh = tensors[0].device_mesh
    return whole(DTensor.from_local(own.square(), mesh, [Partial("sum")] * mesh.ndim)).sqrt()


def by_mesh(tensors: Iterable[P]) -> list[list[P]]:
    """Apart by where they lie: DTensor takes only those of one mesh into one operation."""
    found: dict[DeviceMesh | None, list[P]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(found.values())


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
