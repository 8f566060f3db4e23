"""How much memory a run takes at its peak, on top of the model: in a process of its own.

python bench/memory.py SIDE TASK DIM MIXER ROWS LENGTH DEVICE FOLDER
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

MEBI = 2**20


def peak(side: str, task: str, *details: object) -> float:
    """MiB. `side` is "theirs" or "ours", `task` a method of `Sides`, the details as on the command line."""
    command = [sys.executable, __file__, side, task, *map(str, details)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"measuring the memory of {side} {task} failed:\n{run.stderr}")
    return float(run.stdout.split()[-1])


def _measure(
    side: str, task: str, dim: str, mixer: str, rows: str, length: str, device: str, folder: str
) -> float:
    import original
    from sides import SIZES, Sides

    sides = Sides.build(original.load(Path(folder)), SIZES[int(dim)].settings(mixer), torch.device(device))
    run = getattr(sides, task)(int(rows), int(length))[side == "ours"]
    return above(run, torch.device(device))


def above(run: Callable[[], object], device: torch.device) -> float:
    """MiB at the peak of `run`, on top of what this process holds."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MEBI
    before = _kibibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(field: str) -> float:
    """Of this process, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


if __name__ == "__main__":
    print(_measure(*sys.argv[1:]))
