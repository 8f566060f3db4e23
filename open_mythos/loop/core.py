"""The loop itself: one set of layers, applied again and again.

Starting from h_0 = start(e), for n = 0, 1, ...

    m        =  mark(h_n, n)
    x        =  inject(m, e)
    y        =  adapt(layers(x), n)
    h_{n+1}  =  update(h_n, e, y)

and a halting rule folds the states into an answer as they come. The whole loop lives in one `forward`,
so that sharding gathers its weights once for any depth.

Rows of a batch may have depths of their own: a row that has taken its steps leaves, and the rest goes on
in a smaller batch. Without gradient a token that is done also leaves, as soon as nobody needs it: when no
later token of its row is still running, and the cache does not keep every depth exact.
"""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from open_mythos.config import Config
from open_mythos.loop.adapt import Adaptation, Unadapted
from open_mythos.loop.exit import Exit, Notes
from open_mythos.loop.halt import Halting, Last, finish
from open_mythos.loop.inject import Injection, Nothing
from open_mythos.loop.keys import EachStep, Keys, room
from open_mythos.loop.mark import Mark, Unmarked
from open_mythos.loop.recall import Forget, Recall
from open_mythos.loop.route import Everyone, Routing
from open_mythos.loop.schedule import Fixed, Plan, Schedule
from open_mythos.loop.start import Embedded, Start
from open_mythos.loop.state import State
from open_mythos.loop.update import Replace, Update
from open_mythos.nn.attention import MLA
from open_mythos.nn.block import Block
from open_mythos.nn.cache import Span
from open_mythos.nn.context import Context
from open_mythos.nn.lend import First, Lender
from open_mythos.nn.tally import Tally
from open_mythos.nn.transforms import transformed
from open_mythos.shapes import Hidden, PerSequence, Steps

Watcher = Callable[[int, State], None]
Judge = tuple[Exit, Callable[[State, Context], Tensor]]
Take = Callable[[State, Context, Steps, PerSequence], State]


class Loop(Config):
    layers: tuple[Block, ...]
    start: Start = Embedded()
    mark: Mark = Unmarked()
    inject: Injection = Nothing()
    recall: Recall = Forget()
    route: Routing = Everyone()
    keys: Keys = EachStep()
    adapt: Adaptation = Unadapted()
    update: Update = Replace()
    halt: Halting = Last()
    schedule: Schedule = Fixed(steps=4)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a loop needs at least one layer; leave `loop` out for a model without one")

    def build(self, dim: int) -> "LoopCore":
        return LoopCore(self, dim)


@final
class LoopCore(nn.Module):
    def __init__(self, config: Loop, dim: int) -> None:
        super().__init__()
        self.config = config
        self.start = config.start.build(dim)
        self.mark = config.mark.build(dim)
        self.inject = config.inject.build(dim)
        self.layers = nn.ModuleList(layer.build(dim) for layer in config.layers)
        self.recall = config.recall.build(dim)
        self.route = config.route.build(dim)
        self.adapt = config.adapt.build(dim)
        self.update = config.update.build(dim)
        self.halt = config.halt.build(dim)
        self.lent = room(config.keys, config.layers, dim)  # what a token's first step lends to later ones
        self.remat = False  # recompute each step in the backward pass instead of keeping its activations
        self.lockstep = False  # processes meet within the steps, so none may take fewer than the plan says
        # Whether tokens look back only, so that nobody needs those behind the last one running.
        self.causal = all(isinstance(b.mixer, MLA) or b.mixer.attention == "causal" for b in config.layers)

    def begin(self, e: Hidden, rng: Generator | None = None) -> State:
        return State.begin(e, self.start(e, rng))

    def step(self, state: State, ctx: Context, step: Steps, last: PerSequence) -> State:
        """One turn. `step` counts from zero, per row; `last` says for which rows this is the last."""
        marked = self.mark(state.h, step, ctx)
        x = self.inject(marked, state.e)
        x, beside, past = self.recall(x, state.past, step)
        first = self._open(state.first)
        if self.lent:
            ctx = ctx.but(lender=Lender(first, step, ctx.cache))
        y, going = self.route(x, state.e, state.left, step, ctx, self.run_layers)
        first = first if ctx.lender is None else ctx.lender.result()
        y = y if beside is None else y + beside
        h = self.update(state.h, state.e, self.adapt(y, step))
        after: State = self.halt(state, marked, h, last, ctx)
        taken = state.left > 0
        if going is not None:  # who is not chosen is done, and stays as it was
            stays = going[..., None]
            after = after.but(
                h=torch.where(stays, after.h, state.h),
                answer=torch.where(stays, after.answer, state.answer),
                left=after.left * going,
            )
            taken = taken & going
        return after.but(taken=state.taken + taken, past=past, first=first)

    def _open(self, first: First) -> First:
        """Room for what the first step lends."""
        return first if first.shape[2] == self.lent else first.new_zeros(*first.shape[:2], self.lent)

    def run_layers(self, x: Hidden, ctx: Context) -> Hidden:
        ctx = ctx.borrowing()
        for i, layer in enumerate(self.layers):
            x = layer(x, ctx.at("loop", i))
        return x

    def forward(
        self,
        state: State,
        ctx: Context,
        plan: Plan,
        watch: Watcher | None = None,
        judge: Judge | None = None,
        take: Take | None = None,
    ) -> State:
        """As many turns as `plan` says, each taken by `take`, by default `step`.

        `judge` may end tokens earlier. `watch(n, state)` sees the state after step n, counted from zero, of
        the rows still in the loop. A token that is done stays as long as somebody watches.
        """
        if ctx.start is None:  # padding has nothing to think about
            state = state.but(left=state.left * (ctx.positions >= 0))
        if ctx.tally is not None:
            ctx = ctx.but(entered=(ctx.positions >= 0).sum().clamp_min(1))
        state = state.but(past=self.recall.open(state.past), first=self._open(state.first))
        take, notes = take or self.step, Notes(*state.left.shape)
        frozen, live = plan.split(len(state.h))
        if not torch.is_grad_enabled():
            frozen, live = (0,) * len(live), tuple(f + n for f, n in zip(frozen, live, strict=True))
        if any(frozen):
            with torch.no_grad():
                moved = _Run(self, take, frozen, (0,) * len(frozen), live, notes).go(state, ctx, watch, judge)
            state = _where(frozen, moved, state)
            # Copies that autocast made without gradient must not be met again with it.
            torch.clear_autocast_cache()
        # Or the first step with gradient would be a graph of its own. (Within torch.func nobody compiles.)
        if torch.is_grad_enabled() and not transformed():
            state = state.but(h=_with_gradient(state.h), answer=_with_gradient(state.answer))
        return _Run(self, take, live, frozen, (0,) * len(live), notes).go(state, ctx, watch, judge)


