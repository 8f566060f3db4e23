import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from open_mythos.train import checkpoint
from open_mythos.train.checkpoint import latest, load, recover, require_same, save, step_folder, steps_in

META = {"step": 3, "config": {"dim": 8}}


def tensors(fill: float = 1.0) -> dict[str, Tensor]:
    shared = torch.full((4, 4), fill)
    return {
        "model/embed.weight": shared,
        "model/head.weight": shared,
        "model/half": torch.full((3,), fill, dtype=torch.bfloat16),
        "optimizer/w/momentum": torch.full((2, 3), fill).T,
        "optimizer/w/step": torch.tensor(fill),
        "loose": torch.arange(4, dtype=torch.uint8),
        "nothing": torch.empty(0, 3),
    }


def test_everything_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "c", tensors(), META)
    back, meta = load(tmp_path / "c")
    assert meta == META
    assert back.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert sorted(os.listdir(tmp_path)) == ["c"]


def test_a_part_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    save(tmp_path / "c", tensors(), META)
    assert load_file(tmp_path / "c" / "model.safetensors").keys() == {"embed.weight", "half"}
    assert load(tmp_path / "c", only="model")[0].keys() == {
        "model/embed.weight",
        "model/head.weight",
        "model/half",
    }
    with pytest.raises(ValueError, match="no part 'data'; it has"):
        load(tmp_path / "c", only="data")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_who_may_read_the_folder_may_read_every_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save(tmp_path / "c", tensors(), META)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()}
    assert modes == {0o666 & ~umask}


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    given = {"a": weight, "b": weight.detach(), "row": weight[1], "transposed": weight.T}
    save(tmp_path / "c", given, META)
    back, _ = load(tmp_path / "c")
    assert back["a"] is back["b"]
    assert torch.equal(back["row"], weight[1])
    assert torch.equal(back["transposed"], weight.T)
    assert back["row"].data_ptr() != back["a"][1].data_ptr()


def test_no_pickle_anywhere(tmp_path: Path) -> None:
    save(tmp_path / "c", tensors(), META)
    assert {path.suffix for path in (tmp_path / "c").iterdir()} == {".safetensors", ".json"}


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(tmp_path / "c", tensors(1.0), META)
    save(tmp_path / "c", tensors(2.0), META)
    assert load(tmp_path / "c")[0]["loose"].numel() == 4
    assert load(tmp_path / "c")[0]["optimizer/w/step"] == 2.0
    assert sorted(os.listdir(tmp_path)) == ["c"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "meta.json"])
