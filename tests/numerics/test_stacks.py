"""Models that are one GPT stack turned over and over, written out once more from their papers' equations:
(k x L) of Saunshi et al. 2025, with its looping-inspired regulariser, and Kohli et al. 2026.

Plain operations on weights by name, none of the library's modules; sizes are odd where they may be, and every
weight is large, so that no term hides.
"""

import itertools
import math

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from open_mythos.loop.exit import ReadoutChange
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.presets import kohli, saunshi
from open_mythos.train.regularise import loop_similarity
from tests.lively import lively, work_of

VOCAB, DIM, HEADS = 37, 30, 3
TOKENS = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))

Stream = Float[Tensor, "B T D"]
Logits = Float[Tensor, "B T V"]
Heads = Float[Tensor, "B H T K"]


class Weights:
    """Those of one layer or model, by name; a bias that there is not is none."""

    def __init__(self, model: LoopedLM, prefix: str = "") -> None:
        self.model, self.prefix, self.all = model, prefix, dict(model.named_parameters())

    def __call__(self, name: str) -> Tensor | None:
        return self.all.get(self.prefix + name)

    def at(self, prefix: str) -> "Weights":
        return Weights(self.model, self.prefix + prefix + ".")

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self(f"{name}.bias")
        return torch.einsum("...i,oi->...o", x, self.all[f"{self.prefix}{name}.weight"]) + (
            0 if bias is None else bias
        )

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.all[f"{self.prefix}{name}.weight"] + self.all[f"{self.prefix}{name}.bias"]


