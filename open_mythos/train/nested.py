"""Nested state as named tensors and JSON, and back, exactly.

    {"optimizer": {"state": {"w": {"momentum": T}}, "steps": 3}}
      ->  {"optimizer/state/w/momentum": T}
      and the same dict with {"$tensor": "optimizer/state/w/momentum"} in the tensor's place

Dicts with any plain keys, lists, tuples, text, bytes, numbers (also nan and inf, which JSON lacks),
booleans and None go through unchanged, types included. Anything else is refused: what cannot be
written down plainly does not belong in a checkpoint.
"""

import base64
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Json = None | bool | int | float | str | list[Any] | dict[str, Any]


def flatten(state: Any) -> tuple[dict[str, Tensor], Json]:
    """Tensors by path, and the rest as JSON. Raises `ValueError` for what has no plain form."""
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(state, "", tensors)


def unflatten(tensors: Mapping[str, Tensor], packed: Json) -> Any:
    """The state that `flatten` was given. Raises `ValueError` if a tensor is missing."""
    if isinstance(packed, list):
        return [unflatten(tensors, item) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) == 1 and (tag := next(iter(packed))).startswith("$"):
        return _unpack(tensors, tag, packed[tag])
    return {key: unflatten(tensors, value) for key, value in packed.items()}


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Json:
    if isinstance(value, Tensor):
        return {"$tensor": _keep(value, path, tensors)}
    if isinstance(value, dict):
        return _pack_dict(value, path, tensors)
    if type(value) in (list, tuple):
        items = [_pack(item, f"{path}/{i}" if path else str(i), tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    return _pack_plain(value, path)


def _pack_plain(value: Any, path: str) -> Json:
    if type(value) is float and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value  # type: ignore[no-any-return]
    if type(value) is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    raise ValueError(
        f"{path or 'the state'} is a {type(value).__name__}, which a checkpoint cannot hold; "
        "it holds tensors, numbers, text, bytes, lists, tuples and dicts"
    )


def _pack_dict(value: dict[Any, Any], path: str, tensors: dict[str, Tensor]) -> Json:
    pairs = [
        (key, _pack(item, f"{path}/{key}" if path else str(key), tensors)) for key, item in value.items()
    ]
    if all(type(key) is str and not key.startswith("$") for key in value):
        return dict(pairs)
    return {"$dict": [[_pack(key, path, tensors), item] for key, item in pairs]}


def _keep(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    name = path or "tensor"
    while name in tensors:
        name += "~"
    tensors[name] = tensor
    return name


def _unpack(tensors: Mapping[str, Tensor], tag: str, body: Any) -> Any:
    if tag == "$tensor":
        if body not in tensors:
            raise ValueError(f"the state refers to a tensor {body!r} that is not there")
        return tensors[body]
    if tag == "$tuple":
        return tuple(unflatten(tensors, item) for item in body)
    if tag == "$dict":
        return {unflatten(tensors, key): unflatten(tensors, item) for key, item in body}
    if tag == "$float":
        return float(body)
    if tag == "$bytes":
        return base64.b64decode(body)
    raise ValueError(f"the state holds a value marked {tag!r}, which this version does not know")