def _with_gradient(x: Hidden) -> Hidden:
    return x if x.requires_grad else x.detach().requires_grad_()


class _Run:
    """One phase of a plan: row i takes `turns[i]` turns, the first of them its `offset[i]`-th,
    and `after[i]` more will follow in a later phase."""

    def __init__(
        self,
        loop: LoopCore,
        take: Take,
        turns: tuple[int, ...],
        offset: tuple[int, ...],
        after: tuple[int, ...],
        notes: Notes,
    ) -> None:
        self.loop, self.take, self.notes = loop, take, notes
        self.turns, self.offset, self.after = turns, offset, after

    def go(self, state: State, ctx: Context, watch: Watcher | None, judge: Judge | None) -> State:
        batch = _Batch(self.loop, list(range(len(self.turns))), state, ctx)
        may_leave = watch is None and self._may_leave(ctx, judge)
        turn = 0
        while True:
            batch.keep([row for row in batch.rows if self.turns[row] > turn], self._taken(batch, turn))
            if not batch.rows:
                return batch.out
            before, batch.state = batch.state, self._turn(batch, turn)
            turn += 1
            taken = self._taken(batch, turn)
            if judge is not None:
                batch.state = self._judge(judge, before, batch, taken)
            if watch is not None:
                watch(max(taken) - 1, batch.state)
            if may_leave and any(self.turns[row] > turn for row in batch.rows):
                batch.dismiss(taken, causal=self.loop.causal)

    def _taken(self, batch: "_Batch", turn: int) -> list[int]:
        return [self.offset[row] + turn for row in batch.rows]

    def _turn(self, batch: "_Batch", turn: int) -> State:
        device = batch.state.h.device
        host = self._taken(batch, turn)
        ends = [self.turns[row] == turn + 1 and not self.after[row] for row in batch.rows]
        step, last = _on(device, host), _on(device, ends)
        ctx, tally = batch.ctx.turn(step, host), batch.ctx.tally
        # A step tells a tally of its own, or a compiled one would be made anew for every number of visits.
        own = None if tally is None else Tally()
        ctx = ctx if own is None else ctx.with_tally(own)
        if self.loop.remat and torch.is_grad_enabled() and not transformed():
            state = State(*checkpoint(self.take, batch.state, ctx, step, last, use_reentrant=False))
        else:
            state = self.take(batch.state, ctx, step, last)
        if tally is not None and own is not None:
            tally.add(own)
        return state

    def _may_leave(self, ctx: Context, judge: Judge | None) -> bool:
        config = self.loop.config
        adaptive = judge is not None or not (
            isinstance(config.halt, Last) and isinstance(config.route, Everyone)
        )
        # On the meta device, and within a transform of torch.func, nobody can tell who is done.
        if torch.is_grad_enabled() or self.loop.lockstep or ctx.positions.is_meta or transformed():
            return False
        if not self.loop.route.may_leave:
            return False
        return adaptive and (ctx.cache is None or not ctx.cache.exact)

    def _judge(self, judge: Judge, before: State, batch: "_Batch", taken: list[int]) -> State:
        """Tokens that were done keep their answer; the rule is asked about the others."""
        rule, read = judge
        done, after = before.left == 0, batch.state
        state = after.but(answer=torch.where(done[..., None], before.answer, after.answer))
        due = [n >= rule.least and n % rule.every == 0 for n in taken]
        if not any(due):
            return state
        notes = self.notes.of(batch.rows, state.left.shape[1])
        enough = rule.enough(before, state, lambda s: read(finish(self.loop.halt, s), batch.ctx), notes)
        ends = enough & ~done if all(due) else enough & ~done & _on(done.device, due)[:, None]
        ended = finish(self.loop.halt, state)
        return state.but(
            answer=torch.where(ends[..., None], ended.answer, state.answer),
            left=torch.where(ends, 0, state.left),
        )


