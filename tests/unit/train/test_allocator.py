"""Keeping freed memory: told to a process of its own, since it holds until that ends."""

import subprocess
import sys

import pytest

NO_ADVICE = "the C library takes no advice"
FAULTS = f"""
import resource, sys, torch
from open_mythos.train.allocator import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("{NO_ADVICE}")
for _ in range(16):  # until all have found their places
    torch.zeros(2**24).add_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.zeros(2**24).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Pages that the system had to make ready while the same 64 MiB were asked for and freed eight times."""
    done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=False)
    if NO_ADVICE in done.stderr:
        pytest.skip(NO_ADVICE)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_pages_are_made_ready_once() -> None:
    assert 2 * faults("kept") < faults("given back")
