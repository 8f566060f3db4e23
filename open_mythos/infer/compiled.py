"""The verbs through `torch.compile`, for the tokens that come one by one after the prompt.

A token of a small model is a thousand small operations, and a third of its time is Python's; compiled, a step
is some dozens of loops over memory. What a step remembers is handed to it as the buffers of that step
(`KVCache.slots`), and positions and capacities are symbols, so each verb is one graph for every step, token
and cache (and one more for more rows than one, and for rows out of step).

Where a cache is not made of such buffers, or a step is taken for the first time, the plain verb does it.
Oracle: the plain verbs (tests/unit/infer/test_compiled.py, tests/laws/test_generate.py).
"""

from collections.abc import Callable
from typing import Any, final

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from open_mythos.loop.state import State
from open_mythos.model import LoopedLM
from open_mythos.nn.cache import KVCache, Place
from open_mythos.nn.context import Context
from open_mythos.shapes import Features, Hidden, PerSequence, Steps, Tokens

Verb = Callable[..., Any]


@final
class CompiledVerbs:
    """`encode`, `step` and `decode` as `LoopedLM` has them, without gradient.

    Graphs are made when they are first called for (10 to 20 seconds of a CPU for all three; PyTorch keeps
    them on disk). Raises `ValueError` at once where the model is on a CPU and there is no C++ compiler.
    """

    def __init__(self, model: LoopedLM) -> None:
        if model.embed.weight.device.type == "cpu":
            _require_a_compiler()
        self.model, self._lent = model, model.loop is not None and model.loop.lent > 0
        self._encode, self._step, self._decode = (
            _compiled(verb) for verb in (model.encode, model.step, model.decode)
        )

    def encode(self, tokens: Tokens, ctx: Context, *, start: Hidden | None = None) -> State:
        seen = _seeing(ctx)
        if seen is None:
            return self.model.encode(tokens, ctx, start=start)
        return self._encode(tokens, seen, start=start)

    def step(self, state: State, ctx: Context, step: Steps, last: PerSequence) -> State:
        number = 0 if self._lent else ctx.place.step  # what the first step lends lies in its slot
        seen = _seeing(ctx, number) if isinstance(number, int) else None
        if seen is None:
            return self.model.step(state, ctx, step, last)
        return self._step(state, seen, step, last)

    def decode(self, state: State, ctx: Context) -> Features:
        seen = _seeing(ctx)
        if seen is None:
            return self.model.decode(state, ctx)
        return self._decode(state, seen)


def _seeing(ctx: Context, step: int | None = None) -> Context | None:
    """`ctx` with the buffers of one step as its cache; none where the cache has no such."""
    slots = ctx.cache.slots(ctx.span, step) if isinstance(ctx.cache, KVCache) and not ctx.fresh else None
    return None if slots is None else ctx.but(cache=slots, place=Place(), memo={}, casts={})


def _compiled(verb: Verb) -> Verb:
    """Without `specialize_float` every number of a config becomes an input too, and what is made of them is
    no number. The limit of graphs is one for all models of a process."""
    fast = torch.compile(verb, dynamic=True)
    return torch._dynamo.config.patch(specialize_float=True, recompile_limit=64)(fast)


def _require_a_compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            "compiling for a CPU needs a C++ compiler, and there is none; install g++ or clang, name one in "
            "the environment variable CXX, or leave compile out"
        ) from None
