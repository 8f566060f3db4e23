"""Under pytest every tensor annotation is checked; outside it none is."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(
    [
        "open_mythos.nn",
        "open_mythos.loop",
        "open_mythos.model",
        "open_mythos.train",
        "open_mythos.infer",
        "open_mythos.analysis",
        "open_mythos.hub",
        "open_mythos.data",
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# Runs of the tests are nobody's to track.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)

torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Called with n, lets the n-th sync to the disk fail, and that one alone."""

    def fill(call: int) -> None:
        calls, fsync = [0], os.fsync

        def failing(handle: int) -> None:
            calls[0] += 1
            if calls[0] == call:
                raise OSError(28, "No space left on device")
            fsync(handle)

        monkeypatch.setattr(os, "fsync", failing)

    return fill


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
