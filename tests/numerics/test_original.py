"""The package open-mythos 0.5.0 and ours, on the same weights, agree: GQA and MLA, any depth, cached or not.

The wheel has our import name, so it runs in a process of its own. Where it cannot be had, these tests are
skipped; tests/numerics/test_formula.py writes the model out once more and needs nothing.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from open_mythos.main import MythosConfig, OpenMythos

WHEEL = "open-mythos==0.5.0"
LOOPS = (1, 2, 3, 7)  # of 3 trained ones
TOKENS, PROMPT = 11, 6
SMALL = {
    "vocab_size": 53,
    "dim": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 32,
    "max_loop_iters": 3,
    "prelude_layers": 2,
    "coda_layers": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 5,
    "n_experts": 6,
    "n_shared_experts": 2,
    "n_experts_per_tok": 2,
    "expert_dim": 12,
    "lora_rank": 4,
}
HALTING = {"as_made": None, "open": -6.0, "shut": -18.0, "closed": 6.0}
CASES = {
    f"{attention}-{name}": {
        "cfg": SMALL | {"attn_type": attention},
        "tokens": TOKENS,
        "prompt": PROMPT,
        "loops": LOOPS,
        "halting": bias,
    }
    for attention in ("gqa", "mla")
    for name, bias in HALTING.items()
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What the package says, case by case."""
    place = tmp_path_factory.mktemp("original")
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(place), WHEEL]
    try:
        fetched = subprocess.run(fetch, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip did not fetch {WHEEL} within two minutes")
    wheels = list(place.glob("*.whl"))
    if not wheels:
        pytest.skip(f"pip cannot fetch {WHEEL}: {fetched.stderr.strip()[-200:]}")
    zipfile.ZipFile(wheels[0]).extractall(place)
    (place / "spec.json").write_text(json.dumps(CASES))
    driver = Path(__file__).with_name("run_original.py")
    command = [sys.executable, str(driver), "open_mythos/main.py", "spec.json", "out.pt"]
    subprocess.run(command, cwd=place, check=True, timeout=300)
    return torch.load(place / "out.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_same_weights_same_logits(recorded, case):
    theirs = recorded[case]
    model = OpenMythos.from_original(theirs["state"], CASES[case]["cfg"]).eval()
    with torch.no_grad():
        for n in LOOPS:
            whole = model(theirs["ids"], n_loops=n)
            torch.testing.assert_close(whole, theirs[f"whole_{n}"], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                _decoded(model, theirs["ids"], n), theirs[f"cached_{n}"], atol=1e-4, rtol=1e-4
            )
    assert theirs["whole_3"].std() > 0.1  # logits worth comparing


@pytest.mark.parametrize("case", CASES)
def test_weights_survive_the_way_there_and_back(recorded, case):
    """Weights survive the way there and back, bit for bit, and keep the package's names and shapes."""
    theirs = recorded[case]["state"]
    back = OpenMythos.from_original(theirs, CASES[case]["cfg"]).to_original()
    assert back.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(back[name], weight, atol=0, rtol=0, msg=name)


def test_what_the_package_got_wrong_is_right_unless_asked_for(recorded):
    theirs = recorded["gqa-open"]
    right = OpenMythos.from_original(theirs["state"], CASES["gqa-open"]["cfg"], released=False).eval()
    assert not torch.allclose(right(theirs["ids"], n_loops=2), theirs["whole_2"], atol=1e-2)


def test_the_package_s_checkpoint_loads_as_any_other(recorded):
    theirs = recorded["mla-as_made"]
    model = OpenMythos(MythosConfig(**CASES["mla-as_made"]["cfg"], released=True)).eval()
    model.load_state_dict(theirs["state"])
    torch.testing.assert_close(model(theirs["ids"]), theirs["whole_3"], atol=1e-4, rtol=1e-4)


def _decoded(model, ids, n):
    cache = {}
    steps = [model(ids[:, :PROMPT], n_loops=n, kv_cache=cache)]
    for at in range(PROMPT, TOKENS):
        steps.append(model(ids[:, at : at + 1], n_loops=n, kv_cache=cache, start_pos=at))
    return torch.cat(steps, 1)


@pytest.mark.parametrize("case", CASES)
def test_the_package_s_parts_load_as_parts(recorded, case):
    """Blocks, and the loop whole, by the names that the package gives them; saved again, the same."""
    theirs = recorded[case]["state"]
    model = OpenMythos(MythosConfig(**CASES[case]["cfg"], released=True)).eval()
    parts = {f"prelude.{i}": block for i, block in enumerate(model.prelude)}
    parts |= {f"coda.{i}": block for i, block in enumerate(model.coda)} | {"recurrent": model.recurrent}
    for name, part in parts.items():
        mine = {key.removeprefix(f"{name}."): w for key, w in theirs.items() if key.startswith(f"{name}.")}
        part.load_state_dict(mine)
        assert part.state_dict().keys() == mine.keys()
        assert all(torch.equal(weight, mine[key]) for key, weight in part.state_dict().items())
    model.lm.norm.load_state_dict({"weight": theirs["norm.weight"]})
    model.lm.embed.load_state_dict({"weight": theirs["embed.weight"]})
    logits = model(recorded[case]["ids"])
    torch.testing.assert_close(logits, recorded[case]["whole_3"], atol=1e-4, rtol=1e-4)
