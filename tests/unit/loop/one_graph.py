"""Run as a program, away from the type checker under pytest, whose wrappers no compiler can read.

Turns five compiled steps of the loop of the model named on the command line and prints how many graphs
it took, with gradient and without.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from open_mythos.loop.state import State
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from tests.tiny import MODELS
from tests.zoo import awake, close, gradients, words


def logits_of(model: LoopedLM, tokens: Tensor, take: Callable[..., State]) -> Tensor:
    ctx = Context.counting(tokens)
    state = model.encode(tokens, ctx)
    for n in range(5):
        turn = ctx.turn(torch.full((2,), n), [n, n])
        state = take(state, turn, turn.step, torch.full((2,), n == 4))
    return model.head(model.decode(state, ctx))


def learn(model: LoopedLM, tokens: Tensor, take: Callable[..., State]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = logits_of(model, tokens, take)
    logits.square().mean().backward()
    return logits.detach(), {key: grad.clone() for key, grad in gradients(model).items()}


def graphs(model: LoopedLM, tokens: Tensor, call: Callable[..., object]) -> int:
    """How many it takes to do `call` twice, to the same end as without a compiler."""
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(model.loop.step, fullgraph=True, backend=counter)
    for _ in range(2):
        close(call(model, tokens, step), call(model, tokens, model.loop.step), 1e-4)
    return counter.frame_count


def main(name: str) -> None:
    model, tokens = awake(MODELS[name]), words(2, 16)
    learning = graphs(model, tokens, learn)
    with torch.no_grad():
        print(learning, graphs(model, tokens, logits_of))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
