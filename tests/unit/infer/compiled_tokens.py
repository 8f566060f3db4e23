"""Run as a program, away from the type checker under pytest, whose wrappers no compiler can read.

Continues prompts with the models named on the command line, compiled and plain, and prints how many graphs
it took: for one row, for one deeper and in a larger cache, for three of different depths, and for one under
an exit rule. With `--backend inductor` they are compiled to the end.
"""

import argparse
from functools import partial
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from open_mythos.infer.generate import generate
from open_mythos.infer.sample import Sampling
from open_mythos.loop.exit import StateChange
from tests.lively import lively
from tests.tiny import MODELS, ROUTED

ONE, OTHER, THREE = [[1, 2, 3, 4]], [[9, 8, 7, 6, 5, 4, 3]], [[1, 2, 3, 4], [7], [9, 8, 7, 6, 5, 4]]
GREEDY = Sampling(temperature=0)


def graphs(name: str, backend: str) -> list[int]:
    """How many there are after each request, which a compiled model answers as the plain one does."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    torch.compile = partial(COMPILE, backend=counter, fullgraph=True)
    model, found = lively((MODELS | ROUTED)[name]), []
    looped = model.loop is not None
    requests: list[tuple[list[list[int]], dict[str, Any]]] = [
        (ONE, {"max_new_tokens": 5}),
        (OTHER, {"max_new_tokens": 9, **({"loops": 5} if looped else {})}),
        (THREE, {"max_new_tokens": 4, **({"loops": [2, 3, 5]} if looped else {})}),
    ]
    if looped:
        requests.append((ONE, {"max_new_tokens": 5, "exit": StateChange(threshold=0.6)}))
    for prompts, options in requests:
        want = generate(model, prompts, sampling=GREEDY, **options)
        got = generate(model, prompts, sampling=GREEDY, compile=True, **options)
        if got != want:
            raise SystemExit(f"{name}: compiled {got}, plain {want}")
        found.append(counter.frame_count)
    return found


COMPILE = torch.compile

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+")
    parser.add_argument("--backend", default="eager")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.names:
        print(name, *graphs(name, given.backend), flush=True)  # noqa: T201
