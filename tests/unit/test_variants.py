"""Sizes are counted, and even a trillion parameters with a million tokens build and run on meta."""

import pytest
import torch

from open_mythos.main import OpenMythos
from open_mythos.variants import VARIANTS, mythos_1b, mythos_1t

COUNTS = {
    "1b": 1_064_028_034,
    "3b": 3_041_725_186,
    "10b": 9_981_316_994,
    "50b": 50_374_247_426,
    "100b": 99_545_072_130,
    "500b": 497_849_137_154,
    "1t": 999_326_352_386,
}


def _on_meta(cfg):
    with torch.device("meta"):
        return OpenMythos(cfg)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_the_original_s_to_the_last_one(name):
    assert sum(p.numel() for p in _on_meta(VARIANTS[name]()).parameters()) == COUNTS[name]


def test_the_size_that_the_readme_names_and_the_original_lacks():
    count = sum(p.numel() for p in _on_meta(VARIANTS["7b"]()).parameters())
    assert 6.9e9 < count < 7.1e9


@pytest.mark.parametrize("grad", [False, True])
def test_a_million_tokens_of_context_run_on_meta(grad):
    model = _on_meta(mythos_1t(max_loop_iters=2))
    ids = torch.zeros(1, 1_000_000, dtype=torch.long, device="meta")
    with torch.set_grad_enabled(grad):
        logits = model(ids)
    assert logits.shape == (1, 1_000_000, 100_000)


def test_fields_can_be_given_anew():
    cfg = mythos_1b(max_loop_iters=3, attn_type="gqa")
    assert (cfg.max_loop_iters, cfg.attn_type, cfg.dim) == (3, "gqa", 2048)
