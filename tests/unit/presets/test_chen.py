"""Chen's depth-recurrent transformer against a twin of the author's equations, the graph's edges, and the
silent objective."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.nn.context import Context
from open_mythos.nn.tally import Tally
from open_mythos.presets.chen import SIZES, Classifier, Size, chen, edges, supervise
from tests.by_hand import Weights, attention, close, gelu, layer_norm, linear, rotated, weights_of
from tests.lively import enliven

Layer = Callable[[Tensor, Tensor], Tensor]

TOY: dict[str, Any] = {"vocab": 31, "dim": 16, "heads": 2, "width": 24, "table": 4, "low": 1, "high": 3}
SMALL = SIZES["chen-family"].replace(**TOY)
TOKENS = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(0))


def graph() -> Size:
    return SIZES["chen-graph"].replace(**TOY)


def graph_layer(w: Weights) -> Layer:
    """The author's library layer, with no argument that he leaves out (so with ReLU)."""
    theirs = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, norm_first=True).double().eval()
    name = "core.loop.layers.0"
    names = {
        "self_attn.in_proj_weight": torch.cat([w[f"{name}.mixer.{part}.weight"] for part in "qkv"]),
        "self_attn.in_proj_bias": torch.cat([w[f"{name}.mixer.{part}.bias"] for part in "qkv"]),
        "self_attn.out_proj": f"{name}.mixer.out",
        "linear1": f"{name}.ffn.up",
        "linear2": f"{name}.ffn.down",
        "norm1": f"{name}.mixer_norm",
        "norm2": f"{name}.ffn_norm",
    }
    state = {}
    for to, of in names.items():
        state |= (
            {to: of} if isinstance(of, Tensor) else {f"{to}.{p}": w[f"{of}.{p}"] for p in ("weight", "bias")}
        )
    theirs.load_state_dict(state)
    return lambda u, seen: theirs(u, src_mask=(~seen).repeat_interleave(2, 0))


def sequence_layer(w: Weights) -> Layer:
    """LayerScale, and rotation by halves at base 10,000."""

    def layer(u: Tensor, seen: Tensor) -> Tensor:
        name = "core.loop.layers.0"
        x, at = layer_norm(u, w, f"{name}.mixer_norm", 1e-5), torch.arange(u.shape[1]).expand(u.shape[:2])
        q, k, v = (linear(x, w, f"{name}.mixer.{part}") for part in "qkv")
        q, k = (rotated(part, 2, 10_000.0, "halves", at) for part in (q, k))
        heard = linear(attention(q, k, v, 2, 2, seen), w, f"{name}.mixer.out")
        a = u + w[f"{name}.mixer_scale"] * heard
        x = gelu(linear(layer_norm(a, w, f"{name}.ffn_norm", 1e-5), w, f"{name}.ffn.up"))
        return a + w[f"{name}.ffn_scale"] * linear(x, w, f"{name}.ffn.down")

    return layer


def start(w: Weights, pair: Tensor | None) -> Tensor:
    h = w["core.embed.weight"][TOKENS]
    if pair is not None:
        for role in range(2):
            h = h + F.one_hot(pair[:, role], 7)[..., None] * w["roles"][role]
    return layer_norm(h, w, "core.enter", 1e-5)


def verdict(h: Tensor, w: Weights, pair: Tensor | None) -> Tensor:
    rows = torch.arange(len(h))
    read = h[:, 0] if pair is None else torch.cat([h[rows, pair[:, 0]], h[rows, pair[:, 1]]], -1)
    x = layer_norm(read[:, None], w, "verdict.0", 1e-5)
    return linear(gelu(linear(x, w, "verdict.1")), w, "verdict.4")[:, 0, 0]


def twin(w: Weights, layer: Layer, steps: int, seen: Tensor, pair: Tensor | None = None) -> Tensor:
    h, told = start(w, pair), []
    for n in range(steps):
        c = layer(h + w["core.loop.mark.table.weight"][n], seen)
        z = 1 / (1 + (-linear(torch.cat([c, h], -1), w, "core.loop.update.gate")).exp())
        h = z * c + (1 - z) * h
        told.append(verdict(h, w, pair))
    return torch.stack(told)


PAIR = torch.tensor([[4, 0], [2, 6]])
REAL = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
EDGES = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.3


def along_edges() -> Tensor:
    """The author's mask, edge by edge: v attends to u where u -> v, and everybody to itself."""
    seen = torch.eye(7, dtype=torch.bool).repeat(2, 1, 1)
    for row, u, v in EDGES.nonzero().tolist():
        seen[row, v, u] |= bool(REAL[row, u] and REAL[row, v])
    return seen


@pytest.mark.parametrize("steps", [1, 4])
def test_the_graph_model_is_the_librarys_encoder_layer_in_a_gated_loop(steps: int) -> None:
    model = enliven(Classifier(core=chen(graph()), roles=2).build())
    w = weights_of(model)
    with torch.no_grad():
        told = model.every_step(TOKENS, steps, edges(TOKENS, EDGES, REAL), PAIR)
        close(told, twin(w, graph_layer(w), steps, along_edges(), PAIR))


