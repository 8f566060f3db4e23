"""Thinking deeper, not longer: the depth-recurrent transformer of Chen 2026 (arXiv 2603.21676).

One bidirectional block, whose input is seen only once and whose state moves slowly:

    h_0      =  dropout(norm(embed(tokens) [+ role]))
    u        =  h_n + depth[n]
    a        =  u + s Attn(norm u)                  s: one per channel, 1e-4 at first; graphs have none
    c        =  a + s FFN(norm a)
    h_{n+1}  =  z c + (1 - z) h_n,   z = sigmoid(W [c ; h_n] + b)    b = -2: 88 % of the state stays at first
    answer   =  MLP(norm(h of the first token)), or of source and target for graphs

Exact about the block (GELU on sequences, the library layer's ReLU on graphs), gate, depth table, head, sizes
and checkpoint (hub/chen.py), and about the author's baselines with ACT in the gate's place, on graphs of
172,674 parameters. On graphs a node attends along its edges and to itself only (`edges`), so one step is one
hop. The objective is silent: the loss looks at the last step alone (alpha 0 of `supervise`). Attention begins
at PyTorch's values for linear maps; the graph model's library layer would begin with biases of zero, and with
queries, keys and values 1.22 times as wide.

    name         dim  heads  ffn   vocab  depth table  trained at   roles
    chen-graph   128  4      256   27     20           5..8 steps   source, target
    chen-logic   256  8      1024  9      28           4..16
    chen-family  256  8      1024  80     20           1..12        (our puzzle's words; his task has 54)
"""

from dataclasses import replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.loop.core import Loop
from open_mythos.loop.halt import Last, UniversalACT
from open_mythos.loop.mark import StepTable
from open_mythos.loop.schedule import Fixed, Plan, Uniform
from open_mythos.loop.state import State
from open_mythos.loop.update import Gate, Replace
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.context import Context
from open_mythos.nn.ffn import MLP, Activation
from open_mythos.nn.init import AsMade
from open_mythos.nn.norm import LayerNorm
from open_mythos.nn.rope import Rope
from open_mythos.shapes import Features, Hidden, Tokens


class Size(Config):
    vocab: int
    dim: int = 256
    heads: int = 8
    width: int = 1024
    activation: Activation = "gelu"
    table: int = 20  # rows of depth embeddings
    low: int = 1
    high: int = 12
    scale: float | None = 1e-4
    rope: Rope | None = Rope(pairs="halves")
    dropout: float = 0.1
    context: int = 128
    act: bool = False  # the author's baseline: ACT in the gate's place, over all steps of the table
    full: bool = True  # False: a causal language model of the same block


_ACT = UniversalACT(mix="accumulated", bias=-1.0, freeze=True, marked=False)


def chen(size: Size) -> Model:
    """The recurrent encoder. As a language model its head is the embedding; `Classifier` has its own."""
    mixer = GQA(
        heads=size.heads,
        rope=size.rope,
        attention="full" if size.full else "causal",
        bias=True,
        out_bias=True,
        dropout=size.dropout,
    )
    layer = PreNorm(
        mixer=mixer,
        ffn=MLP(width=size.width, activation=size.activation, bias=True, dropout=size.dropout),
        norm=LayerNorm(),
        scale=size.scale,
        dropout=size.dropout,
    )
    return Model(
        vocab=size.vocab,
        dim=size.dim,
        context=size.context,
        enter=LayerNorm(),
        loop=Loop(
            layers=(layer,),
            mark=StepTable(steps=size.table),
            update=Replace() if size.act else Gate(bias=-2.0),
            halt=_ACT if size.act else Last(),
            schedule=Fixed(steps=size.table) if size.act else Uniform(low=size.low, high=size.high),
        ),
        norm=None,
        init=AsMade(),
    )


class Classifier(Config):
    """A yes or a no about a sequence; with `roles`, about two of its tokens, told by role vectors."""

    core: Model
    roles: int = 0
    dropout: float = 0.1

    def build(self) -> "ChenClassifier":
        return ChenClassifier(self)


