"""In what numbers a model is trained: weights stay in float32, arithmetic is in

float32     everywhere, on request
bfloat16    where the hardware multiplies it fast
float16     on older GPUs, with a scaled loss so that small gradients do not vanish
            Micikevicius et al. 2018 (arXiv 1710.03740)
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def resolve(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic. `auto` asks the hardware."""
    if precision != "auto":
        dtype: torch.dtype = getattr(torch, precision)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    return torch.float32


def arithmetic(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """A context in which products run in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
