"""Chen's state dicts: the same logits as a twin that computes with their names, and both ways through a file.

The twin runs on the file's tensors alone, in float64; names and shapes are spelled out as his code has them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.hub import chen
from open_mythos.hub.load import Pretrained, export, from_pretrained, save_pretrained
from open_mythos.nn.context import Context
from open_mythos.presets.chen import CLASSIFIERS, ChenClassifier, Classifier, edges
from tests.by_hand import Weights, attention, close, gelu, layer_norm, linear, rotated
from tests.tiny import MODELS

D, HEADS, WIDTH, VOCAB, TABLE, CONTEXT = 16, 2, 24, 31, 6, 12
KINDS = ["graph", "graph-act", "sequence", "sequence-act"]
TOLD: dict[str, dict[str, Any]] = {
    "graph": {"nhead": HEADS, "n_thinking_steps": 3},
    "graph-act": {"nhead": HEADS},
    "sequence": {"n_thinking_steps": 3},
    "sequence-act": {},
}
RANDOM = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, VOCAB, (3, 7), generator=RANDOM)
REAL = torch.tensor([[True] * 5 + [False] * 2, [True] * 7, [True] * 6 + [False]])
EDGES = torch.rand(3, 7, 7, generator=RANDOM) < 0.3
PAIR = torch.tensor([[4, 0], [2, 6], [1, 1]])


def linear_shapes(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm_shapes(*names: str, dim: int = D) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (dim,) for name in names for part in ("weight", "bias")}


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """The learned tensors, by the names of his modules."""
    graph, act = kind.startswith("graph"), kind.endswith("act")
    io, loop = ("io.", "") if act else ("", "thinking_block.")
    layer, read = f"{loop}layer." if graph or act else loop, 2 * D if graph else D
    found = {f"{io}token_emb.weight": (VOCAB, D), f"{loop}depth_emb.weight": (TABLE, D)}
    found |= norm_shapes(f"{io}emb_norm", f"{layer}norm1", f"{layer}norm2")
    found |= norm_shapes(f"{io}head.0", dim=read)
    found |= linear_shapes(f"{io}head.1", D, read) | linear_shapes(f"{io}head.4", 1, D)
    found |= linear_shapes("halt", 1, D) if act else linear_shapes("thinking_block.gate_proj", D, 2 * D)
    if graph:
        found |= {f"{io}source_role_emb": (D,), f"{io}target_role_emb": (D,)}
        found |= {f"{layer}self_attn.in_proj_weight": (3 * D, D), f"{layer}self_attn.in_proj_bias": (3 * D,)}
        found |= linear_shapes(f"{layer}self_attn.out_proj", D, D)
        return found | linear_shapes(f"{layer}linear1", WIDTH, D) | linear_shapes(f"{layer}linear2", D, WIDTH)
    for part in ("q", "k", "v", "o") if act else ("q_proj", "k_proj", "v_proj", "out_proj"):
        found |= linear_shapes(layer + part, D, D)
    found |= {} if act else {f"{layer}ls1.gamma": (D,), f"{layer}ls2.gamma": (D,)}
    return found | linear_shapes(f"{layer}ffn.0", WIDTH, D) | linear_shapes(f"{layer}ffn.3", D, WIDTH)


def state(kind: str) -> Weights:
    """A state dict as he saves it, with tensors so large that each shows in the logits."""
    rng = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in shapes(kind).items():
        found[name] = 0.3 * torch.randn(shape, generator=rng)
        if len(shape) == 1 and not name.endswith("bias"):
            found[name] += 0.5
    if kind.startswith("sequence"):
        rates = 1.0 / (10_000.0 ** (torch.arange(0, D // HEADS, 2).float() / (D // HEADS)))
        angles = torch.outer(torch.arange(CONTEXT).float(), rates)
        io = "io." if kind.endswith("act") else ""
        found[f"{io}rope.inv_freq"] = rates
        found |= {f"{io}rope.cos_cache": angles.cos(), f"{io}rope.sin_cache": angles.sin()}
    return found


def seen_by(kind: str) -> Tensor:
    if kind.startswith("sequence"):
        return REAL[:, None].expand(3, 7, 7)
    seen = torch.eye(7, dtype=torch.bool).repeat(3, 1, 1)
    for row, u, v in EDGES.nonzero().tolist():
        seen[row, v, u] |= bool(REAL[row, u] and REAL[row, v])
    return seen


def under(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}


def library_layer(w: Weights, u: Tensor, seen: Tensor) -> Tensor:
    layer = nn.TransformerEncoderLayer(D, HEADS, WIDTH, 0.0, batch_first=True, norm_first=True)
    layer = layer.double().eval()
    layer.load_state_dict(w)
    return layer(u, src_mask=(~seen).repeat_interleave(HEADS, 0))


def rotating_layer(w: Weights, u: Tensor, seen: Tensor, names: str) -> Tensor:
    x, at = layer_norm(u, w, "norm1", 1e-5), torch.arange(7).expand(3, 7)
    to_q, to_k, to_v, out = names.split()
    q, k = (rotated(linear(x, w, name), HEADS, 10_000.0, "halves", at) for name in (to_q, to_k))
    heard = linear(attention(q, k, linear(x, w, to_v), HEADS, HEADS, seen), w, out)
    a = u + heard * w.get("ls1.gamma", torch.tensor(1.0))
    y = linear(gelu(linear(layer_norm(a, w, "norm2", 1e-5), w, "ffn.0")), w, "ffn.3")
    return a + y * w.get("ls2.gamma", torch.tensor(1.0))


def layer(kind: str, w: Weights, u: Tensor) -> Tensor:
    seen, act = seen_by(kind), kind.endswith("act")
    loop = "" if act else "thinking_block."
    if kind.startswith("graph"):
        return library_layer(under(w, f"{loop}layer."), u, seen)
    names = "q k v o" if act else "q_proj k_proj v_proj out_proj"
    return rotating_layer(under(w, "layer." if act else loop), u, seen, names)


def twin(kind: str, w: Weights, steps: int) -> Tensor:
    w = {name: tensor.double() for name, tensor in w.items()}
    act, graph = kind.endswith("act"), kind.startswith("graph")
    io = under(w, "io.") if act else w
    h = io["token_emb.weight"][TOKENS]
    if graph:
        for role, name in enumerate(("source_role_emb", "target_role_emb")):
            h = h + F.one_hot(PAIR[:, role], 7)[..., None] * io[name]
    h = layer_norm(h, io, "emb_norm", 1e-5)
    h = halted(kind, w, h) if act else gated(kind, w, h, steps)
    rows = torch.arange(3)
    read = torch.cat([h[rows, PAIR[:, 0]], h[rows, PAIR[:, 1]]], -1) if graph else h[:, 0]
    x = layer_norm(read[:, None], io, "head.0", 1e-5)
    return linear(gelu(linear(x, io, "head.1")), io, "head.4")[:, 0, 0]


def gated(kind: str, w: Weights, h: Tensor, steps: int) -> Tensor:
    for n in range(steps):
        c = layer(kind, w, h + w["thinking_block.depth_emb.weight"][n])
        z = linear(torch.cat([c, h], -1), w, "thinking_block.gate_proj").sigmoid()
        h = z * c + (1 - z) * h
    return h


def halted(kind: str, w: Weights, h: Tensor) -> Tensor:
    total, answer, running = torch.zeros(3, 7).double(), torch.zeros_like(h), REAL
    taken = torch.zeros(3, 7)
    for n in range(TABLE):
        p = linear(h, w, "halt").squeeze(-1).sigmoid()
        halts = running & (total + p >= 0.99)
        weight = torch.where(halts, 1 - total, p) * running
        total, taken = total + p * running, taken + running
        c = layer(kind, w, h + w["depth_emb.weight"][n])
        answer, h = answer + weight[..., None] * c, torch.where(running[..., None], c, h)
        running = running & ~halts
    assert taken[REAL].unique().numel() > 2  # or nobody would notice the halting
    return answer


def logits(kind: str, model: Pretrained, steps: int | None = None) -> Tensor:
    assert isinstance(model, ChenClassifier)
    if kind.startswith("graph"):
        return model(TOKENS, steps, edges(TOKENS, EDGES, REAL), PAIR)
    return model(TOKENS, steps, Context.padded(TOKENS, REAL.long()))


def saved(kind: str, folder: Path, **changes: Tensor) -> Path:
    torch.save(state(kind) | changes, folder / "theirs.pt")
    return folder / "theirs.pt"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_the_twins(kind: str, tmp_path: Path) -> None:
    model = from_pretrained(saved(kind, tmp_path), settings=TOLD[kind])
    assert not model.training
    for steps in (None,) if kind.endswith("act") else (None, 1, 4, TABLE):
        close(logits(kind, model, steps), twin(kind, state(kind), steps or 3))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_export_gives_his_tensors_back_and_folders_the_model(kind: str, tmp_path: Path) -> None:
    model = from_pretrained(saved(kind, tmp_path), settings=TOLD[kind])
    export(model, tmp_path / "out", "chen", torch_file=True)
    again = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert again.keys() == state(kind).keys()
    for name, tensor in state(kind).items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6 if "rope." in name else 0)
    save_pretrained(model, tmp_path / "own")
    for folder in ("out", "own"):
        found = from_pretrained(tmp_path / folder)
        assert found.config == model.config
        assert torch.equal(logits(kind, found), logits(kind, model))


def test_the_files_that_he_published_are_our_presets_by_their_sizes() -> None:
    """Sizes from his scripts; his family task has 54 words, ours 80. The number of steps is another thing."""
    deep = {"vocab_size": 9, "d_model": 256, "nhead": 8, "dim_ff": 1024, "max_seq_len": 128}
    flat = {"vocab_size": 27, "d_model": 128, "nhead": 4, "dim_ff": 256, "max_thinking_steps": 20}
    sequence = {"graph": False, "act": False} | deep
    his = {
        "chen-graph": {"graph": True, "act": False, "n_thinking_steps": 5} | flat,
        "chen-logic": sequence | {"max_thinking_steps": 28, "n_thinking_steps": 10},
        "chen-family": sequence | {"max_thinking_steps": 20, "n_thinking_steps": 8, "vocab_size": 80},
    }
    for name, config in his.items():
        found, wanted = chen.to_model(config), CLASSIFIERS[name]
        assert found.core.loop is not None
        assert wanted.core.loop is not None
        assert found.core.loop.schedule.mean_steps == config["n_thinking_steps"]
        loop = found.core.loop.replace(schedule=wanted.core.loop.schedule)
        assert found.replace(core=found.core.replace(loop=loop)) == wanted
        assert chen.to_config(found) == config | {
            "model_type": "chen",
            "dropout": 0.1,
            ("max_nodes" if config["graph"] else "max_seq_len"): 20 if config["graph"] else 128,
        }


@pytest.mark.parametrize(
    ("kind", "told", "complaint"),
    [
        ("graph", {}, r"do not tell nhead and n_thinking_steps; .*'nhead': 1, 'n_thinking_steps': 5"),
        ("graph", {"nhead": 2}, "do not tell n_thinking_steps;"),
        ("graph-act", {}, "do not tell nhead;"),
        ("sequence", {}, "do not tell n_thinking_steps;"),
        ("sequence", {"n_thinking_steps": 3, "nhead": 4}, "told nhead=4, but its tensors say 2"),
        ("sequence", {"n_thinking_steps": TABLE + 1}, "lies in 1..6, the rows of depth_emb; got 7"),
        ("graph", {"heads": 2}, "have no 'heads' to set; they have .*nhead"),
        ("sequence-act", {"eps": 0.1}, "eps=0.1; supported is 0.01"),
    ],
)
def test_what_was_not_told_or_told_wrongly_is_said(
    kind: str, told: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        from_pretrained(saved(kind, tmp_path), settings=told)


def test_a_config_beside_the_file_is_read_and_settings_take_its_place(tmp_path: Path) -> None:
    path = saved("graph", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"nhead": 4, "n_thinking_steps": 3}))
    assert from_pretrained(path).config == from_pretrained(str(path), settings={"max_nodes": 20}).config
    assert from_pretrained(path, settings={"nhead": 2}).config != from_pretrained(path).config
    export(from_pretrained(path), tmp_path, "chen")
    found = from_pretrained(tmp_path, settings={"n_thinking_steps": 2}).config
    assert isinstance(found, Classifier)
    assert found.core.loop is not None
    assert found.core.loop.schedule.mean_steps == 2


def test_a_file_that_is_not_his_or_not_whole_is_refused(tmp_path: Path) -> None:
    told = TOLD["sequence"]
    turned = torch.outer(torch.arange(CONTEXT).float(), torch.tensor([1.0, 0.2, 0.04, 0.008]))
    with pytest.raises(ValueError, match=r"another rope.cos_cache than that of base 10,000"):
        from_pretrained(saved("sequence", tmp_path, **{"rope.cos_cache": turned.cos()}), settings=told)
    with pytest.raises(ValueError, match=r"unknown thinking_block.ls3.gamma"):
        from_pretrained(saved("sequence", tmp_path, **{"thinking_block.ls3.gamma": turned}), settings=told)
    with pytest.raises(ValueError, match=r"has no matrix token_emb.weight"):
        from_pretrained(saved("sequence", tmp_path, **{"token_emb.weight": torch.zeros(3)}), settings=told)
    for held, complaint in (
        ({"embed.weight": torch.zeros(3, 4)}, "without a config.json only models of Chen's are known"),
        ({"model": state("graph"), "args": {}}, r"more than named tensors.*state_dict\(\)"),
    ):
        torch.save(held, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=complaint):
            from_pretrained(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"no config.json.*name the .pt itself"):
        from_pretrained(tmp_path)


def test_a_model_that_his_code_cannot_run_is_not_exported(tmp_path: Path) -> None:
    graph = CLASSIFIERS["chen-graph"]
    smooth = graph.override("core.loop.layers.0.ffn.activation=gelu")
    with pytest.raises(ValueError, match=r"Chen's code cannot run this model: .*activation is 'gelu'"):
        export(smooth.build(), tmp_path, "chen")
    with pytest.raises(ValueError, match="chen's code cannot run a LoopedLM"):
        export(MODELS["parcae"].build(), tmp_path, "chen")
