"""Two gloo processes learn what one learns, gather their weights as often for any depth, and survive a death.

Starting two processes takes seconds, so few tests start them, each for several questions.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.loop.schedule import Plan
from open_mythos.train.checkpoint import load, steps_in
from open_mythos.train.metrics import read_rows
from open_mythos.train.parallel import World, join, restarted
from open_mythos.train.recipe import Recipe
from tests.system import toy

OPTIONS = ["--device", "cpu", "--no-sweep", "--threads", "1", "--wait", "60"]


def on_two(recipe: Path | None, out: Path, *options: str, restarts: int = 0) -> "subprocess.Popen[str]":
    name = [str(recipe)] if recipe else []
    argv = ["-m", "open_mythos.cli.main", "train", *name, "--out", str(out), *OPTIONS, *options]
    return toy.torchrun(2, *argv, restarts=restarts)


def finish(process: "subprocess.Popen[str]") -> None:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said


def losses_agree(one: Path, other: Path, within: float = 5e-4) -> None:
    ours, theirs = toy.losses(one), toy.losses(other)
    assert ours.keys() == theirs.keys()
    assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=within)


def write(recipe: Recipe, path: Path) -> Path:
    recipe.save(path)
    return path


def test_depth_costs_no_communication(tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    finish(toy.torchrun(2, str(Path(__file__).parent / "count.py"), str(out)))
    found = json.loads(out.read_text())
    assert len({json.dumps(counts) for counts in found["counts"].values()}) == 1, found["counts"]
    assert found["counts"]["7"] == {"_allgather_base_": 7, "_reduce_scatter_base_": 4}
    assert found["bfloat16"] == "{torch.float32}"
    assert found["sample"] is True
    assert found["exits"] == [True, True]
    experts_are_apart(found["apart"])


def experts_are_apart(found: dict[str, Any]) -> None:
    assert found["stacks"] == [4]  # of eight experts, and nobody gathers the others
    assert max(found["gradients"]) < 1e-5
    assert found["bfloat16"] == "{torch.float32}"
    assert found["sample"] is True
    halting = found["halting"]
    assert len(set(halting["alone"])) > 1
    assert set(halting["together"]) == {9}
    assert all(halting["same"])


@pytest.mark.slow
def test_experts_are_shared_out_by_two_and_sharded_by_two_more(tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    finish(toy.torchrun(4, str(Path(__file__).parent / "count.py"), str(out)))
    experts_are_apart(json.loads(out.read_text())["apart"])


@pytest.mark.slow
def test_experts_shared_out_learn_what_they_do_in_one_process_and_go_on_there(tmp_path: Path) -> None:
    exact = toy.recipe(tmp_path, steps=4).override('optimiser.muon.precision="float32"')
    apart = write(exact.replace(expert_parallel=2), tmp_path / "apart.json")
    toy.train(exact, tmp_path / "one")
    finish(on_two(apart, tmp_path / "two"))
    losses_agree(tmp_path / "one", tmp_path / "two", 1e-5)
    ours, theirs = (biases(tmp_path / name) for name in ("one", "two"))
    assert ours.any()
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="expert_parallel=2 needs a multiple of 2 processes, and there is 1"):
        toy.train(exact.replace(expert_parallel=2), tmp_path / "alone")
    toy.train(exact.replace(steps=6), tmp_path / "two")
    finish(on_two(apart, tmp_path / "one", "expert_parallel=2", "--resume", "--steps", "6"))
    losses_agree(tmp_path / "one", tmp_path / "two", 1e-5)


def biases(run: Path) -> torch.Tensor:
    """What balances the experts, after the run's last update."""
    saved, _ = load(steps_in(run / "checkpoints").popitem()[1], only="model")
    return torch.cat([tensor for name, tensor in saved.items() if name.endswith("ffn.bias")])


def test_two_processes_learn_what_one_does_and_hand_over_to_it_and_back(tmp_path: Path) -> None:
    recipe = write(toy.recipe(tmp_path, steps=6, save_every=3), tmp_path / "toy.json")
    toy.train(Recipe.load(recipe), tmp_path / "one")
    finish(on_two(recipe, tmp_path / "two"))
    losses_agree(tmp_path / "one", tmp_path / "two")
    ours, theirs = (load(tmp_path / name / "checkpoints" / "step-00000006")[0] for name in ("one", "two"))
    names = {name for name in ours if not name.startswith("ranks/")}  # each rank has random states of its own
    assert names == {name for name in theirs if not name.startswith("ranks/")}
    assert all(ours[name].shape == theirs[name].shape for name in names)
    damage_is_found(tmp_path / "two" / "checkpoints" / "step-00000006", tmp_path / "damaged")
    longer = Recipe.load(recipe).replace(steps=8)
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    toy.train(longer, tmp_path / "alone")  # saved by two, resumed by one
    finish(on_two(None, tmp_path / "one", "--resume", "--steps", "8"))  # the reverse
    losses_agree(tmp_path / "one", tmp_path / "alone")


