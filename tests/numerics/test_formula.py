"""OpenMythos written out once more, naively and on its own, from weights by the original's names.

No cache, no fused maps, no early exit: every score, every expert, every loop. Both the right model and the
released one must agree with it, whole and token by token.
"""

import itertools
import math

import pytest
import torch

from open_mythos.main import MythosConfig, OpenMythos
from tests.numerics.test_original import SMALL


def norm(x, w):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w


def turn(x, base):
    """x (B, T, H, K)."""
    for t, i in itertools.product(range(x.shape[1]), range(x.shape[-1] // 2)):
        c, s = (f(t * base ** (-2 * i / x.shape[-1])) for f in (math.cos, math.sin))
        a, b = x[:, t, :, 2 * i].clone(), x[:, t, :, 2 * i + 1].clone()
        x[:, t, :, 2 * i], x[:, t, :, 2 * i + 1] = a * c - b * s, a * s + b * c
    return x


def attend(q, k, v):
    """(B, T, H, K) each."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v).flatten(2)


def grouped(x, w, cfg):
    q, k, v = (
        (x @ w(f"attn.w{name}.weight").T).unflatten(-1, (heads, -1))
        for name, heads in (("q", cfg.n_heads), ("k", cfg.n_kv_heads), ("v", cfg.n_kv_heads))
    )
    k, v = (each.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, 2) for each in (turn(k, cfg.rope_theta), v))
    return attend(turn(q, cfg.rope_theta), k, v) @ w("attn.wo.weight").T


def latent(x, w, cfg):
    q = norm(x @ w("attn.q_down.weight").T, w("attn.q_norm.weight"))
    q_nope, q_rope = (
        (q @ w(f"attn.q_up_{p}.weight").T).unflatten(-1, (cfg.n_heads, -1)) for p in ("nope", "rope")
    )
    down = x @ w("attn.kv_down.weight").T
    c, k_rope = down[..., : cfg.kv_lora_rank], down[..., None, cfg.kv_lora_rank :]
    kv = norm(c, w("attn.kv_norm.weight")) @ w("attn.kv_up.weight").T
    kv = kv.unflatten(-1, (cfg.n_heads, -1))
    k_nope, v = kv[..., : cfg.qk_nope_head_dim], kv[..., cfg.qk_nope_head_dim :]
    q = torch.cat([q_nope, turn(q_rope, cfg.rope_theta)], -1)
    k = torch.cat([k_nope, turn(k_rope.clone(), cfg.rope_theta).expand(-1, -1, cfg.n_heads, -1)], -1)
    return attend(q, k, v) @ w("attn.wo.weight").T


def swiglu(x, w, name):
    gate, up, down = (w(f"{name}.{part}.weight") for part in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts(x, w, cfg):
    scores = x @ w("ffn.router.weight").T
    chosen = (scores + w("ffn.router_bias")).topk(cfg.n_experts_per_tok).indices
    gate = torch.full_like(scores, -torch.inf).scatter(-1, chosen, scores.gather(-1, chosen)).softmax(-1)
    routed = sum(gate[..., [e]] * swiglu(x, w, f"ffn.routed_experts.{e}") for e in range(cfg.n_experts))
    return routed + sum(swiglu(x, w, f"ffn.shared_experts.{e}") for e in range(cfg.n_shared_experts))


def block(x, w, cfg, moe=False):
    attention = latent if cfg.attn_type == "mla" else grouped
    x = x + attention(norm(x, w("attn_norm.weight")), w, cfg)
    y = norm(x, w("ffn_norm.weight"))
    return x + (experts(y, w, cfg) if moe else swiglu(y, w, "ffn"))


def loop(e, state, cfg, n_loops):
    def w(name):
        return state[f"recurrent.{name}"]

    decay = torch.exp(-torch.exp(w("injection.log_dt") + w("injection.log_A")))
    h, answer, spent, running = e, torch.zeros_like(e), torch.zeros(e.shape[:2]), torch.ones(e.shape[:2])
    width = cfg.dim // 8
    for t in range(n_loops):
        angles = [t * 10000 ** (-2 * i / width) for i in range(width // 2)]
        signal = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)] + [0.0] * (cfg.dim - width))
        if not cfg.released:
            signal = signal * h.square().mean(-1, keepdim=True).sqrt()
        y = block(norm(h + signal + e, w("norm.weight")), lambda name: w(f"block.{name}"), cfg, moe=True)
        scale = w("lora.scale.weight")[min(t, cfg.max_loop_iters - 1)]
        y = y + (y @ w("lora.down.weight").T * scale) @ w("lora.B")
        h = decay * h + w("injection.B") * e + y
        p = torch.sigmoid(h @ w("act.halt.weight")[0] + w("act.halt.bias"))
        ends = spent + p >= cfg.act_threshold
        if not cfg.released and t == n_loops - 1:
            ends = torch.ones_like(ends)
        weight = torch.where(ends, 1 - spent, p) * running
        answer = answer + weight[..., None] * h
        spent, running = spent + p * running, running * ~ends
    return answer


def logits(ids, state, cfg, n_loops):
    x = state["embed.weight"][ids]
    for i in range(cfg.prelude_layers):
        x = block(x, lambda name, i=i: state[f"prelude.{i}.{name}"], cfg)
    x = loop(x, state, cfg, n_loops)
    for i in range(cfg.coda_layers):
        x = block(x, lambda name, i=i: state[f"coda.{i}.{name}"], cfg)
    return norm(x, state["norm.weight"]) @ state["head.weight"].T


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("halting", [-3.0, 0.0])
@torch.no_grad()
def test_the_model_is_its_formula(attention, released, halting):
    model = OpenMythos(MythosConfig(**SMALL, attn_type=attention, released=released)).eval()
    for weight in [*model.parameters(), *model.buffers()]:
        weight.add_(torch.randn_like(weight), alpha=0.1)
    model.recurrent.act.halt.bias.fill_(halting)
    ids, state = torch.randint(53, (2, 9)), model.to_original()
    for n_loops in (1, 3, 5):
        expected = logits(ids, state, model.cfg, n_loops)
        torch.testing.assert_close(model(ids, n_loops=n_loops), expected, atol=2e-4, rtol=1e-4)
        cache = {}
        steps = [
            model(ids[:, a:b], n_loops=n_loops, kv_cache=cache) for a, b in ((0, 4), (4, 7), (7, 8), (8, 9))
        ]
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=2e-4, rtol=1e-4)
    assert expected.std() > 0.1
