"""Plain generation: a batch of prompts, each continued token by token. The oracle of every faster engine.

    prefill   all prompts at once, padded on the right: a token's column in the cache is its position, so
              what padding would write is overwritten before anyone looks
    advance   one token of every row per turn, at any depth per row; of one row on a CPU by alone.py

A finished row leaves the batch, and its part of the cache with it. With an exit rule the prompt but its last
token is read at full depth, and from there on every token leaves the loop as soon as the rule allows: rows
that have left compute nothing. Law: greedy generation equals the repeated uncached forward, for every model,
prompt length and depth, and a row ignores its neighbours (tests/laws/test_generate.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from open_mythos.infer.alone import AloneVerbs, apart
from open_mythos.infer.sample import NextLogits, Sampling, choose, uniforms
from open_mythos.loop.exit import Exit
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.cache import KVCache, LastExited, PerLoop, Policy
from open_mythos.nn.context import Context
from open_mythos.nn.mode import evaluating
from open_mythos.shapes import Hidden, Tokens

if TYPE_CHECKING:
    from open_mythos.infer.compiled import CompiledVerbs

    Verbs = LoopedLM | AloneVerbs | CompiledVerbs

AT_ONCE = 8  # tokens made on an accelerator between two looks at them
Finish = Literal["eos", "stop", "length"]
Prompts = Tokens | Sequence[Sequence[int]]
Numbers = SupportsIndex | Iterable[SupportsIndex]  # whole ones, of Python's, numpy's or torch's kind


class Emitted(NamedTuple):
    """One new token: whose it is, and how many steps of the loop it took to find it."""

    row: int
    token: int
    steps: int
    finish: Finish | None = None  # why this was the row's last


@dataclass
class Completion:
    """What followed a prompt. The token or sequence that ended it is its last part."""

    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    finish: Finish | None = None


def generate(
    model: LoopedLM,
    prompts: Prompts,
    *,
    on_token: Callable[[Emitted], None] | None = None,
    **options: Any,
) -> list[Completion]:
    """Continue every prompt; options as for `stream`. `on_token` sees each token as it comes."""
    if on_token is None and model.embed.weight.device.type != "cpu":
        options.setdefault("at_once", AT_ONCE)
    rows = _as_lists(prompts, options.pop("mask", None))
    completions = [Completion() for _ in rows]
    for emitted in stream(model, rows, **options):
        done = completions[emitted.row]
        done.tokens.append(emitted.token)
        done.steps.append(emitted.steps)
        done.finish = emitted.finish
        if on_token is not None:
            on_token(emitted)
    return completions


def stream(  # noqa: PLR0913 (all of them by name)
    model: LoopedLM,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    mask: Int[Tensor, "B T"] | None = None,
    loops: Numbers | None = None,
    exit: Exit | None = None,  # noqa: A002
    sampling: Sampling | None = None,
    eos: Numbers | None = None,
    stop: Sequence[Sequence[int]] = (),
    policy: Policy | None = None,
    warm: bool = False,
    compile: bool = False,  # noqa: A002
    at_once: int = 1,
) -> Iterator[Emitted]:
    """Tokens as they come, row by row.

    `prompts` is a list of token lists, or a tensor (B, T), then with a `mask` that is 1 on tokens and 0 on
    padding, on either side. `loops` is the depth, for all or per row, by default the mean of training; `exit`
    ends each token's thinking earlier. `eos` ends a row, as does any of the `stop` sequences. The cache keeps
    every step (`PerLoop`), or under an exit rule the last one that a token took (`LastExited`), unless
    `policy` says otherwise. With `warm`, a new token's thinking starts where that of the token before it
    ended, and not at the model's own start (after Huginn's norm, as in its plain loop). `compile` puts all
    tokens but the prompt's through `torch.compile` (compiled.py): seconds to begin with, and then each takes
    60 to 85 % of the time. `at_once` tokens are made before the host looks whether a row has ended; those
    beyond an end are dropped. On a CPU a row alone, of a model in float32, is computed in float32 under
    autocast too: that is faster.

    Raises `ValueError` before any work for an empty prompt, tokens outside the vocabulary, prompts that do
    not fit the context with their continuation, depths below one, a warm start without a loop, and compiling
    without a compiler.
    """
    rows = _as_lists(prompts, mask)
    depths = _depths(model, loops, len(rows))
    _check(model, rows, max_new_tokens, exit)
    if warm and model.loop is None:
        raise ValueError("a warm start is one of the loop, but the model has no loop; leave warm out")
    if at_once < 1 or not all(stop):
        raise ValueError("a stop sequence needs at least one token, and at_once is at least one")
    if policy is None:
        nobody_leaves = exit is None and not (model.loop is not None and model.loop.lent)
        policy = PerLoop() if nobody_leaves else LastExited()
    ends = _Ends(frozenset(() if eos is None else whole(eos)), [list(s) for s in stop])
    with torch.inference_mode():  # or a compiled verb is made anew for the tensors that are made here
        flight = _Flight(model, rows, depths, max_new_tokens, sampling or Sampling(), exit, policy, warm)
    flight.verbs = _compiled(model) if compile else apart(model)
    return _emit(flight, ends, max_new_tokens, at_once)


def _emit(flight: "_Flight", ends: "_Ends", budget: int, at_once: int) -> Iterator[Emitted]:
    with evaluating(flight.model):
        with torch.inference_mode():
            made = flight.prefill()
        written: list[list[int]] = [[] for _ in flight.owners]
        while True:
            for position in range(len(made)):
                yield from _read_off(made[position], flight.owners, written, ends, budget)
            staying = [i for i, row in enumerate(flight.owners) if ends.reason(written[row], budget) is None]
            if not staying:
                return
            left = budget - len(written[flight.owners[staying[0]]])
            with torch.inference_mode():
                flight.keep(staying)
                made = torch.cat([flight.advance() for _ in range(min(at_once, left))]).cpu()


def _read_off(
    made: Int[Tensor, "B 2"], owners: list[int], written: list[list[int]], ends: "_Ends", budget: int
) -> Iterator[Emitted]:
    """Hand out one token of each row that has not ended; what was made beyond an end is dropped."""
    for row, (token, steps) in zip(owners, made.tolist(), strict=True):
        if ends.reason(written[row], budget) is None:
            written[row].append(token)
            yield Emitted(row, token, steps, ends.reason(written[row], budget))


class _Ends(NamedTuple):
    """What ends a row."""

    eos: frozenset[int]
    stop: list[list[int]]

    def reason(self, tokens: list[int], budget: int) -> Finish | None:
        if tokens and tokens[-1] in self.eos:
            return "eos"
        if any(tokens[-len(sequence) :] == sequence for sequence in self.stop):
            return "stop"
        return "length" if len(tokens) >= budget else None


class _Flight:
    """The rows still being continued. `owners[i]` is the prompt that row i of the batch belongs to."""

    def __init__(
        self,
        model: LoopedLM,
        prompts: list[list[int]],
        depths: list[int] | None,
        budget: int,
        sampling: Sampling,
        exit: Exit | None,  # noqa: A002
        policy: Policy,
        warm: bool,
    ) -> None:
        self.model, self.prompts, self.depths = model, prompts, depths
        self.verbs: Verbs = model  # that tokens go through once the prompts are read
        self.sampling, self.exit, self.warm = sampling, exit, warm
        self.owners = list(range(len(prompts)))
        self.device = model.embed.weight.device
        self.cache = KVCache(len(prompts), max(map(len, prompts)) + budget, policy)
        self.lengths = [len(prompt) for prompt in prompts]  # tokens that the cache holds once they are read
        self.count = 0  # tokens drawn so far per row
        self.ended: Hidden | None = None  # where the token before ended, if the next is to start there: B 1 D
        self.newest = torch.tensor([prompt[-1] for prompt in prompts], device=self.device)
        self.luck = self._luck(budget)
        self.seen = self._seen()

    def prefill(self) -> Int[Tensor, "1 B 2"]:
        """Read the prompts and draw the first token of every row."""
        kept_back = 0 if self.exit is None else 1
        parts = [prompt[: len(prompt) - kept_back] for prompt in self.prompts]
        if kept_back:
            if any(parts):
                self._read(parts)
            self.ended = None  # the prompt's last token is one of the prompt
            return self.advance(fresh=False).cpu()
        logits, steps = self._read(parts)
        return self._draw(logits, steps).cpu()

    def advance(self, fresh: bool = True) -> Int[Tensor, "1 B 2"]:
        """Read each row's newest token and draw the next. A `fresh` one is not counted in the length yet."""
        self.lengths = [length + fresh for length in self.lengths]
        positions = [length - 1 for length in self.lengths]
        tokens = self.newest[:, None]
        if len(set(positions)) == 1:
            ctx = Context.counting(tokens, positions[0], self.cache)
        else:
            here = torch.tensor(positions, device=self.device)[:, None]
            ctx = Context.ragged(tokens, here, self.cache, end=max(positions) + 1)
        logits, steps = self._think(tokens, ctx, torch.zeros_like(self.newest), self.exit, self.verbs)
        return self._draw(logits, steps)

    def keep(self, rows: list[int]) -> None:
        """Let the others go."""
        if len(rows) == len(self.owners):
            return
        pick = torch.tensor(rows, device=self.device)
        self.cache.keep(pick)
        self.newest = self.newest[pick]
        self.ended = None if self.ended is None else self.ended[pick]
        self.luck = None if self.luck is None else self.luck[pick]
        self.seen = None if self.seen is None else self.seen[pick]
        self.depths = None if self.depths is None else [self.depths[i] for i in rows]
        self.owners, self.lengths = [self.owners[i] for i in rows], [self.lengths[i] for i in rows]

    def _read(self, parts: list[list[int]]) -> tuple[NextLogits, Int[Tensor, "B"]]:
        """Prompts of any lengths in one call, padded on the right."""
        lengths = [len(part) for part in parts]
        longest = max(lengths)
        tokens = torch.tensor([part + [0] * (longest - len(part)) for part in parts], device=self.device)
        last = torch.tensor([max(length - 1, 0) for length in lengths], device=self.device)
        if min(lengths) == longest:
            ctx = Context.counting(tokens, cache=self.cache)
        else:
            columns = torch.arange(longest, device=self.device).expand(tokens.shape)
            real = columns < torch.tensor(lengths, device=self.device)[:, None]
            ctx = Context.ragged(tokens, torch.where(real, columns, -1), self.cache, end=longest)
        return self._think(tokens, ctx, last, None, self.model)

    def _think(
        self,
        tokens: Tokens,
        ctx: Context,
        last: Int[Tensor, "B"],
        exit: Exit | None,  # noqa: A002
        verbs: "Verbs",
    ) -> tuple[NextLogits, Int[Tensor, "B"]]:
        """The four verbs; logits and steps taken at column `last` of every row."""
        model, rows = self.model, torch.arange(len(tokens), device=self.device)
        state = verbs.encode(tokens, ctx, start=self.ended)
        if model.loop is not None and self.depths is not None:
            judge = None if exit is None else (exit, model.read)
            state = model.loop(state, ctx, Plan(tuple(self.depths)), judge=judge, take=verbs.step)
        if self.warm:
            self.ended = model.between(state.answer)[rows, last][:, None]
        features = verbs.decode(state, ctx)
        return model.head(features[rows, last]), state.taken[rows, last]

    def _draw(self, logits: NextLogits, steps: Int[Tensor, "B"]) -> Int[Tensor, "1 B 2"]:
        uniform = None if self.luck is None else self.luck[:, self.count]
        self.newest = choose(logits, self.sampling, uniform, self.seen)
        self.count += 1
        if self.seen is not None:
            self.seen.scatter_(1, self.newest[:, None], True)
        return torch.stack([self.newest, steps.to(self.newest.dtype)], dim=-1)[None]

    def _luck(self, budget: int) -> Tensor | None:
        """Every uniform number that each row may need, so that drawing never waits."""
        if self.sampling.greedy:
            return None
        numbers = np.stack([uniforms(self.sampling.seed, row, budget) for row in self.owners])
        return torch.from_numpy(numbers).to(self.device)

    def _seen(self) -> Tensor | None:
        if self.sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(self.prompts), self.model.config.vocab, dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            seen[row, prompt] = True
        return seen.to(self.device)


