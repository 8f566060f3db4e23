"""The few operations of which the twins of the presets are written: plain, in float64, and nothing of ours.

A twin takes its weights from a model by name and follows the paper's equations (or the released code's) with
these alone, so that a mistake in our layers cannot hide in both.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Weights = dict[str, Tensor]
Tokens = Float[Tensor, "B T D"]
Seen = Bool[Tensor, "B T T"]


def weights_of(model: nn.Module) -> Weights:
    return {name: weight.detach().double() for name, weight in model.state_dict().items()}


def linear(x: Float[Tensor, "... I"], w: Weights, name: str) -> Float[Tensor, "... O"]:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def layer_norm(x: Tokens, w: Weights, name: str, eps: float) -> Tokens:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )


def rms_norm(x: Tokens, w: Weights, name: str, eps: float) -> Tokens:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def turned(x: Float[Tensor, "B T K"], base: float, pairs: str, at: Int[Tensor, "B T"]) -> Tensor:
    """Rotary embedding of one head, pair by pair."""
    half, out = x.shape[-1] // 2, x.clone()
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if pairs == "adjacent" else (i, i + half)
        angle = at.double() * base ** (-i / half)
        out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        out[..., b] = x[..., a] * angle.sin() + x[..., b] * angle.cos()
    return out


def attention(q: Tokens, k: Tokens, v: Tokens, heads: int, kv_heads: int, seen: Seen) -> Tokens:
    """Head by head; a query that may see nothing hears nothing."""
    width, out = q.shape[-1] // heads, []
    for h in range(heads):
        g = h * kv_heads // heads
        mine, theirs = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
        weight = (q[..., mine] @ k[..., theirs].mT / width**0.5).exp() * seen
        total = weight.sum(-1, keepdim=True)
        out.append((weight / total.where(total > 0, 1)) @ v[..., theirs])
    return torch.cat(out, -1)


def rotated(x: Tokens, heads: int, base: float, pairs: str, at: Int[Tensor, "B T"]) -> Tokens:
    return torch.cat([turned(head, base, pairs, at) for head in x.chunk(heads, -1)], -1)


def causal(real: Bool[Tensor, "B T"]) -> Seen:
    return real[:, None, :] & torch.ones(2 * real.shape[1:], dtype=torch.bool).tril()


def close(given: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest number that is expected, and of one."""
    given, expected = given.detach().double(), expected.detach().double()
    error = (given - expected).abs().max()
    assert error <= tolerance * max(1.0, float(expected.abs().max())), f"off by {error}"
