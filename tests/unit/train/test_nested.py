import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from open_mythos.train.nested import flatten, unflatten

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
keys = (
    st.text(max_size=4)
    | st.integers()
    | st.booleans()
    | st.none()
    | st.tuples(st.integers(), st.text(max_size=2))
)
tensors = st.builds(torch.arange, st.integers(0, 3))
states = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return [repr(k) for k in a] == [repr(k) for k in b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@given(states)
def test_any_state_comes_back_exactly(state: Any) -> None:
    tensors, packed = flatten(state)
    text = json.dumps(packed, allow_nan=False)
    assert same(unflatten(tensors, json.loads(text)), state)


def test_names_are_paths_and_never_collide() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    tensors, packed = flatten({"x": {"y": a}, "x/y": b, "l": [c]})
    assert tensors.keys() == {"x/y", "x/y~", "l/0"}
    back = unflatten(tensors, packed)
    assert back["x"]["y"] is a
    assert back["x/y"] is b


def test_a_torch_optimizer_state_comes_back() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors, packed = flatten(optimizer.state_dict())
    assert same(unflatten(tensors, json.loads(json.dumps(packed))), optimizer.state_dict())


def test_what_has_no_plain_form_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a/b is a set"):
        flatten({"a": {"b": {1}}})
    with pytest.raises(ValueError, match="function"):
        flatten({"a": math.sqrt})


def test_a_missing_tensor_and_an_unknown_mark() -> None:
    with pytest.raises(ValueError, match="'a'"):
        unflatten({}, {"a": {"$tensor": "a"}})
    with pytest.raises(ValueError, match="pickle"):
        unflatten({}, {"$pickle": "gASVAAAA"})
