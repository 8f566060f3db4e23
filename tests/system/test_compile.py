"""`compile=True`: a step of the loop is one graph, whatever the depth."""

from typing import Any

import torch

from open_mythos.loop.schedule import Plan
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Tally
from open_mythos.train.recipes import small_mythos
from tests.system import toy


def test_a_step_is_one_graph_for_every_depth() -> None:
    process = toy.FORKS.Process(
        target=compare
    )  # here signatures are checked, which the compiler cannot follow
    process.start()
    process.join(240)
    assert process.exitcode == 0


def compare() -> None:
    """Graphs are counted and run as they are: what inductor makes of them is not the question."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = small_mythos(dim=16, heads=2, vocab=64).build()
    tokens = torch.randint(0, 64, (2, 8))
    assert model.loop is not None
    plain, compiled = model.loop.step, torch.compile(model.loop.step, backend=count, fullgraph=True)
    for depth in (2, 5):
        found = []
        for step in (plain, compiled):
            model.loop.step = step
            model.zero_grad()
            tally = Tally()
            features = model.features(tokens, Plan(depth), Context.counting(tokens), tally=tally)
            features.square().sum().backward()
            loads = [load for visits in tally.loads.values() for load in visits]
            assert len(loads) == depth
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found.append([features.detach(), *loads, *gradients])
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(eager, traced, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1, f"{len(graphs)} graphs"
