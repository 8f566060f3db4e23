"""Mixture-of-recursions: files as its training code writes them, against its evaluation written out by hand.

The twin reads every step's weights under that step's names, one sequence at a time, in float64.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from open_mythos.hub import llama, recursions
from open_mythos.hub.load import export, from_pretrained, recognise
from open_mythos.loop.route import ExpertChoice, TokenChoice
from open_mythos.loop.update import Gate
from open_mythos.presets import preset
from open_mythos.presets.recursions import SIZES, Size
from open_mythos.presets.recursions import recursions as build
from tests.by_hand import Weights, attention, close, linear, rms_norm, rotated, silu

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["MoRLlamaForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 8,  # 1 + 3 x 2 + 1
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
RECURSIVE = {
    "enable": True,
    "base_depth": None,
    "num_recursion": 3,
    "sharing": "middle_cycle",
    "ln_share": True,
    "initialization": "random",
}
MOR: dict[str, Any] = {  # both halves are there whatever the type is
    "enable": True,
    "capacity": None,
    "rand_router": False,
    "router_type": "linear",
    "z_loss": False,
    "z_coeff": 0.001,
    "temp": 1.0,
    "expert": {
        "cap_warmup_step": 0,
        "router_func": "sigmoid",
        "alpha": 0.7,
        "sampling": "aux_loss",
        "include_first": True,
        "coeff": 0.001,
        "gating": "weighted",
    },
    "token": {
        "bal_warmup_step": 0,
        "router_func": "softmax",
        "alpha": 0.8,
        "balancing": "loss",
        "coeff": 0.1,
        "u": 0.001,
        "gating": "weighted",
    },
}
SHARED_KEYS = {"enable": True, "base_depth": None, "num_recursion": None, "sharing": None}
KINDS: dict[str, dict[str, Any]] = {
    "expert": {"mor": MOR | {"type": "expert"}},
    "capacities": {"mor": MOR | {"type": "expert", "capacity": "0.9,0.5,0.3"}},
    "token": {"mor": MOR | {"type": "token"}},
    "recursive": {"architectures": ["LlamaForCausalLM"]},
}
TOKENS = torch.randint(0, 37, (3, 11), generator=torch.Generator().manual_seed(0))
Held = list[tuple[Tensor, Tensor]]


def told(kind: str, share_keys: bool = False) -> dict[str, Any]:
    """A config.json into which the run's YAML was copied."""
    keys = {"kv_sharing": SHARED_KEYS} if share_keys else {}
    return CONFIG | {"recursive": RECURSIVE} | KINDS[kind] | keys


def places(kind: str) -> tuple[list[list[str]], str]:
    """Where the layers of each step lie, and the last one."""
    if kind == "token":
        return [[f"model.layers.1.block_list.{n}.{i}" for i in (0, 1)] for n in range(3)], "model.layers.2"
    if kind == "recursive":
        return [[f"model.layers.{1 + 2 * n + i}" for i in (0, 1)] for n in range(3)], "model.layers.7"
    return [[f"model.layers.{1 + n}.block.{i}" for i in (0, 1)] for n in range(3)], "model.layers.4"


def tensors(kind: str) -> dict[str, Tensor]:
    """A state as theirs: weights that the steps share lie there three times, and the head beside its tie."""
    torch.manual_seed(1)
    shapes = {f"self_attn.{x}_proj": (rows, 12) for x, rows in zip("qkvo", (12, 6, 6, 12), strict=True)}
    shapes |= {"mlp.gate_proj": (10, 12), "mlp.up_proj": (10, 12), "mlp.down_proj": (12, 10)}
    shapes |= {"input_layernorm": (12,), "post_attention_layernorm": (12,)}

    def layer(*prefixes: str) -> dict[str, Tensor]:
        one = {name: torch.randn(shape) * 0.3 + (len(shape) == 1) for name, shape in shapes.items()}
        return {f"{prefix}.{name}.weight": x.clone() for prefix in prefixes for name, x in one.items()}

    steps, last = places(kind)
    embedding, head = torch.randn(37, 12), torch.randn(37, 12)
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.rand(12) + 0.5}
    state |= layer("model.layers.0") | layer(last)
    for copies in zip(*steps, strict=True):
        state |= layer(*copies)
    if kind == "token":
        state["model.layers.1.mor_router.router.weight"] = torch.randn(3, 12)
    elif kind != "recursive":
        state |= {f"model.layers.{1 + n}.mor_router.router.weight": torch.randn(1, 12) for n in range(3)}
    # Their recursive class does not tie the head, whatever config.json says.
    return state | {"lm_head.weight": head if kind == "recursive" else embedding.clone()}


