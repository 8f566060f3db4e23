"""Floating-point operations of one run, counted while it runs.

Counted are the products that were asked for: of matrices, of the experts, and of attention, whose causal half
alone counts. All else is free, so the share of a machine's peak that follows is an understatement.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import open_mythos.nn.experts  # noqa: F401 (defines the operators named below)


def count(run: Callable[[], object]) -> int:
    aten, ours = torch.ops.aten, torch.ops.open_mythos
    mapping: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        torch.ops.mkldnn._linear_pointwise: _linear,
        ours.grouped_swiglu: _experts,
        ours.grouped_swiglu_backward: _experts_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


def _attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    rows, heads, asked, width = q
    pairs = asked * k[2] // (2 if asked == k[2] else 1)
    return 2 * rows * heads * pairs * (width + v[3])


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **__: Any) -> int:
    return 5 * _attention(q, k, v) // 2  # scores again, and four gradients of two products


def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * x[-1] * weight[0]


def _experts(x: Any, gate_up: Any, *_: Any, **__: Any) -> int:
    return 3 * x[0] * x[1] * gate_up[1]  # into 2F, and out of F


def _experts_backward(grad: Any, x: Any, gate_up: Any, *_: Any, **__: Any) -> int:
    return 2 * _experts(x, gate_up)