class _Batch:
    """Who is still in the loop. `out` collects the states of those who left, at the places they had."""

    def __init__(self, loop: LoopCore, rows: list[int], state: State, ctx: Context) -> None:
        self.loop, self.rows, self.state, self.ctx, self.out = loop, rows, state, ctx, state
        self._ours = False  # whether `out` is a copy, to be written into

    def keep(self, rows: list[int], taken: list[int]) -> None:
        """Go on with `rows`; the others leave, after the steps in `taken`."""
        if len(rows) == len(self.rows):
            return
        leaving = [i for i, row in enumerate(self.rows) if row not in rows]
        self._put(leaving, 0)
        self._settle(leaving, 0, taken)
        if rows:
            staying = [i for i, row in enumerate(self.rows) if row in rows]
            pick = torch.tensor(staying, device=self.state.h.device)
            self.state, self.ctx = self.state.take(pick), self.ctx.take(pick)
        self.rows = rows

    def dismiss(self, taken: list[int], causal: bool) -> None:
        """Let go of tokens that are done and that no running token of their row looks at."""
        running = self.state.left > 0  # B T
        length = running.shape[1]
        # One read on the host, for which a GPU waits: how far each row's last running token reaches.
        reach = (running * torch.arange(1, length + 1, device=running.device)).amax(1).tolist()
        needed = max(reach) if causal else length
        everyone = list(range(len(self.rows)))
        if 0 < needed < length:
            self._put(everyone, needed)
            self._settle(everyone, needed, taken)
            whole = torch.tensor(everyone, device=running.device)
            self.state, self.ctx = self.state.take(whole, needed), self.ctx.take(whole, needed)
        self.keep([row for row, far in zip(self.rows, reach, strict=True) if far], taken)

    def _put(self, here: list[int], first: int) -> None:
        """Write the tokens from `first` on of the rows at `here` into `out`."""
        length = self.state.h.shape[1]
        if first == 0 and len(here) == len(self.out.h) and length == self.out.h.shape[1]:
            self.out, self._ours = self.state, False
            return
        device = self.state.h.device
        rows = torch.tensor([self.rows[i] for i in here], device=device)[:, None]
        columns = torch.arange(first, length, device=device)
        pick = torch.tensor(here, device=device)
        write = Tensor.index_put_ if self._ours else Tensor.index_put
        self.out = State(
            self.out.e,
            *(
                write(whole, (rows, columns), part[pick, first:].to(whole.dtype))
                for whole, part in zip(self.out[1:], self.state[1:], strict=True)
            ),
        )
        self._ours = not torch.is_grad_enabled()

    def _settle(self, here: list[int], first: int, taken: list[int]) -> None:
        """Tell the cache how deep the tokens from `first` on of the rows at `here` went."""
        if self.ctx.cache is None:
            return
        span = self.ctx.span
        if first == 0 and len(here) == len(self.rows) and len({taken[i] for i in here}) == 1:
            self.ctx.cache.settle(len(self.loop.layers), taken[here[0]], span)
            return
        owners = span.rows if span.rows is not None else torch.arange(len(span.positions))
        for depth in sorted({taken[i] for i in here}):
            pick = torch.tensor([i for i in here if taken[i] == depth])
            part = Span(span.positions[pick, first:], None, span.end, owners.to(span.positions.device)[pick])
            self.ctx.cache.settle(len(self.loop.layers), depth, part)


def _where(frozen: Sequence[int], moved: State, state: State) -> State:
    """`moved` for the rows with steps in `frozen`; the others are as they were, with their gradient."""
    if all(frozen):
        return moved
    went = _on(state.h.device, [n > 0 for n in frozen])
    parts = zip(moved, state, strict=True)
    return State(*(torch.where(went.view(-1, *[1] * (old.ndim - 1)), new, old) for new, old in parts))


def _on(device: torch.device, values: Sequence[int]) -> Tensor:
    """Numbers of the host on the device; equal ones without a copy that would wait for it."""
    if len(set(values)) == 1:
        dtype = torch.bool if isinstance(values[0], bool) else torch.long
        return torch.full((len(values),), values[0], dtype=dtype, device=device)
    return torch.tensor(values, device=device)
