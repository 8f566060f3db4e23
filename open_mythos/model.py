"""The looped language model, in four verbs.

    tokens --encode--> state --step--> state --step--> ... --decode--> features --head--> logits
              prelude           the loop                      coda

Training, generation and the probes call these four and nothing else, as a batching engine can, so there is
one path through the network and one place to read it. Without a loop it is the fixed-depth baseline.
"""

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Generator, Tensor, nn
from torch.distributed.tensor import DTensor

from open_mythos.config import Config
from open_mythos.loop.core import Loop, Watcher
from open_mythos.loop.exit import Exit
from open_mythos.loop.inject import DiagonalInjection
from open_mythos.loop.schedule import Plan
from open_mythos.loop.state import State
from open_mythos.loop.update import LTIUpdate
from open_mythos.nn.attention import TokenValues
from open_mythos.nn.block import Block
from open_mythos.nn.cache import Cache
from open_mythos.nn.context import Context
from open_mythos.nn.init import Init, Normal, initialise
from open_mythos.nn.linear import Projection
from open_mythos.nn.moe import MixtureOfExperts
from open_mythos.nn.ngram import NGrams
from open_mythos.nn.norm import Norm, RMSNorm
from open_mythos.nn.tally import Tally, Where
from open_mythos.nn.transforms import transformed
from open_mythos.shapes import Features, Hidden, Logits, PerSequence, Steps, Tokens


class FinalNorm(Config):
    """The state passes the model's last norm, which it will pass again after the coda (Huginn)."""


class Matrix(Config):
    """The state passes a square matrix (Parcae's C)."""


class Model(Config):
    vocab: int
    dim: int
    context: int = 1_000_000  # the most tokens a sequence may have
    embed_scale: float = 1.0
    ngrams: NGrams | None = None
    prelude: tuple[Block, ...] = ()
    enter: Norm | None = None  # between prelude and loop
    loop: Loop | None = None
    leave: FinalNorm | Matrix | None = None  # between loop and coda
    coda: tuple[Block, ...] = ()
    norm: Norm | None = RMSNorm()
    tied: bool = True
    init: Init = Normal()

    def __post_init__(self) -> None:
        for name in ("vocab", "dim", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"Model.{name} must be at least 1, got {getattr(self, name)}")
        if isinstance(self.leave, FinalNorm) and self.norm is None:
            raise ValueError("leave=FinalNorm uses the model's last norm, but norm is none")

    def build(self) -> "LoopedLM":
        return LoopedLM(self)


