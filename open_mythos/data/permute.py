"""A permutation of 0..n-1 that is computed, not stored: the order in which rows are read.

A Feistel network over the next even number of bits, walked until it lands below n (Black and Rogaway 2002).
The place of any sample follows from its number alone, so the whole state of a shuffled reader is "samples
seen", which stays true when the number of ranks changes.
"""

import numpy as np
from jaxtyping import Integer

ROUNDS = 6
_MIX_1, _MIX_2 = (
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)  # splitmix64 (Steele et al. 2014)


def permuted(index: Integer[np.ndarray, "n"], size: int, key: tuple[int, int]) -> Integer[np.ndarray, "n"]:
    """Where the permutation of `range(size)` named by `key` (seed, epoch) sends each of `index`."""
    assert index.size == 0 or 0 <= index.min() <= index.max() < size
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).integers(
        0, 2**64, size=ROUNDS, dtype=np.uint64
    )
    found = _feistel(index.astype(np.uint64), half, keys)
    while (outside := found >= size).any():
        found[outside] = _feistel(found[outside], half, keys)
    return found.astype(np.int64)


def _feistel(
    values: Integer[np.ndarray, "n"], half: np.uint64, keys: Integer[np.ndarray, "r"]
) -> Integer[np.ndarray, "n"]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(values: Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "n"]:
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
