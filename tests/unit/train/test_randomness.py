import json
import random

import numpy as np
import pytest
import torch

from open_mythos.train.nested import flatten, unflatten
from open_mythos.train.randomness import random_state, restore_random_state


def draws(generator: torch.Generator) -> list[float]:
    tensors = torch.rand(3).tolist() + torch.rand(3, generator=generator).tolist() + torch.randn(1).tolist()
    return [*tensors, random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn()]


def test_every_generator_goes_on_where_it_was() -> None:
    depth = torch.Generator().manual_seed(3)
    draws(depth)  # leaves NumPy's second Gaussian of a pair in store
    tensors, packed = flatten(random_state(depth=depth))
    expected = draws(depth)
    draws(depth)
    restore_random_state(unflatten(tensors, json.loads(json.dumps(packed))), depth=depth)
    assert draws(depth) == expected


def test_a_generator_that_was_not_saved() -> None:
    with pytest.raises(ValueError, match="lacks data; it has depth"):
        restore_random_state(random_state(depth=torch.Generator()), data=torch.Generator())