def saved(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def run(w: Weights, names: list[str], x: Tensor, at: Tensor, lent: Held) -> tuple[Tensor, Held]:
    """Layers on the tokens at `at`, which attend to themselves or to what is lent; and what they held."""
    held: Held = []
    for i, name in enumerate(names):
        u = rms_norm(x, w, f"{name}.input_layernorm", 1e-5)
        q, k, v = (linear(u, w, f"{name}.self_attn.{part}_proj") for part in "qkv")
        q, k = rotated(q, 6, 1e4, "halves", at[None]), rotated(k, 3, 1e4, "halves", at[None])
        held.append((k, v))
        k, v = lent[i] if lent else (k, v)
        seen = torch.ones(1, len(at), k.shape[1], dtype=torch.bool).tril()
        x = x + linear(attention(q, k, v, 6, 3, seen), w, f"{name}.self_attn.o_proj")
        u = rms_norm(x, w, f"{name}.post_attention_layernorm", 1e-5)
        inner = silu(linear(u, w, f"{name}.mlp.gate_proj")) * linear(u, w, f"{name}.mlp.up_proj")
        x = x + linear(inner, w, f"{name}.mlp.down_proj")
    return x, held


def evaluated(w: Weights, kind: str, tokens: Tensor, share_keys: bool) -> Tensor:
    """Logits of one sequence."""
    steps, last = places(kind)
    everyone = torch.arange(len(tokens))
    x, _ = run(w, ["model.layers.0"], w["model.embed_tokens.weight"][tokens][None], everyone, [])
    entrance, out, left, lent = x, x.clone(), everyone, Held()
    for n, names in enumerate(steps):
        if kind == "recursive":
            chosen, gate, base = everyone, torch.ones(len(tokens)), torch.zeros_like(x)
        elif kind == "token":  # as often as its share says, and weighted at last
            share, depth = (0.8 * linear(entrance, w, "model.layers.1.mor_router.router").softmax(-1))[0].max(
                -1
            )
            chosen, last_time = (depth >= n).nonzero()[:, 0], depth == n
            gate, base = share.where(last_time, 1.0), entrance * last_time[:, None]
        else:  # the best of those who were among the best
            logit = linear(x, w, f"model.layers.{1 + n}.mor_router.router")[0, left, 0]
            capacity = ((0.9, 0.5, 0.3) if kind == "capacities" else (1.0, 2 / 3, 1 / 3))[n]
            best = logit.topk(max(1, int(capacity * len(tokens)))).indices.sort().values
            chosen = left = left[best]
            gate, base = torch.zeros(len(tokens)).double(), x
            gate[chosen] = 0.7 / (1 + (-logit[best]).exp())
        at = everyone if share_keys else chosen
        y, held = run(w, names, x[:, at], at, lent)
        lent = lent or (held if share_keys else [])
        y = y[:, chosen] if share_keys else y
        out = x.clone()
        out[:, chosen] = base[:, chosen] + gate[chosen, None] * y
        x = out
    x, _ = run(w, [last], x, everyone, [])
    return linear(rms_norm(x, w, "model.norm", 1e-5), w, "lm_head")[0]


@pytest.mark.parametrize("share_keys", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_their_evaluation(kind: str, share_keys: bool, tmp_path: Path) -> None:
    state = tensors(kind)
    lm = from_pretrained(saved(tmp_path, told(kind, share_keys), state))
    assert not lm.training
    w = {name: tensor.double() for name, tensor in state.items()}
    with torch.no_grad():
        logits = lm(TOKENS)
    for row, given in zip(TOKENS, logits, strict=True):
        close(given, evaluated(w, kind, row, share_keys))


@pytest.mark.parametrize("share_keys", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_export_gives_back_their_files(kind: str, share_keys: bool, tmp_path: Path) -> None:
    state = tensors(kind)
    lm = from_pretrained(saved(tmp_path / "theirs", told(kind, share_keys), state))
    export(lm, tmp_path / "ours", "recursions", torch_file=True)
    for back in (
        load_file(tmp_path / "ours" / "model.safetensors"),
        torch.load(tmp_path / "ours" / "pytorch_model.bin", weights_only=True),
    ):
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert from_pretrained(tmp_path / "ours").config == lm.config
    assert config["architectures"] == told(kind)["architectures"]
    shared = {"base_depth": 2, "num_recursion": 3, "sharing": "middle_cycle", "update_cache": False}
    assert config.get("kv_sharing") == (shared | {"enable": True} if share_keys else None)


@pytest.mark.parametrize("name", SIZES)
def test_the_published_runs_are_our_presets(name: str) -> None:
    published = CONFIG | {
        "vocab_size": 49_152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "max_position_embeddings": 2048,
    }
    mor = MOR | {"type": "expert", "expert": MOR["expert"] | {"alpha": 0.1}}
    if name.endswith("token"):
        mor |= {"type": "token", "token": MOR["token"] | {"alpha": 1.0}, "z_loss": True, "z_coeff": 1e-5}
    keys = {"kv_sharing": SHARED_KEYS} if name.endswith("shared") else {}
    made = recursions.to_model(published | {"recursive": RECURSIVE, "mor": mor} | keys)
    ours = preset(name)  # which does not look ahead
    assert made == (ours if name.endswith("token") else ours.override("loop.route.causal=false"))


def test_what_training_alone_needs_is_kept() -> None:
    expert = KINDS["expert"]["mor"] | {"z_loss": True, "z_coeff": 0.25}
    model = recursions.to_model(told("expert") | {"mor": expert})
    assert model.loop is not None
    assert model.loop.route == ExpertChoice(alpha=0.7, balance=0.001, z_loss=0.25, causal=False)
    assert recursions.to_model(recursions.to_config(model)) == model
    warmed = model.override("loop.route.warmup=0.5", "loop.route.causal=true")  # theirs counts steps, ranks
    assert recursions.to_model(recursions.to_config(warmed)) == model


def test_without_the_yaml_its_parts_are_asked_for() -> None:
    config = told("expert")
    for part in ("recursive", "mor"):
        bare = {name: value for name, value in config.items() if name != part}
        assert recognise(bare) is recursions
        with pytest.raises(ValueError, match=rf"lacks {part}, .* copy recursive, mor, kv_sharing.*RUN\.yaml"):
            recursions.to_model(bare)
    assert recognise(CONFIG) is recursions
    with pytest.raises(ValueError, match="lacks recursive and mor"):
        recursions.to_model(CONFIG)


def test_their_vanilla_model_is_a_llama() -> None:
    off = {"enable": False, "num_recursion": None}
    vanilla = CONFIG | KINDS["recursive"]
    assert recognise(vanilla) is llama
    assert recognise(vanilla | {"recursive": off, "mor": off, "kv_sharing": off}) is llama
    assert recognise(vanilla | {"kv_sharing": SHARED_KEYS}) is recursions


@pytest.mark.parametrize(
    ("kind", "part", "change"),
    [
        ("expert", "recursive", {"sharing": "cycle"}),
        ("expert", "recursive", {"sharing": "middle_sequence"}),
        ("expert", "recursive", {"ln_share": False}),
        ("expert", "recursive", {"enable": False}),
        ("expert", "kv_sharing", {"update_cache": True}),
        ("expert", "mor", {"rand_router": True}),
        ("expert", "mor", {"router_type": "wide_mlp"}),
        ("expert", "mor", {"temp": 0.5}),
        ("expert", "mor", {"type": "layer"}),
        ("expert", "mor.expert", {"router_func": "tanh"}),
        ("expert", "mor.expert", {"sampling": "aux_router"}),
        ("expert", "mor.expert", {"gating": "none"}),
        ("token", "mor.token", {"router_func": "sigmoid"}),
        ("token", "mor.token", {"balancing": "loss_free"}),
        ("token", "mor.token", {"gating": "none"}),
    ],
)
def test_what_we_cannot_honour_is_refused(kind: str, part: str, change: dict[str, Any]) -> None:
    config = json.loads(json.dumps(told(kind, share_keys=True)))
    recursions.to_model(config)
    section = config
    for name in part.split("."):
        section = section[name]
    section.update(change)
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=rf"{part}\.{name}={value!r}; supported is"):
        recursions.to_model(config)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mor\.capacity has 2 shares, for 3 recursions"):
        recursions.to_model(told("expert") | {"mor": MOR | {"type": "expert", "capacity": "1.0,0.5"}})
    with pytest.raises(ValueError, match="9 layers, less two ends, do not fold into 3"):
        recursions.to_model(told("expert") | {"num_hidden_layers": 9})
    missing = MOR | {"type": "expert", "expert": {"router_func": "sigmoid"}}
    with pytest.raises(ValueError, match=r"config\.json lacks 'mor\.expert\.alpha'"):
        from_pretrained(saved(tmp_path, told("expert") | {"mor": missing}, {}))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_do_not_share_their_weights_are_refused(kind: str, tmp_path: Path) -> None:
    """As their code trained them for a year, with attention of each step's own."""
    state, (steps, _) = tensors(kind), places(kind)
    name = f"{steps[2][1]}.self_attn.k_proj.weight"
    state[name][0, 0] += 1
    with pytest.raises(ValueError, match=rf"{name} should be {steps[0][1]}.* once more, .* differs"):
        from_pretrained(saved(tmp_path, told(kind), state))
    del state[name]
    with pytest.raises(ValueError, match=f"it lacks {name}"):
        from_pretrained(saved(tmp_path, told(kind), state))


def test_a_head_that_is_not_the_embedding_is_not_dropped(tmp_path: Path) -> None:
    """A recursive model whose parts were not copied looks like a Llama with a tied head."""
    untold = CONFIG | KINDS["recursive"]
    with pytest.raises(ValueError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        from_pretrained(saved(tmp_path, untold, tensors("recursive")))
    apart = from_pretrained(saved(tmp_path, untold | {"tie_word_embeddings": False}, tensors("recursive")))
    again = from_pretrained(saved(tmp_path, told("recursive"), tensors("recursive")))
    close(apart(TOKENS), again(TOKENS))


def test_a_model_that_their_code_cannot_run_is_not_exported() -> None:
    with pytest.raises(ValueError, match="loops pre-norm blocks"):
        recursions.to_config(preset("smollm2-360m"))
    model = recursions.to_model(told("token"))
    assert model.loop is not None
    with pytest.raises(ValueError, match=r"model\.loop\.update"):
        recursions.to_config(model.replace(loop=model.loop.replace(update=Gate())))
    deeper = model.replace(loop=model.loop.replace(route=TokenChoice(depths=4)))
    with pytest.raises(ValueError, match=r"model\.loop\.route\.depths is 4, and would be 3"):
        recursions.to_config(deeper)
    tied = build(Size(shape=SIZES["recursions-360m"].shape)).override('loop.route={"is": "Everyone"}')
    with pytest.raises(ValueError, match=r"model\.tied is True, and would be False"):
        recursions.to_config(tied)