@pytest.mark.parametrize(("task", "steps"), [("logic", 1), ("logic", 4), ("family", 4)])
def test_the_sequence_models_are_their_twin(task: str, steps: int) -> None:
    model = enliven(Classifier(core=chen(SIZES[f"chen-{task}"].replace(**TOY))).build())
    w, seen = weights_of(model), REAL[:, None].expand(2, 7, 7)
    with torch.no_grad():
        told = model.every_step(TOKENS, steps, Context.padded(TOKENS, REAL.long()))
        expected = twin(w, sequence_layer(w), steps, seen)
    close(told, expected)
    labels = torch.tensor([True, False])
    costs = -torch.where(labels, expected, -expected).sigmoid().log().mean(1)
    for alpha in (0.0, 0.3, 1.0):
        close(supervise(told, labels, alpha), (1 - alpha) * costs[-1] + alpha * costs.mean())


def test_the_baseline_with_act_is_its_twin() -> None:
    """Shares of the state as it came, halted states stay, and the answer is the sum that they weigh."""
    model = enliven(Classifier(core=chen(graph().replace(act=True)), roles=2).build())
    with torch.no_grad():  # so that tokens halt at different steps
        model.core.loop.halt.score.weight.mul_(0.3)
        model.core.loop.halt.score.bias.fill_(-0.7)
    w = weights_of(model)
    layer, h = graph_layer(w), start(w, PAIR)
    total, count, rest = (torch.zeros(2, 7).double() for _ in range(3))
    running, answer = REAL, torch.zeros_like(h)
    with torch.no_grad():
        for n in range(4):
            p = linear(h, w, "core.loop.halt.score").squeeze(-1).sigmoid()
            halts = running & (total + p >= 0.99)
            weight = torch.where(halts, 1 - total, p) * running
            rest, count, total = torch.where(halts, 1 - total, rest), count + running, total + p * running
            moved = layer(h + w["core.loop.mark.table.weight"][n], along_edges())
            answer = answer + weight[..., None] * moved
            h = torch.where(running[..., None], moved, h)
            running = running & ~halts
    assert count[REAL].min() < count[REAL].max()
    tally = Tally()
    ctx = edges(TOKENS, EDGES, REAL).with_tally(tally)
    close(model(TOKENS, ctx=ctx, pair=PAIR), verdict(answer, w, PAIR))
    close(tally.costs["ponder"], (count + rest)[REAL].mean())
    fresh = Classifier(core=chen(graph().replace(act=True)), roles=2).build()
    assert torch.all(fresh.core.loop.halt.score.bias == -1)


def test_the_state_moves_slowly_at_first() -> None:
    model = chen(SMALL).build()
    assert model.loop is not None
    assert torch.all(model.loop.update.gate.bias == -2)
    assert torch.all(model.loop.layers[0].mixer_scale == 1e-4)
    assert model.embed.weight.std() > 0.8  # PyTorch's table, not GPT-2's


def test_one_step_is_one_hop() -> None:
    """A chain 0 -> 1 -> ... -> 6: after n steps a node knows the nodes up to n before it."""
    config = Classifier(core=chen(graph()), roles=2)
    model = config.build().eval()
    path = torch.zeros(1, 7, 7, dtype=torch.bool)
    path[0, torch.arange(6), torch.arange(1, 7)] = True
    tokens, pair = TOKENS[:1], torch.tensor([[5, 6]])
    ctx = edges(tokens, path, torch.ones(1, 7, dtype=torch.bool))
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 31  # two hops before node 5, three before node 6
    with torch.no_grad():
        before, after = (model.every_step(x, 3, ctx, pair) for x in (tokens, changed))
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_padding_changes_nothing() -> None:
    model = Classifier(core=chen(SMALL)).build().eval()
    real = torch.ones_like(TOKENS)
    real[0, 5:] = 0
    with torch.no_grad():
        padded = model(TOKENS, 3, Context.padded(TOKENS, real))[0]
        torch.testing.assert_close(padded, model(TOKENS[:1, :5], 3)[0], rtol=1e-4, atol=1e-5)


def test_silence_looks_at_the_last_step_alone() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([True, False, True])
    supervise(logits, labels).backward()
    assert logits.grad is not None
    assert torch.all(logits.grad[:-1] == 0)
    every = F.binary_cross_entropy_with_logits(logits, labels.float().expand(4, 3))
    torch.testing.assert_close(supervise(logits, labels, alpha=1.0), every)


def test_a_pair_is_asked_for() -> None:
    with pytest.raises(ValueError, match="pair"):
        Classifier(core=chen(SIZES["chen-graph"]), roles=2).build()(TOKENS % 27)


def test_the_classifier_learns() -> None:
    model = Classifier(core=chen(SMALL)).build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = torch.tensor([True, False])
    losses = []
    for _ in range(30):
        loss = supervise(model.every_step(TOKENS, 2), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