@final
class LoopedLM(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.embed = nn.Embedding(config.vocab, dim)
        self.ngrams = config.ngrams.build(dim) if config.ngrams is not None else None
        self.prelude = nn.ModuleList(block.build(dim) for block in config.prelude)
        self.enter = config.enter.build(dim) if config.enter is not None else None
        self.loop = config.loop.build(dim) if config.loop is not None else None
        self.readout = Projection(dim, dim) if isinstance(config.leave, Matrix) else None
        self.coda = nn.ModuleList(block.build(dim) for block in config.coda)
        self.norm = config.norm.build(dim) if config.norm is not None else None
        self.head = Projection(dim, config.vocab)
        self._tie()
        self.register_load_state_dict_pre_hook(_give_head)
        self.register_load_state_dict_post_hook(_tie_again)
        self._check_tables()
        if not self.embed.weight.is_meta:
            self.reset_parameters()

    def _check_tables(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, TokenValues) and module.config.vocab < self.config.vocab:
                raise ValueError(
                    f"the value embedding {name} has rows for {module.config.vocab} tokens, the vocabulary "
                    f"has {self.config.vocab}; give mixer.values.vocab and vocab the same value"
                )

    def _tie(self) -> None:
        if self.config.tied:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "LoopedLM":
        """Giving storage to a model from the meta device makes each parameter anew, so tie them again."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    def reset_parameters(self) -> None:
        """Fill every weight anew; for a model that was made on the meta device and then given storage."""
        initialise(self, self.config.init, self.config.dim)

    @property
    def steps(self) -> int:
        """How many steps the model takes unless told otherwise: the mean of its training."""
        return self.config.loop.schedule.mean_steps if self.config.loop is not None else 0

    def encode(
        self, tokens: Tokens, ctx: Context, rng: Generator | None = None, start: Hidden | None = None
    ) -> State:
        """Tokens to the state before the first step. `start` takes the place of the model's own h_0."""
        x = self.embed(tokens) * self.config.embed_scale
        if self.ngrams is not None:
            x = self.ngrams(x, tokens, ctx.at("embed", 0))
        for i, block in enumerate(self.prelude):
            x = block(x, ctx.at("prelude", i))
        if self.enter is not None:
            x = self.enter(x)
        if self.loop is None:
            return State.begin(x, x)
        return self.loop.begin(x, rng) if start is None else State.begin(x, start.to(x))

    def step(self, state: State, ctx: Context, step: Steps, last: PerSequence) -> State:
        """One turn of the loop. `step` counts from zero, per row; `last` says for which rows it ends."""
        if self.loop is None:
            raise ValueError("a model without a loop has no steps to take")
        return self.loop.step(state, ctx, step, last)

    def decode(self, state: State, ctx: Context) -> Features:
        """What the answers mean: the features that the head reads."""
        x = self.between(state.answer)
        if self.readout is not None:
            x = self.readout(x)
        for i, block in enumerate(self.coda):
            x = block(x, ctx.at("coda", i))
        return x if self.norm is None else self.norm(x)

    def between(self, h: Hidden) -> Hidden:
        """The state as the coda's norm leaves it, where the model's last norm follows the loop as well."""
        return self.norm(h) if isinstance(self.config.leave, FinalNorm) and self.norm is not None else h

    def features(  # noqa: PLR0913 (all of them by name)
        self,
        tokens: Tokens,
        plan: Plan | None = None,
        ctx: Context | None = None,
        *,
        cache: Cache | None = None,
        rng: Generator | None = None,
        start: Hidden | None = None,
        watch: Watcher | None = None,
        exit: Exit | None = None,  # noqa: A002
        tally: Tally | None = None,
    ) -> Features:
        """All four verbs but the last.

        `plan` says how many steps (by default the mean of the schedule), `ctx` where the tokens sit (by
        default they count from zero), `rng` draws the start state where the model has a random one.
        `watch(n, state)` sees the state after every step; `exit` may end tokens early.
        A model without a loop has no use for `plan` and `exit`.
        Raises `ValueError` for empty input, tokens outside the vocabulary, more tokens than `context`, and a
        cache beside a context, which has its own.
        """
        self.check(tokens)
        if ctx is not None and cache is not None:
            raise ValueError("a context has its own cache: give the cache to it, or leave ctx out")
        ctx = ctx if ctx is not None else Context.counting(tokens, cache=cache)
        if tally is not None:
            ctx = ctx.with_tally(tally)
        if ctx.end > self.config.context:
            raise ValueError(f"{ctx.end} tokens do not fit the model's context of {self.config.context}")
        state = self.encode(tokens, ctx, rng, start)
        if self.loop is not None:
            judge = None if exit is None else (exit, self.read)
            state = self.loop(state, ctx, plan or Plan(self.steps), watch, judge)
        return self.decode(state, ctx)

    def forward(self, tokens: Tokens, plan: Plan | int | None = None, **options: object) -> Logits:
        """Logits for the token after each of `tokens`; options as for `features`."""
        plan = plan if plan is None or isinstance(plan, Plan) else Plan(plan)
        return self.head(self.features(tokens, plan, **options))  # type: ignore[arg-type]

    @torch.no_grad()
    def rebalance(self, loads: Mapping[Where, Tensor]) -> None:
        """Move the router biases by the load that each layer's experts had in the last update."""
        for (stage, layer), load in loads.items():
            experts = self._blocks(stage)[layer].ffn
            assert isinstance(experts, MixtureOfExperts)
            experts.rebalance(load)

    def _blocks(self, stage: str) -> nn.ModuleList:
        if stage == "loop" and self.loop is not None:
            return self.loop.layers
        return self.prelude if stage == "prelude" else self.coda

    def spectral_radius(self) -> float | None:
        """max |A| of the loop's diagonal linear part; none where it has no such part."""
        parts = [] if self.loop is None else [self.loop.inject, self.loop.update]
        diagonal = [part for part in parts if isinstance(part, (DiagonalInjection, LTIUpdate))]
        decays = [part.decay().detach() for part in diagonal]
        wholes = [d.full_tensor() if isinstance(d, DTensor) else d for d in decays]
        return max((float(whole.max()) for whole in wholes), default=None)

    def check(self, tokens: Tensor) -> None:
        """Raise `ValueError` unless `tokens` are some, and of this vocabulary. (Skipped where it would wait
        for an accelerator: there, check before the transfer.)"""
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens should be a tensor of shape (B, T), got {type(tokens).__name__}")
        if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"tokens should be int64 or int32 of shape (B, T), got {tokens.dtype} {tuple(tokens.shape)}"
            )
        if tokens.numel() == 0:
            raise ValueError(f"there are no tokens to read (shape {tuple(tokens.shape)}); give at least one")
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
            low, high = torch.stack(tokens.aminmax()).tolist()
            if low < 0 or high >= self.config.vocab:
                bad = low if low < 0 else high
                raise ValueError(f"token {bad} is outside the vocabulary of 0 to {self.config.vocab - 1}")

    def read(self, state: State, ctx: Context) -> Logits:
        """The last two verbs: what the answers of `state` say comes next."""
        return self.head(self.decode(state, ctx))


def _give_head(model: LoopedLM, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """Where the two are one, the head's weight is loaded last."""
    if model.config.tied and prefix + "head.weight" in state:
        state[prefix + "embed.weight"] = state[prefix + "head.weight"]


def _tie_again(model: LoopedLM, found: object) -> None:
    """Loading with `assign` makes each parameter anew."""
    model._tie()
