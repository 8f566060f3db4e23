"""The front door: light, complete, and word for word what the first README promised."""

# ruff: noqa: RUF001 (their letters)
import subprocess
import sys

import pytest

import open_mythos

USAGE = """
import torch
from open_mythos.main import OpenMythos, MythosConfig


attn_type = "mla"  # or "gqa"

base = {
    "vocab_size": 1000,
    "dim": 256,
    "n_heads": 8,
    "max_seq_len": 128,
    "max_loop_iters": 4,
    "prelude_layers": 1,
    "coda_layers": 1,
    "n_experts": 8,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 64,
    "lora_rank": 8,
    "attn_type": attn_type,
}

if attn_type == "gqa":
    cfg = MythosConfig(**base, n_kv_heads=2)
else:
    cfg = MythosConfig(
        **base,
        n_kv_heads=8,
        kv_lora_rank=32,
        q_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )

model = OpenMythos(cfg)
total = sum(p.numel() for p in model.parameters())
print(f"\\n[{attn_type.upper()}] Parameters: {total:,}")

ids = torch.randint(0, cfg.vocab_size, (2, 16))
logits = model(ids, n_loops=4)
print(f"[{attn_type.upper()}] Logits shape: {logits.shape}")

out = model.generate(ids, max_new_tokens=8, n_loops=8)
print(f"[{attn_type.upper()}] Generated shape: {out.shape}")

A = model.recurrent.injection.get_A()
print(
    f"[{attn_type.upper()}] Spectral radius ρ(A) max: {A.max().item():.4f} (must be < 1)"
)
"""

VARIANTS = """
import torch
from open_mythos import (
    mythos_1b,
    mythos_3b,
    mythos_7b,
    mythos_10b,
    mythos_50b,
    mythos_100b,
    mythos_500b,
    mythos_1t,
    OpenMythos,
)

torch.set_default_device("meta")
cfg = mythos_7b()  # returns a MythosConfig
model = OpenMythos(cfg)

total = sum(p.numel() for p in model.parameters())
print(f"Parameters: {total:,}")
"""


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_the_usage_of_the_first_readme(attention, capsys):
    exec(USAGE.replace('attn_type = "mla"', f'attn_type = "{attention}"'), {})
    said = capsys.readouterr().out
    assert "Logits shape: torch.Size([2, 16, 1000])" in said
    assert "Generated shape: torch.Size([2, 24])" in said
    assert "max: 0.3679" in said


def _run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_variants_of_the_first_readme():
    assert _run(VARIANTS).startswith("Parameters: 7,0")


def test_importing_is_light():
    code = "import sys, open_mythos; open_mythos.__version__; print({'torch', 'numpy'} & set(sys.modules))"
    assert _run(code) == "set()\n"


def test_every_public_name_is_there():
    names = {}
    exec("from open_mythos import *", names)
    assert set(open_mythos.__all__) <= names.keys()
    assert {"MythosTokenizer", "load_tokenizer", "get_vocab_size", "apply_rope"} <= names.keys()


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'mythos_2b'"):
        open_mythos.mythos_2b  # noqa: B018