def _compiled(model: LoopedLM) -> "CompiledVerbs":
    from open_mythos.infer.compiled import CompiledVerbs  # seconds of importing, which few need

    return CompiledVerbs(model)


def whole(given: Numbers) -> tuple[int, ...]:
    """One number or several. Raises `ValueError` for what is no whole number."""
    try:
        if isinstance(given, SupportsIndex) and np.ndim(cast(Any, given)) == 0:
            return (index(given),)
        return tuple(map(index, cast(Iterable[SupportsIndex], given)))
    except TypeError:
        raise ValueError(f"whole numbers were expected, or one, got {given!r}") from None


def _as_lists(prompts: Prompts, mask: Int[Tensor, "B T"] | None) -> list[list[int]]:
    """Plain lists without padding. Raises `ValueError` for what is no batch of prompts."""
    if isinstance(prompts, Tensor) and (prompts.ndim != 2 or prompts.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"prompts should be int64 or int32 of shape (B, T), got {prompts.dtype} {tuple(prompts.shape)}"
        )
    if mask is not None:
        if not isinstance(prompts, Tensor) or mask.shape != prompts.shape:
            raise ValueError(f"a mask goes with prompts in a tensor of its own shape, {tuple(mask.shape)}")
        kept = mask.bool().cpu()
        return [row[real].tolist() for row, real in zip(prompts.cpu(), kept, strict=True)]
    if isinstance(prompts, Tensor):
        return prompts.tolist()
    try:
        return [[index(token) for token in prompt] for prompt in prompts]
    except TypeError as error:
        raise ValueError(
            f"prompts should be lists of token ids, one per prompt; a tokenizer makes them of text: {error}"
        ) from error