def damage_is_found(saved: Path, copy: Path) -> None:
    """Each rank wrote its shards, no more, and one that is missing or altered is named."""
    shards = sorted((saved / "shards").iterdir())
    assert [path.name[:11] for path in shards] == ["shard-00001", "shard-00002"]
    assert all(path.suffix in (".safetensors", ".json", "") for path in saved.rglob("*"))
    whole = sum(tensor.nbytes for tensor in load(saved)[0].values())
    assert max(path.stat().st_size for path in shards) < 0.7 * whole
    for harm, says in ((Path.unlink, "lacks its file shard-00002"), (flip, "shard-00002.*SHA-256")):
        shutil.copytree(saved, copy)
        harm(copy / "shards" / shards[1].name)
        with pytest.raises(ValueError, match=says):
            load(copy)
        shutil.rmtree(copy)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_nothing_but_time_is_lost(tmp_path: Path) -> None:
    recipe = write(toy.recipe(tmp_path, steps=40, save_every=2), tmp_path / "toy.json")
    calm, torn = tmp_path / "calm", tmp_path / "torn"
    finish(on_two(recipe, calm))
    process = on_two(recipe, torn, restarts=2)
    log = torn / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (log.exists() and len(read_rows(log)) > 10):
        time.sleep(0.01)
    os.kill(child_of_rank(process.pid, 1), signal.SIGKILL)
    killed_at = len(read_rows(log))
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert killed_at < 40
    losses_agree(calm, torn)
    newest = [steps_in(folder / "checkpoints").popitem()[1] for folder in (calm, torn)]
    (ours, _), (theirs, _) = (load(folder, only="model") for folder in newest)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def child_of_rank(launcher: int, rank: int) -> int:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
def test_a_rank_that_never_comes_is_missed_in_so_many_words(tmp_path: Path) -> None:
    recipe = write(toy.recipe(tmp_path, steps=2), tmp_path / "toy.json")
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29777",
    }
    argv = [
        sys.executable,
        "-m",
        "open_mythos.cli.main",
        "train",
        str(recipe),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [*argv, *OPTIONS[:-1], "2"],
        env=os.environ | alone,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "did not find all 2 processes" in done.stderr


def test_each_rank_takes_its_rows_of_the_one_plan() -> None:
    plan = Plan((1, 2, 3, 4, 5, 6), (1, 1, 2, 2, 3, 3))
    parts = [World(rank, 3).of_plan(plan) for rank in range(3)]
    assert parts == [Plan((1, 2), (1, 1)), Plan((3, 4), (2, 2)), Plan((5, 6), (3, 3))]
    assert World(1, 3).of_plan(Plan(4, 2)) == Plan(4, 2)
    parts = [World(rank, 4, expert_parallel=2).of_plan(Plan((1, 2, 3, 4))) for rank in range(4)]
    assert parts == [Plan((1, 2)), Plan((1, 2)), Plan((3, 4)), Plan((3, 4))]


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, steps=1)
    assert [recipe.rows_on(ranks) for ranks in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(
        ValueError, match="a batch of 4 does not split into micro-batches of 1 on each of 3 ranks"
    ):
        recipe.rows_on(3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["expert_parallel=3"], "8 experts cannot be shared out evenly by expert_parallel=3"),
        (["expert_parallel=0"], "at least 1, got 0"),
        (["expert_parallel=2", "compile=true"], "leave compile or expert_parallel=2 out"),
        (["expert_parallel=2", 'model.loop.route={"is": "ExpertChoice"}'], "ExpertChoice skips a step"),
        (["expert_parallel=2", "model.loop=null"], "this model has none"),
    ],
)
def test_experts_that_cannot_be_shared_out_are_refused(tmp_path: Path, changes: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        toy.recipe(tmp_path).override(*changes)


def test_processes_that_cannot_share_experts_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    three = join(torch.device("cpu"), expert_parallel=2)
    with pytest.raises(ValueError, match="a multiple of 2 processes, and there are 3"), three:
        raise AssertionError("two share out what three hold")


def test_a_restart_is_known_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
        assert not restarted()
        monkeypatch.setenv(name, "1")
        assert restarted()
        monkeypatch.setenv(name, "0")
