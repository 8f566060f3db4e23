"""Sampling against a twin in plain Python, and by its statistics."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from open_mythos.infer.sample import Sampling, choose, probabilities, uniforms


def slowly(logits, sampling, seen):
    """The probabilities of one row, by the definitions."""
    z = [
        (x / sampling.repetition_penalty if x > 0 else x * sampling.repetition_penalty) if i in seen else x
        for i, x in enumerate(logits)
    ]
    weights = {i: math.exp((x - max(z)) / sampling.temperature) for i, x in enumerate(z)}
    order = sorted(weights, key=lambda i: -weights[i])
    if sampling.top_k:
        least = weights[order[min(sampling.top_k, len(order)) - 1]]
        order = [i for i in order if weights[i] >= least]
    kept, mass, total = [], 0.0, sum(weights[i] for i in order)
    for i in order:
        if kept and mass >= sampling.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= sampling.min_p * weights[kept[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def spread(rng, vocab):
    """Logits without near ties, which rounding would decide."""
    values = [0.37 * i - 3 for i in range(vocab)]
    rng.shuffle(values)
    return values


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([None, 0, 1, 3, 12, 500]),
    top_p=st.sampled_from([0.01, 0.333, 0.81, 1.0]),
    min_p=st.sampled_from([0.0, 0.077, 0.5]),
    penalty=st.sampled_from([1.0, 1.3, 0.83]),
)
def test_probabilities_are_those_of_the_definitions(seed, temperature, top_k, top_p, min_p, penalty):
    rng = random.Random(seed)
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    rows = [spread(rng, 12) for _ in range(3)]
    seen = [set(rng.sample(range(12), 4)) for _ in rows]
    marks = torch.tensor([[i in s for i in range(12)] for s in seen])
    expected = torch.tensor([slowly(row, sampling, s) for row, s in zip(rows, seen, strict=True)])
    logits = torch.tensor(rows)
    penalised = torch.where(marks, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    assert_close(probabilities(penalised, sampling), expected, atol=1e-5, rtol=1e-4)
    for u in (0.0, 0.25, 0.999999, np.nextafter(1.0, 0.0)):
        tokens = choose(logits, sampling, torch.full((3,), u, dtype=torch.float64), marks)
        for row, token in enumerate(tokens.tolist()):
            below = float(expected[row, :token].double().sum())
            assert expected[row, token] > 0
            assert below - 1e-5 <= u <= below + float(expected[row, token]) + 1e-5


def test_zero_temperature_takes_the_likeliest_whatever_the_filters():
    logits = torch.tensor([[0.1, 3.0, 2.0], [5.0, 1.0, 4.9]])
    assert choose(logits, Sampling()).tolist() == [1, 0]
    assert choose(logits, Sampling(top_k=2, top_p=0.5, min_p=0.3)).tolist() == [1, 0]
    seen = torch.tensor([[False, True, False], [True, False, False]])
    assert choose(logits, Sampling(repetition_penalty=2.0), seen=seen).tolist() == [2, 2]


def test_a_tiny_temperature_and_infinite_logits_stay_finite():
    logits = torch.tensor([[-torch.inf, 80.0, 79.0]], dtype=torch.bfloat16)
    for sampling in (Sampling(temperature=1e-6), Sampling(temperature=1.0, top_p=0.999, min_p=0.001)):
        p = probabilities(logits.float(), sampling)
        assert bool(p.isfinite().all())
        assert float(p[0, 0]) == 0


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    u = torch.from_numpy(uniforms(0, 0, 20_000))
    sampling = Sampling(temperature=1.0)
    drawn = choose(logits.expand(20_000, -1), sampling, u)
    assert_close(torch.bincount(drawn, minlength=4) / 20_000, logits.softmax(-1)[0], atol=0.015, rtol=0)


def test_numbers_belong_to_seed_and_row_and_begin_the_same_however_many_are_asked_for():
    assert np.array_equal(uniforms(1, 2, 100)[:7], uniforms(1, 2, 7))
    streams = [tuple(uniforms(seed, row, 3)) for seed in range(5) for row in range(5)]
    assert len(set(streams)) == 25


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


def test_sampling_needs_its_numbers():
    with pytest.raises(ValueError, match="uniform number per row"):
        choose(torch.zeros(1, 3), Sampling(temperature=1.0))
