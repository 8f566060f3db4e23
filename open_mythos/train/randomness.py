"""The state of every random number generator of a process, as plain data that a checkpoint can hold."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator


def random_state(**generators: Generator) -> dict[str, Any]:
    """States of torch (CPU and each CUDA device), NumPy, Python, and the generators given by name."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(algorithm), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
        "named": {name: generator.get_state() for name, generator in generators.items()},
    }


def restore_random_state(state: Mapping[str, Any], **generators: Generator) -> None:
    """Put every generator back. Raises `ValueError` if a named one was not saved.

    CUDA states are put back only on as many devices as were saved, where the machine has them.
    """
    if missing := sorted(generators.keys() - state["named"].keys()):
        raise ValueError(
            f"the saved random state lacks {', '.join(missing)}; it has {', '.join(state['named'])}"
        )
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(saved, device)
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
    for name, generator in generators.items():
        generator.set_state(state["named"][name])
