"""Ouro: the published equations, the names of its checkpoints, and the way through a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from open_mythos.hub import ouro
from open_mythos.hub.load import export, from_pretrained
from open_mythos.model import LoopedLM
from open_mythos.presets import preset
from tests.unit.hub.test_llama import norm, theirs_of, turned

CONFIG: dict[str, Any] = {
    "model_type": "ouro",
    "architectures": ["OuroForCausalLM"],
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "total_ut_steps": 3,
    "early_exit_threshold": 1.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TOKENS = torch.randint(0, 53, (2, 11), generator=torch.Generator().manual_seed(1))


def randomised(**changes: Any) -> LoopedLM:
    torch.manual_seed(0)
    model = ouro.to_model(CONFIG | changes).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def every_step(
    theirs: dict[str, Tensor], tokens: Tensor, steps: int = 3
) -> tuple[list[Tensor], list[Tensor]]:
    """Normed states and gates of each loop, in plain operations."""
    h, states, gates = theirs["model.embed_tokens.weight"][tokens], [], []
    for _ in range(steps):
        for i in range(2):
            w = {k.removeprefix(f"model.layers.{i}."): v for k, v in theirs.items() if f"layers.{i}." in k}
            h = h + norm(
                attention(w, norm(h, w["input_layernorm.weight"], 1e-6)), w["input_layernorm_2.weight"], 1e-6
            )
            n = norm(h, w["post_attention_layernorm.weight"], 1e-6)
            y = (F.silu(n @ w["mlp.gate_proj.weight"].T) * (n @ w["mlp.up_proj.weight"].T)) @ w[
                "mlp.down_proj.weight"
            ].T
            h = h + norm(y, w["post_attention_layernorm_2.weight"], 1e-6)
        h = norm(h, theirs["model.norm.weight"], 1e-6)
        states.append(h)
        gate = h @ theirs["model.early_exit_gate.weight"].T + theirs["model.early_exit_gate.bias"]
        gates.append(gate.squeeze(-1).sigmoid())
    return states, gates


def attention(w: dict[str, Tensor], x: Tensor) -> Tensor:
    q, k, v = ((x @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (4, 8)).transpose(1, 2) for p in "qkv")
    q, k = turned(q, 1e6), turned(k, 1e6)
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w["self_attn.o_proj.weight"].T


def test_logits_follow_the_equations() -> None:
    model = randomised()
    states, _ = every_step(theirs_of(model, ouro), TOKENS)
    for steps, state in enumerate(states, 1):
        want = state @ model.head.weight.T
        torch.testing.assert_close(model(TOKENS, steps), want, rtol=1e-4, atol=1e-4)


def test_each_token_answers_with_the_first_step_that_is_sure_enough() -> None:
    model = randomised(early_exit_threshold=0.6)
    states, gates = every_step(theirs_of(model, ouro), TOKENS)
    stays, want, left = torch.ones_like(gates[0]), states[-1].clone(), torch.zeros_like(gates[0]).bool()
    for state, gate in zip(states[:-1], gates[:-1], strict=True):
        stays = stays * (1 - gate)
        now = (1 - stays >= 0.6) & ~left
        want[now], left = state[now], left | now
    assert left.any()
    assert not left.all()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), want @ model.head.weight.T, rtol=1e-4, atol=1e-4)


def test_folder_gives_back_the_model(tmp_path: Path) -> None:
    model = randomised(early_exit_threshold=0.6, tie_word_embeddings=True)
    export(model, tmp_path, "ouro")
    again = from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_names_are_those_of_the_published_checkpoints() -> None:
    names = {name for x in ouro.links(preset("ouro-1.4b")) for name in x.theirs}
    layer = {
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        *(f"{p}_layernorm{n}.weight" for p in ("input", "post_attention") for n in ("", "_2")),
    }
    gate = {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} | gate
    assert names == outside | {f"model.layers.{i}.{name}" for i in range(24) for name in layer}


def test_a_threshold_that_means_nothing_is_refused() -> None:
    """None is never; zero is no probability that a token could have to reach."""
    assert ouro.to_model(CONFIG | {"early_exit_threshold": None}) == ouro.to_model(CONFIG)
    with pytest.raises(ValueError, match="exit threshold"):
        ouro.to_model(CONFIG | {"early_exit_threshold": 0.0})


@pytest.mark.parametrize("change", [{"early_exit_step": 2}, {"hidden_act": "gelu"}, {"attention_bias": True}])
def test_what_we_cannot_honour_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ouro.to_model(CONFIG | change)
