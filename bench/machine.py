"""On what a measurement was made."""

import platform
from pathlib import Path
from typing import Any

import torch


def machine(threads: int | None = None) -> dict[str, Any]:
    """The head of a file of results."""
    return {
        "machine": name(torch.device("cpu")),
        "torch": torch.__version__,
        "threads": threads or torch.get_num_threads(),
    }


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    models = Path("/proc/cpuinfo")
    lines = models.read_text().splitlines() if models.exists() else []
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )
