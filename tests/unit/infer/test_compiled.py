"""The verbs that `generate(compile=True)` goes through: few graphs, and the same tokens."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from open_mythos.infer.generate import generate
from open_mythos.nn.cache import KVCache
from open_mythos.nn.context import Context
from tests.lively import lively
from tests.tiny import MODELS, ROUTED

QUIET = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # in PyTorch's imports
EVERY = [*MODELS, *ROUTED]
ROOT = Path(__file__).parents[3]
FEW = {  # graphs after one row, one row deeper in a larger cache, three rows, and one row with an exit rule
    "mythos-mla-act": [3, 3, 8, 8],
    "ngrams": [3, 3, 8, 8],
    "fixed-depth": [2, 2, 4],
}


def compiled(*words: str) -> dict[str, list[int]]:
    command = [sys.executable, "-m", "tests.unit.infer.compiled_tokens", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: [int(count) for count in counts] for name, *counts in lines}


def test_one_graph_of_each_verb_serves_every_step_position_and_cache() -> None:
    assert compiled(*FEW) == FEW


@pytest.mark.slow
def test_every_model_can_be_compiled() -> None:
    """Without a prelude and a coda the step alone is compiled: nothing else has a cache."""
    found = compiled(*EVERY)
    assert list(found) == EVERY
    assert all(1 <= counts[0] == counts[1] <= 3 for counts in found.values()), found


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(
    "name",
    [
        "mythos-mla-act",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("huginn", "relaxed", "recursions-shared")),
    ],
)
def test_to_the_end(name: str) -> None:
    assert compiled("--backend", "inductor", name)[name][0] >= 1


@QUIET
@torch.inference_mode()
def test_a_full_cache_says_so() -> None:
    from open_mythos.infer.compiled import CompiledVerbs

    model, cache, tokens = lively(MODELS["mythos-mla"]), KVCache(1, 3), torch.tensor([[1, 2, 3]])
    model(tokens, cache=cache)
    with torch.compiler.set_stance("force_eager"), pytest.raises(ValueError, match="cache holds 3 tokens"):
        CompiledVerbs(model).encode(tokens[:, :1], Context.counting(tokens[:, :1], 3, cache))


@QUIET
def test_without_a_compiler_it_says_so() -> None:
    from torch._inductor import config

    said = pytest.raises(ValueError, match=r"needs a C\+\+ compiler.*install g\+\+.*leave compile out")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), said:
        generate(lively(MODELS["mythos-mla"]), [[1, 2]], max_new_tokens=2, compile=True)