def _depths(model: LoopedLM, loops: Numbers | None, rows: int) -> list[int] | None:
    if model.loop is None:
        if loops is not None:
            raise ValueError(f"loops={loops} were asked of a model without a loop; leave loops out")
        return None
    if loops is None:
        depths = [model.steps] * rows
    else:
        depths = list(whole(loops)) * (rows if np.ndim(cast(Any, loops)) == 0 else 1)
    if len(depths) != rows:
        raise ValueError(
            f"loops names {len(depths)} depths for {rows} prompts; give one number, or one per prompt"
        )
    if min(depths, default=1) < 1:
        raise ValueError(f"a loop takes at least one step, got loops={min(depths)}")
    return depths


def _check(model: LoopedLM, prompts: list[list[int]], budget: int, exit: Exit | None) -> None:  # noqa: A002
    vocab, context = model.config.vocab, model.config.context
    if exit is not None and model.loop is None:
        raise ValueError("an exit rule ends a loop early, but the model has no loop; leave exit out")
    if budget < 1:
        raise ValueError(f"max_new_tokens should be at least 1, got {budget}")
    if not prompts:
        raise ValueError("there is no prompt to continue; give at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; give at least one token to continue")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocab:
                raise ValueError(
                    f"token {token} of prompt {row} is outside the vocabulary of 0 to {vocab - 1}"
                )
        if len(prompt) + budget - 1 > context:  # the last new token is not read again
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with {budget} new ones that is more than the "
                f"model's context of {context}"
            )
