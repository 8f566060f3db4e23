"""Chen's depth-recurrent transformer: the step's equation, the graph's edges, and the silent objective."""

import pytest
import torch
from torch.nn import functional as F

from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.context import Context
from open_mythos.presets.chen import SIZES, Classifier, Size, chen, edges, supervise

SMALL = Size(vocab=31, dim=16, heads=2, width=24, table=4, low=1, high=3)
TOKENS = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(0))


def graph() -> Size:
    return SMALL.replace(activation="relu", scale=None, rope=None)


def by_the_equations(model: LoopedLM, steps: int) -> torch.Tensor:
    """The graph model (no rotation, no LayerScale) with the library's own attention."""
    block, update = model.loop.layers[0], model.loop.update  # type: ignore[union-attr]
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, norm_first=True).eval()
    q, k, v = block.mixer.q, block.mixer.k, block.mixer.v
    names = {
        "self_attn.in_proj_weight": torch.cat([q.weight, k.weight, v.weight]),
        "self_attn.in_proj_bias": torch.cat([q.bias, k.bias, v.bias]),
        "self_attn.out_proj.weight": block.mixer.out.weight,
        "self_attn.out_proj.bias": block.mixer.out.bias,
        "linear1.weight": block.ffn.up.weight,
        "linear1.bias": block.ffn.up.bias,
        "linear2.weight": block.ffn.down.weight,
        "linear2.bias": block.ffn.down.bias,
        "norm1.weight": block.mixer_norm.weight,
        "norm1.bias": block.mixer_norm.bias,
        "norm2.weight": block.ffn_norm.weight,
        "norm2.bias": block.ffn_norm.bias,
    }
    theirs.load_state_dict(names)
    h = F.layer_norm(model.embed(TOKENS), (16,), model.enter.weight, model.enter.bias)  # type: ignore[union-attr]
    for n in range(steps):
        c = theirs(h + model.loop.mark.table.weight[n])  # type: ignore[union-attr]
        z = update.gate(torch.cat([c, h], -1)).sigmoid()
        h = z * c + (1 - z) * h
    return h


def test_the_graph_model_is_the_librarys_encoder_layer_in_a_gated_loop() -> None:
    model = chen(graph()).build().eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.features(TOKENS, Plan(3)), by_the_equations(model, 3), rtol=1e-4, atol=1e-5
        )


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