@final
class ChenClassifier(nn.Module):
    def __init__(self, config: Classifier) -> None:
        super().__init__()
        self.config, dim = config, config.core.dim
        self.core = config.core.build()
        self.roles = nn.Parameter(torch.empty(config.roles, dim)) if config.roles else None
        read = 2 * dim if config.roles else dim
        self.verdict = nn.Sequential(
            nn.LayerNorm(read), nn.Linear(read, dim), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(dim, 1)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.roles is not None:
            nn.init.normal_(self.roles, std=0.02)

    def forward(
        self,
        tokens: Tokens,
        plan: Plan | int | None = None,
        ctx: Context | None = None,
        pair: Int[Tensor, "B 2"] | None = None,
    ) -> Float[Tensor, "B"]:
        """Logits of "yes". `pair` says which tokens are source and target; `ctx` holds padding and edges."""
        return self.every_step(tokens, plan, ctx, pair)[-1]

    def every_step(
        self,
        tokens: Tokens,
        plan: Plan | int | None = None,
        ctx: Context | None = None,
        pair: Int[Tensor, "B 2"] | None = None,
    ) -> Float[Tensor, "N B"]:
        """The logits that each step would give; one depth for the batch. The last are the answer."""
        ctx = Context.counting(tokens) if ctx is None else ctx
        plan = Plan(plan) if isinstance(plan, int) else plan
        states: list[Hidden] = []

        def watch(step: int, state: State) -> None:
            states.append(state.h)

        last = self.core.features(tokens, plan, ctx, start=self._start(tokens, pair), watch=watch)
        return torch.stack([self._judge(h, pair) for h in [*states[:-1], last]])

    def _start(self, tokens: Tokens, pair: Int[Tensor, "B 2"] | None) -> Hidden:
        x = self.core.embed(tokens)
        if self.roles is not None:
            x = x.scatter_add(1, self._at(pair, x), self.roles.to(x).expand(len(x), -1, -1))
        assert self.core.enter is not None
        return F.dropout(self.core.enter(x), self.config.dropout, self.training)

    def _judge(self, h: Features, pair: Int[Tensor, "B 2"] | None) -> Float[Tensor, "B"]:
        read = h[:, 0] if self.roles is None else h.gather(1, self._at(pair, h)).flatten(1)
        return self.verdict(read).squeeze(-1)

    def _at(self, pair: Int[Tensor, "B 2"] | None, x: Hidden) -> Int[Tensor, "B 2 D"]:
        if pair is None:
            raise ValueError("this classifier judges a pair of tokens, so it must be told which: pair=(B, 2)")
        return pair[..., None].expand(-1, -1, x.shape[-1])


def edges(tokens: Tokens, adjacency: Bool[Tensor, "B T T"], real: Bool[Tensor, "B T"]) -> Context:
    """The context in which node v attends to node u where there is an edge u -> v, and to itself."""
    itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    sight = adjacency.mT & real[:, None, :] & real[:, :, None]
    return replace(Context.padded(tokens, real.long()), mask=(sight | itself)[:, None])


def supervise(
    logits: Float[Tensor, "N B"], labels: Bool[Tensor, "B"], alpha: float = 0.0
) -> Float[Tensor, ""]:
    """(1 - alpha) CE(last step) + alpha / N sum_n CE(step n): silent at 0, every step at 1 (section 4)."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a share between 0 and 1, got {alpha}")
    costs = F.binary_cross_entropy_with_logits(
        logits, labels.expand_as(logits).float(), reduction="none"
    ).mean(1)
    return (1 - alpha) * costs[-1] + alpha * costs.mean()


SIZES = {
    "chen-graph": Size(
        vocab=27,
        dim=128,
        heads=4,
        width=256,
        activation="relu",
        low=5,
        high=8,
        scale=None,
        rope=None,
        context=20,
    ),
    "chen-logic": Size(vocab=9, table=28, low=4, high=16),
    "chen-family": Size(vocab=80),
}
MODELS = {name: chen(size) for name, size in SIZES.items()}
CLASSIFIERS = {
    name: Classifier(core=model, roles=2 if name == "chen-graph" else 0) for name, model in MODELS.items()
}
