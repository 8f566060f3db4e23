"""The Dreamer-style layer against a twin of its three attentions, written with nothing of ours.

The paper's own equations were not to be had, so this holds the reconstruction to what its page says, no more.
"""

import pytest
import torch
from torch import Tensor

from open_mythos.loop.schedule import Plan
from open_mythos.nn.context import Context
from open_mythos.presets.dreamer import Size, dreamer
from tests.by_hand import Weights, attention, causal, close, linear, rms_norm, rotated, silu, weights_of
from tests.lively import lively

SIZE = Size(vocab=37, dim=12, heads=3, steps=4, experts=5, chosen=2, width=7)
TOKENS = torch.randint(0, 37, (3, 6), generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 1 + [1] * 5])
LAYER = "loop.layers.0"


def over_sequence(u: Tensor, w: Weights, at: Tensor) -> Tensor:
    q, k, v = (linear(u, w, f"{LAYER}.mixer.{part}") for part in "qkv")
    q, k = (rotated(x, 3, 10_000.0, "adjacent", at) for x in (q, k))
    return linear(attention(q, k, v, 3, 3, causal(REAL.bool())), w, f"{LAYER}.mixer.out")


def over_depth(past: list[Tensor], w: Weights) -> Tensor:
    """Of every token to what it was at steps 0..n, its own latest being the query."""
    name, n, heads = "loop.recall", len(past) - 1, []
    q = linear(past[n], w, f"{name}.q")
    for h in range(3):
        mine = slice(4 * h, 4 * h + 4)
        scores = [
            (q * linear(u, w, f"{name}.k"))[..., mine].sum(-1) / 2 + w[f"{name}.bias"][h, n - m]
            for m, u in enumerate(past)
        ]
        shares = torch.stack(scores).exp()
        shares = shares / shares.sum(0)
        values = torch.stack([linear(u, w, f"{name}.v")[..., mine] for u in past])
        heads.append((shares[..., None] * values).sum(0))
    return linear(torch.cat(heads, -1), w, f"{name}.out")


def over_experts(u: Tensor, w: Weights) -> Tensor:
    """Token by token: the two experts of the highest biased score, weighed by the scores alone."""

    def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (gate_up @ x).chunk(2)
        return down @ (silu(gate) * up)

    y, name = torch.zeros_like(u), f"{LAYER}.ffn"
    for row in range(len(u)):
        for i, x in enumerate(u[row]):
            scores = w[f"{name}.router"] @ x
            chosen = sorted(range(5), key=lambda e: -float(scores[e] + w[f"{name}.bias"][e]))[:2]
            shares = scores[chosen].exp() / scores[chosen].exp().sum()
            for e, share in zip(chosen, shares, strict=True):
                y[row, i] += share * swiglu(x, w[f"{name}.gate_up"][e], w[f"{name}.down"][e])
            y[row, i] += swiglu(x, w[f"{name}.shared_gate_up.weight"], w[f"{name}.shared_down.weight"])
    return y


def twin(w: Weights, steps: int, parallel: bool) -> Tensor:
    h, past = w["embed.weight"][TOKENS], []
    at = (REAL.cumsum(1) - 1).clamp_min(0)
    for _ in range(steps):
        past.append(rms_norm(h, w, "loop.recall.norm", 1e-6))
        told = over_depth(past, w)
        if parallel:
            u = rms_norm(h, w, f"{LAYER}.norm", 1e-6)
            h = h + over_sequence(u, w, at) + told + over_experts(u, w)
        else:
            h = h + told
            h = h + over_sequence(rms_norm(h, w, f"{LAYER}.mixer_norm", 1e-6), w, at)
            h = h + over_experts(rms_norm(h, w, f"{LAYER}.ffn_norm", 1e-6), w)
    return rms_norm(h, w, "norm", 1e-6) @ w["embed.weight"].T


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_model_is_its_twin(parallel: bool, steps: int) -> None:
    model, real = lively(dreamer(SIZE.replace(parallel=parallel))), REAL.bool()
    with torch.no_grad():
        model.loop.layers[0].ffn.bias.normal_()  # type: ignore[union-attr]
        told = model(TOKENS, Plan(steps), ctx=Context.padded(TOKENS, REAL))
    close(told[real], twin(weights_of(model), steps, parallel)[real])
