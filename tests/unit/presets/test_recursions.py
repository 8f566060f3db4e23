"""Mixture-of-recursions against a twin of the released routers' rules, written with nothing of ours.

One sequence at a time, without batches, padding, shorter contexts or caches: what loop/route.py does in order
to be fast, and tests/unit/loop/test_route.py compares among itself, is here compared with the definition.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from open_mythos.loop.route import ExpertChoice, TokenChoice
from open_mythos.loop.schedule import Plan
from open_mythos.nn.context import Context
from open_mythos.nn.tally import Tally
from open_mythos.presets.baseline import Shape
from open_mythos.presets.recursions import Size, recursions
from tests.by_hand import Weights, attention, close, linear, rms_norm, rotated, silu, weights_of
from tests.lively import lively

SHAPE = Shape(vocab=37, dim=12, layers=8, heads=6, kv_heads=3, width=10, base=1e4)  # 1 + 3 x 2 + 1
TOKENS = torch.randint(0, 37, (3, 11), generator=torch.Generator().manual_seed(0))
LENGTHS = 11, 7, 2
REAL = torch.tensor([[1] * n + [0] * (11 - n) for n in LENGTHS])
Held = tuple[Tensor, Tensor]


def layer(x: Tensor, w: Weights, name: str, at: Tensor, held: Held | None = None) -> tuple[Tensor, Held]:
    """A Llama layer on the tokens at `at`, which attend to themselves or to `held`; and what it held."""
    u = rms_norm(x, w, f"{name}.mixer_norm", 1e-5)
    q, k, v = (linear(u, w, f"{name}.mixer.{part}") for part in "qkv")
    q, k = rotated(q, 6, 1e4, "halves", at[None]), rotated(k, 3, 1e4, "halves", at[None])
    k, v = (k, v) if held is None else held
    columns = at if held is None else torch.arange(k.shape[1])
    seen = (columns[None, None, :] <= at[None, :, None]).expand(1, len(at), len(columns))
    x = x + linear(attention(q, k, v, 6, 3, seen), w, f"{name}.mixer.out")
    gate, up = linear(rms_norm(x, w, f"{name}.ffn_norm", 1e-5), w, f"{name}.ffn.gate_up").chunk(2, -1)
    return x + linear(silu(gate) * up, w, f"{name}.ffn.down"), (k, v)


class Recursion:
    """F of one sequence: the shared block, on some of the tokens."""

    def __init__(self, w: Weights, shared: bool, length: int) -> None:
        self.w, self.shared, self.length = w, shared, length
        self.first: list[Held] = []

    def __call__(self, x: Tensor, chosen: Tensor) -> Tensor:
        at = torch.arange(self.length) if self.shared else chosen
        y, held = x[:, at], []
        for i in range(2):
            lent = self.first[i] if self.first else None
            y, own = layer(y, self.w, f"loop.layers.{i}", at, lent)
            held.append(own)
        if self.shared:
            self.first = self.first or held
            return y[:, chosen]
        return y


class Told(NamedTuple):
    logits: Tensor
    chosen: list[list[int]]  # at every step
    cost: float


def twin(w: Weights, tokens: Tensor, route: ExpertChoice | TokenChoice, shared: bool, ranked: bool) -> Told:
    length = len(tokens)
    everyone = torch.arange(length)
    x, _ = layer(w["embed.weight"][tokens][None], w, "prelude.0", everyone)
    run = expert_choice if isinstance(route, ExpertChoice) else token_choice
    h, chosen, cost = run(w, x, route, Recursion(w, shared, length), ranked)  # type: ignore[arg-type]
    h, _ = layer(h, w, "coda.0", everyone)
    return Told(rms_norm(h, w, "norm", 1e-5) @ w["embed.weight"].T, chosen, cost)


def expert_choice(
    w: Weights, x: Tensor, route: ExpertChoice, block: Recursion, ranked: bool
) -> tuple[Tensor, list[list[int]], float]:
    """With a router of its own each step keeps int(c T), at least one, of those whom the last one kept."""
    left, taken, cost, length = list(range(x.shape[1])), [], 0.0, x.shape[1]
    for n, capacity in enumerate(route.capacity):
        logit = {t: float(x[0, t] @ w["loop.route.score.weight"][n]) for t in left}
        best = sorted(left, key=lambda t: -logit[t])[: max(1, int(capacity * length))]
        for t in left:
            share = 1 / (1 + math.exp(-logit[t]))
            taught = -math.log(share if t in best else 1 - share)
            cost += (route.balance * taught + route.z_loss * logit[t] ** 2) / len(left)
        left = sorted(best) if ranked else [t for t in left if logit[t] > 0]
        taken.append(left)
        if left or block.shared:
            moved, new = block(x, torch.tensor(left, dtype=torch.long)), x.clone()
            for i, t in enumerate(left):
                new[0, t] = x[0, t] + route.alpha / (1 + math.exp(-logit[t])) * moved[0, i]
            x = new
        if not left:
            taken += [[]] * (len(route.capacity) - n - 1)
            break
    return x, taken, cost


def token_choice(
    w: Weights, x: Tensor, route: TokenChoice, block: Recursion, ranked: bool
) -> tuple[Tensor, list[list[int]], float]:
    """One softmax at the entrance; steps without a weight, and at last entrance + weight * F."""
    entrance, taken = x, []
    logits = x[0] @ w["loop.route.score.weight"].T
    shares, squared = logits.softmax(-1), logits.exp().sum(-1).log() ** 2
    depth = shares.argmax(-1)
    for n in range(route.depths):
        chosen = (depth >= n).nonzero().flatten()
        taken.append(chosen.tolist())
        moved, new = block(x, chosen), x.clone()
        for i, t in enumerate(chosen.tolist()):
            ends = depth[t] == n
            new[0, t] = entrance[0, t] + route.alpha * shares[t, n] * moved[0, i] if ends else moved[0, i]
        x = new
    often = torch.bincount(depth, minlength=route.depths) / len(depth)
    imbalance = route.depths * (often * shares.mean(0)).sum()
    return x, taken, float(route.balance * imbalance + route.z_loss * squared.mean())


@pytest.mark.parametrize("share_keys", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "route",
    [
        ExpertChoice(alpha=0.7, balance=0.3, z_loss=0.2),
        ExpertChoice(capacity=(0.8, 0.55, 0.29), alpha=0.7),
        TokenChoice(depths=3, alpha=0.8, balance=0.4, z_loss=0.2),
    ],
)
def test_the_model_is_its_twin(route: ExpertChoice | TokenChoice, training: bool, share_keys: bool) -> None:
    config = recursions(Size(shape=SHAPE, share_keys=share_keys))
    assert config.loop is not None
    model = lively(config.replace(loop=config.loop.replace(route=route))).train(training)
    w, tally, taken = weights_of(model), Tally(), []
    ctx = Context.padded(TOKENS, REAL)
    told = model(TOKENS, ctx=ctx, tally=tally)
    with torch.no_grad():  # here tokens leave
        close(model(TOKENS, ctx=ctx), told.double())
    # The last step ends everybody, so one more is asked for than there are.
    model.features(TOKENS, Plan(4), ctx, watch=lambda _, state: taken.append(state.left > 0))
    costs = []
    for row, length in enumerate(LENGTHS):
        own = twin(w, TOKENS[row, :length], route, share_keys, training)
        close(told[row, :length], own.logits[0])
        assert [step[row].nonzero().flatten().tolist() for step in taken[:3]] == own.chosen
        costs.append(own.cost)
        alone = Tally()
        model.features(TOKENS[row : row + 1, :length], tally=alone)
        assert alone.costs["route"].item() == pytest.approx(own.cost, rel=1e-5)
    if isinstance(route, TokenChoice):
        assert tally.costs["route"].item() == pytest.approx(sum(costs) / 3, rel=1e-5)


@pytest.mark.parametrize("done", [0.1, 0.37, 0.9])
def test_capacities_are_counted_as_released(done: float) -> None:
    config = recursions(Size(shape=SHAPE, warmup=0.5))
    model, taken = lively(config).train(), []
    for length in (1, 2, 7, 11):
        tokens = TOKENS[:, :length]
        ctx = replace(Context.counting(tokens), progress=torch.tensor(done))
        model.features(tokens, Plan(4), ctx, watch=lambda _, state: taken.append(state.left > 0))
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, done / 0.5)))
        for n, capacity in enumerate((1.0, 2 / 3, 1 / 3)):
            share = capacity + (1 - capacity) * decay
            assert taken[n].sum(1).tolist() == [max(1, int(share * length))] * 3
        taken.clear()