def turned(x: Heads) -> Heads:
    """Neighbouring channels turn together by position * 10000^(-2i / K)."""
    out = x.clone()
    for p, i in itertools.product(range(x.shape[2]), range(x.shape[3] // 2)):
        angle = p * 10_000 ** (-2 * i / x.shape[3])
        a, b = x[:, :, p, 2 * i], x[:, :, p, 2 * i + 1]
        out[:, :, p, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[:, :, p, 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def layer(w: Weights, x: Stream, rotary: bool, tanh: bool) -> Stream:
    n = w.norm("mixer_norm", x)
    q, k, v = (w.linear(f"mixer.{p}", n).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in "qkv")
    q, k = (turned(q), turned(k)) if rotary else (q, k)
    scores = torch.einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(DIM / HEADS)
    scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    x = x + w.linear("mixer.out", torch.einsum("bhts,bhsk->bthk", scores.softmax(-1), v).flatten(2))
    m = w.linear("ffn.up", w.norm("ffn_norm", x))
    cubic = math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)
    m = m * (1 + torch.tanh(cubic)) / 2 if tanh else m * (1 + torch.erf(m / math.sqrt(2))) / 2
    return x + w.linear("ffn.down", m)


def stack(w: Weights, name: str, count: int, x: Stream, rotary: bool, tanh: bool = False) -> Stream:
    for i in range(count):
        x = layer(w.at(f"{name}.{i}"), x, rotary, tanh)
    return x


def read(w: Weights, x: Stream) -> Logits:
    return w.norm("norm", x) @ w.all["embed.weight"].T


def looped(model: LoopedLM, k: int, loops: int, untied: int) -> Logits:
    """(k x L), between untied layers."""
    w = Weights(model)
    x = stack(w, "prelude", untied, w.all["embed.weight"][TOKENS], True)
    for _ in range(loops):
        x = stack(w, "loop.layers", k, x, True)
    return read(w, stack(w, "coda", untied, x, True))


@pytest.mark.parametrize(("k", "loops", "untied"), [(1, 2, 0), (3, 2, 0), (2, 5, 0), (3, 3, 1), (1, 4, 2)])
def test_a_block_of_k_layers_taken_l_times(k: int, loops: int, untied: int) -> None:
    size = saunshi.Size(
        k=k, loops=loops, untied=untied, vocab=VOCAB, dim=DIM, heads=HEADS, width=41, context=11
    )
    model = lively(saunshi.saunshi(size))
    same(model(TOKENS), looped(model, k, loops, untied))
    same(model(TOKENS, Plan(loops + 1)), looped(model, k, loops + 1, untied))


def test_one_loop_is_the_ordinary_stack_and_the_flops_twin_repeats_it() -> None:
    size = saunshi.Size(k=3, loops=1, vocab=VOCAB, dim=DIM, heads=HEADS, width=41, context=11)
    model = lively(saunshi.saunshi(size))
    w = Weights(model)
    same(model(TOKENS), read(w, stack(w, "prelude", 3, w.all["embed.weight"][TOKENS], True)))
    twice = lively(saunshi.saunshi(size.replace(loops=2)))
    deep = saunshi.saunshi(size.replace(k=6)).build()
    for i, block in enumerate(deep.prelude):
        block.load_state_dict(twice.loop.layers[i % 3].state_dict())  # type: ignore[union-attr]
    deep.embed.load_state_dict(twice.embed.state_dict())
    deep.norm.load_state_dict(twice.norm.state_dict())  # type: ignore[union-attr]
    same(twice(TOKENS), deep(TOKENS))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_regulariser_is_the_papers_mean_over_groups_of_weights(k: int) -> None:
    """R_G(k) = sum_i sum_j cos(theta_G of layer ik + j, of layer (i + 1) k + j) / (L - k)."""
    size = saunshi.Size(k=6, loops=1, vocab=VOCAB, dim=DIM, heads=HEADS, width=41, context=11)
    model = lively(saunshi.saunshi(size))
    w = Weights(model)
    groups = [*(f"mixer.{p}.weight" for p in ("q", "k", "v", "out")), "ffn.up.weight", "ffn.down.weight"]

    def flat(group: str, number: int) -> Tensor:
        return w.all[f"prelude.{number}.{group}"].flatten()

    by_group = []
    for group in groups:
        total = torch.zeros(())
        for i, j in itertools.product(range(6 // k - 1), range(k)):
            a, b = flat(group, i * k + j), flat(group, (i + 1) * k + j)
            total = total + a @ b / (a.norm() * b.norm())
        by_group.append(total / (6 - k))
    want = torch.stack(by_group).mean()
    got = loop_similarity(list(model.prelude), k)
    assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert abs(want.item()) > 1e-4
    ours, theirs = (torch.autograd.grad(r, w.all["prelude.3.mixer.q.weight"])[0] for r in (got, want))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def by_hops(model: LoopedLM, layers: int, loops: int, injected: bool) -> list[Logits]:
    """Logits after every loop; with injection h_0 is added before each loop but the first."""
    w = Weights(model)
    start = x = w.all["embed.weight"][TOKENS]
    logits = []
    for n in range(loops):
        x = stack(w, "loop.layers", layers, x + start if injected and n else x, False, tanh=True)
        logits.append(read(w, x))
    return logits


def hops(**options: object) -> LoopedLM:
    size = kohli.Size(vocab=VOCAB, dim=DIM, heads=HEADS, context=11)
    return lively(kohli.kohli(size.replace(**options)))


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("layers", [1, 4])
def test_loop_think_generalize(layers: int, injected: bool) -> None:
    model = hops(layers=layers, injected=injected)
    for loops, want in enumerate(by_hops(model, layers, 5, injected), 1):
        same(model(TOKENS, Plan(loops)), want)


def test_every_loop_begins_as_the_identity() -> None:
    """The maps into the stream are zero, so any number of loops reads the embedding itself."""
    model = kohli.kohli(kohli.Size(vocab=VOCAB, dim=DIM, heads=HEADS, context=11)).build().eval()
    want = F.layer_norm(model.embed(TOKENS), (DIM,)) @ model.embed.weight.T
    for loops in (1, 7):
        same(model(TOKENS, Plan(loops)), want)


def test_order_is_seen_through_the_causal_mask_alone() -> None:
    """NoPE: with full sight of its past the last token does not know in which order it came."""
    model = hops()
    mixed: Int[Tensor, "B T"] = TOKENS[:, [4, 2, 0, 9, 1, 3, 8, 5, 6, 7, 10]]
    first = hops(layers=1)
    same(first(mixed, Plan(1))[:, -1], first(TOKENS, Plan(1))[:, -1])
    assert (model(mixed, Plan(2))[:, -1] - model(TOKENS, Plan(2))[:, -1]).abs().max() > 0.1


@torch.no_grad()
def test_the_answer_stops_when_it_neither_moves_nor_doubts() -> None:
    """Halt at the first t >= 2 with KL(p_t || p_{t-1}) < eps and entropy < H0; nothing after is computed."""
    model = hops()
    logs = [step.log_softmax(-1) for step in by_hops(model, 4, 9, False)]
    eps, doubt = 0.3, 2.5
    want = torch.full(TOKENS.shape, 9, dtype=torch.int32)
    for t in reversed(range(2, 9)):
        old, new = logs[t - 2], logs[t - 1]
        settled = (new.exp() * (new - old)).sum(-1) < eps
        sure = -(new.exp() * new).sum(-1) < doubt
        want[settled & sure] = t
    rule = ReadoutChange(threshold=eps, entropy=doubt, reverse=True)
    ctx = Context.counting(TOKENS)
    state = model.loop(model.encode(TOKENS, ctx), ctx, Plan(9), None, (rule, model.read))  # type: ignore[misc]
    assert torch.equal(state.taken, want)
    assert len(want.unique()) > 2
    answers = torch.stack(logs).gather(0, want[None, :, :, None].long().expand(1, 3, 11, VOCAB) - 1)[0]
    same(model(TOKENS, Plan(9), exit=rule).log_softmax(-1), answers)
    with work_of(model) as work:
        model(TOKENS, Plan(9), exit=rule)
    assert len(work) == int(want.max())


def same(got: Tensor, want: Tensor) -> None:
    """Equal to 1e-5 of the largest of them."""
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
