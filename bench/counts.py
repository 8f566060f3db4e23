"""What one run asks of a GPU: kernels launched, and times the host waited. On a CPU: operations, and reads
of values that would make a GPU wait.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = ("aten._local_scalar_dense.default", "aten.nonzero.default")
LISTS = (torch.Tensor.tolist, torch.Tensor.numpy)  # on a CPU they read without an operation


class Counts(NamedTuple):
    launched: int
    waited: int


def count(run: Callable[[], object], device: torch.device) -> Counts:
    run()
    return _on_cuda(run) if device.type == "cuda" else _on_cpu(run)


def _on_cuda(run: Callable[[], object]) -> Counts:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        own = 1  # the wait below is ours, not the model's
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    launched = sum(
        name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")) for name in names
    )
    return Counts(launched, max(sum(name in WAITS for name in names) - own, 0))


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # inference mode hands over what consists of others in one piece
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if not func.is_view:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read += func in LISTS
        return func(*args, **(kwargs or {}))


def _on_cpu(run: Callable[[], object]) -> Counts:
    with _Operations() as operations, _Lists() as lists:
        run()
    return Counts(operations.seen.total(), sum(operations.seen[name] for name in READS) + lists.read)