@pytest.mark.parametrize(
    ("damage", "says"), [(cut, "cut short"), (flip, "SHA-256"), (Path.unlink, "lacks its file")]
)
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: Any, says: str) -> None:
    save(tmp_path / "c", tensors(), META)
    damage(tmp_path / "c" / name)
    with pytest.raises(ValueError, match=f"{says}|{name}.*{says}"):
        load(tmp_path / "c")


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint folder"):
        load(tmp_path / "missing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"holds pytorch_model.bin"):
        load(tmp_path)
    whole = {"format": checkpoint.FORMAT, "aliases": {}}
    of_ours = (json.dumps(whole | more) for more in ({}, {"files": {"meta.json": 3}}, {"files": {"a": {}}}))
    for manifest in ("{", "[]", "[" * 100_000, '{"format": "other"}', *of_ours):
        (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(ValueError, match=r"manifest\.json|format"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["../evil/x", "a b/x", "/x/y"])
def test_part_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="letters"):
        save(tmp_path / "c", {name: torch.zeros(1)}, META)
    assert not list(tmp_path.iterdir())


def test_meta_must_be_json(tmp_path: Path) -> None:
    for meta in ({"x": {1}}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="JSON"):
            save(tmp_path / "c", tensors(), meta)
    assert not list(tmp_path.iterdir())


def test_another_config_is_named() -> None:
    require_same({"a": {"b": 1}}, {"a": {"b": 1}})
    with pytest.raises(ValueError, match=r"config.a.b was 1 and is 2; config.c is only in the checkpoint"):
        require_same({"a": {"b": 1}, "c": 0}, {"a": {"b": 2}})


def test_the_latest_whole_one(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None
    for step in (9, 10, 100, 200):
        save(step_folder(tmp_path, step), tensors(), META)
    cut(step_folder(tmp_path, 200) / "model.safetensors")
    step_folder(tmp_path, 300).mkdir()
    assert latest(tmp_path) == step_folder(tmp_path, 100)
    assert list(steps_in(tmp_path)) == [9, 10, 100]


@pytest.mark.parametrize("room", [0, 100, 2000, 100_000])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, room: int) -> None:
    """No file of this process may grow beyond `room` bytes while it saves."""
    save(tmp_path / "c", tensors(1.0), META)
    big = {"model/w": torch.zeros(100_000), "optimizer/w": torch.zeros(9)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path / "c", big, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == ["c"]
    assert load(tmp_path / "c")[0]["optimizer/w/step"] == 1.0


@pytest.mark.parametrize("call", range(1, 12))
def test_an_error_at_any_sync_leaves_the_old_or_the_new(
    tmp_path: Path, full_disk: Callable[[int], None], call: int
) -> None:
    save(tmp_path / "c", tensors(1.0), META)
    full_disk(call)
    failed = False
    try:
        save(tmp_path / "c", tensors(2.0), META)
    except OSError:
        failed = True
    assert failed == (call <= 7)  # three parts, meta, manifest, the draft and the folder above
    recover(tmp_path)
    assert load(tmp_path / "c")[0]["optimizer/w/step"] == (1.0 if call <= 6 else 2.0)
    assert sorted(os.listdir(tmp_path)) == ["c"]


def test_a_failed_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "c", tensors(1.0), META)
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".draft"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path / "c", tensors(2.0), META)
    assert os.listdir(tmp_path) == ["c"]
    assert load(tmp_path / "c")[0]["optimizer/w/step"] == 1.0


def test_a_crash_between_the_renames_is_undone(tmp_path: Path) -> None:
    save(step_folder(tmp_path, 1), tensors(1.0), META)
    step_folder(tmp_path, 1).rename(tmp_path / ".step-00000001.replaced")
    (tmp_path / ".step-00000001.draft").mkdir()
    recover(tmp_path)
    assert load(step_folder(tmp_path, 1))[0]["optimizer/w/step"] == 1.0
    assert os.listdir(tmp_path) == ["step-00000001"]


SAVES_FOREVER = """
import sys, torch
from pathlib import Path
from open_mythos.train.keeper import Keep
keeper = Keep(last=2, best=0, background={background}).build(Path(sys.argv[1]))
print("ready", flush=True)
for step in range(1, 10**6):
    # twice, so that replacing is interrupted too
    for _ in range(2):
        keeper.save(step, {{"model": {{"w": torch.full((300_000,), float(step))}}, "step": step}})
"""


@pytest.mark.parametrize("background", [True, False])
def test_killed_at_any_moment_the_newest_is_whole(tmp_path: Path, background: bool) -> None:
    from open_mythos.train.keeper import Keep

    last = 0
    for delay in (0.05, 0.2):
        program = [sys.executable, "-c", SAVES_FOREVER.format(background=background), str(tmp_path)]
        with subprocess.Popen(program, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            while not steps_in(tmp_path):
                time.sleep(0.005)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        keeper = Keep(last=2, best=0).build(tmp_path)  # clears up
        assert all(path.name.startswith("step-") for path in tmp_path.iterdir())
        for step, folder in steps_in(tmp_path).items():
            assert torch.equal(load(folder)[0]["model/w"], torch.full((300_000,), float(step)))
        last = keeper.load()["step"]
        assert last > 0
