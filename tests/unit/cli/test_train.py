"""What `mythos train` refuses, it refuses before a run is lost and before anything new is left."""

import hashlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from open_mythos.cli import main as cli
from open_mythos.cli.train import Options, _again
from open_mythos.data.text import Files
from open_mythos.train.checkpoint import read_manifest, steps_in
from open_mythos.train.fit import Every, Metrics
from open_mythos.train.recipe import Recipe
from open_mythos.train.step import TrainState
from tests.system import toy

QUIET = ("--device", "cpu", "--track", "none", "--no-sweep")


def mythos(capsys, *argv):
    status = cli.main(["train", *map(str, argv), *QUIET])
    out, err = capsys.readouterr()
    return status, out, err


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recipe, and the folder of a run by it that has ended."""
    place = tmp_path_factory.mktemp("runs")
    recipe = toy.recipe(place, steps=2)
    recipe.save(place / "toy.json")
    toy.train(recipe, place / "run")
    return place / "toy.json", place / "run"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--resume", "--fresh"], "give one of them"),
        ([], "already holds a run, at step 2; go on with --resume"),
        (["--fresh", "optimiser.muon.lr=-1"], "a learning rate is not negative, got Muon.lr=-1"),
        (["--fresh", "optimiser.adamw.beta1=2"], "Invalid beta parameter"),
        (["--fresh", "model.vocab=5"], "the model's vocabulary only 5"),
        (["--fresh", "weights=/nowhere"], "/nowhere"),
    ],
)
def test_an_earlier_run_is_left_as_it_was(run, capsys, words, sentence):
    recipe, folder = run
    before = contents(folder)
    overrides = [word for word in words if "=" in word]
    status, _, err = mythos(capsys, recipe, *overrides, "--out", folder, *(set(words) - set(overrides)))
    assert (status, sentence in err) == (2, True), err
    assert contents(folder) == before


def test_a_run_at_its_end_says_so(run, capsys):
    recipe, folder = run
    status, out, _ = mythos(capsys, recipe, "--resume", "--out", folder, "--no-sweep", "--track", "none")
    assert (status, "is at its end, step 2; with more --steps or --seconds it goes on" in out) == (0, True)


def test_a_refused_resumption_leaves_the_recipe_alone(run, capsys):
    _, folder = run
    before = contents(folder)
    status, _, err = mythos(capsys, "demo", "model.dim=32", "--resume", "--out", folder)
    assert (status, "the checkpoint is from another recipe" in err) == (2, True), err
    assert contents(folder) == before


def test_fresh_starts_over(run, capsys):
    recipe, folder = run
    assert mythos(capsys, recipe, "seed=1", "--out", folder, "--fresh", "--steps", 3)[0] == 0
    assert sorted(toy.losses(folder)) == [1, 2, 3]
    assert '"seed": 1' in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["micro=0"], "micro must be above zero, got 0"),
        (["clip=-1"], "clip must be above zero, got -1"),
        (["--seconds", "nan"], "seconds must be above zero and finite, got nan"),
        (["--seconds", "inf"], "seconds must be above zero and finite, got inf"),
        (["length=4096", "model.context=4096"], "tokens make no row of 4096; give more text"),
        (["clip=NaN"], "a value should be a finite number, got NaN"),
        (["optimiser.muon.lr=Infinity"], "got Infinity"),
        (["model.loop.schedule.mean=NaN"], "got NaN"),
        (["seed=-1"], "seed should be 0 to 2^63 - 1, got -1"),
        (["seed=99999999999999999999999"], "seed should be 0 to 2^63 - 1"),
        (["--threads", "0"], "--threads should be at least 1, got 0"),
        (["--data", "stuff", "length=8"], "'length=8' reads like an override"),
        (["weights=/nowhere"], "/nowhere"),
        (["optimiser.adamw.eps=-1"], "Invalid epsilon"),
        (["model.prelude.*.dropout=1"], "PreNorm.dropout should lie in [0, 1), got 1.0"),
        (["model.loop.layers.*.mixer.dropout=-0.1"], "MLA.dropout should lie in [0, 1), got -0.1"),
        (["model.init.std=-1"], "got std=-1.0 and out=0.0"),
        (["model.loop.schedule.mean=1e9"], "a mean of 1000000000.0 steps lies above most=16; raise most too"),
        (["model.loop.schedule.sigma=-1"], "needs sigma above 0"),
        (["model.loop.schedule.mean=" + "[" * 100_000], "nested too deeply"),
    ],
)
def test_what_is_refused_leaves_nothing(run, tmp_path, capsys, words, sentence):
    status, _, err = mythos(capsys, run[0], *words, "--out", tmp_path / "new")
    assert (status, sentence in err) == (2, True), err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_disk_at_the_beginning_says_what_to_do_and_leaves_no_halves(
    run, tmp_path, capsys, full_disk, call
):
    """The first file is config.json, then come two of the tokenizer."""
    full_disk(call)
    status, _, err = mythos(capsys, run[0], "--out", tmp_path / "new")
    names = ("config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
    said = f"cannot write {tmp_path / 'new' / names[call - 1]}: No space left on device; free some space"
    assert (status, said in err) == (1, True), err
    left = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*.*")}
    assert left == {*names[: call - 1]}
    assert mythos(capsys, run[0], "--out", tmp_path / "new")[0] == 0


def test_a_full_disk_leaves_the_recipe_of_a_run_that_goes_on(run, tmp_path, capsys, full_disk):
    toy.train(Recipe.load(run[0]), tmp_path / "full")
    before = contents(tmp_path / "full")
    full_disk(1)
    assert mythos(capsys, "--resume", "--steps", 9, "--out", tmp_path / "full")[0] == 1
    assert contents(tmp_path / "full") == before


def test_one_small_file_is_enough(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a short text\n" for i in range(300)))
    words = ("--data", tmp_path / "a.txt", "--out", tmp_path / "new", "--steps", 2)
    status, _, err = mythos(capsys, run[0], *words)
    assert status == 0, err
    learned, held_out = (int(n) for n in re.findall(r"(\d+) (?:tokens|held)", err.replace(",", "")))
    assert 0.18 < held_out / (learned + held_out) < 0.22


def test_a_held_out_loss_that_is_not_finite_is_said_once_and_no_score(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("open_mythos.train.evaluate.held_out_bits", lambda *_, **__: float("nan"))
    folder = tmp_path / "new"
    status, out, err = mythos(capsys, run[0], "eval_every=1", "--out", folder)
    assert status == 0, err
    assert out.replace("\n", " ").count("the held-out loss at step 1 is not finite") == 1
    assert "at step 2 is not" not in out
    steps = steps_in(folder / "checkpoints")
    assert [read_manifest(steps[step])["score"] for step in (1, 2)] == [None, None]


def test_a_sample_is_of_its_step(run, tmp_path, capsys):
    out = mythos(capsys, run[0], "sample_every=1", "--steps", 2, "--out", tmp_path / "new")[1]
    assert re.findall(r"sample at step (\d+)", out) == ["1", "2"]


def test_a_run_with_relative_data_goes_on_from_elsewhere(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a short text\n" for i in range(300)))
    monkeypatch.chdir(tmp_path)
    assert mythos(capsys, run[0], "--data", "a.txt", "--out", "new", "--steps", 2)[0] == 0
    assert Recipe.load(tmp_path / "new" / "config.json").data.source.paths == (str(tmp_path / "a.txt"),)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    status, _, err = mythos(capsys, "--resume", "--out", tmp_path / "new", "--steps", 3)
    assert status == 0, err
    assert cli.main(["sweep", str(tmp_path / "new"), "--loops", "1", "--rows", "2", "--device", "cpu"]) == 0


def test_an_older_run_with_relative_data_goes_on_where_it_was(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a short text\n" for i in range(300)))
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(run[0])
    data = recipe.data.replace(source=Files(paths=("a.txt",)), ends=True)
    toy.train(recipe.replace(data=data), tmp_path / "old")
    status, _, err = mythos(capsys, "--resume", "--out", "old", "--steps", 3)
    assert status == 0, err
    assert Recipe.load(tmp_path / "old" / "config.json").data.source.paths == (str(tmp_path / "a.txt"),)


def interrupting(*_args, **_named):
    raise KeyboardInterrupt


def test_interrupted_before_the_first_step_says_to_begin_again(run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("open_mythos.train.fit.Run.fit", interrupting)
        status, _, err = mythos(capsys, run[0], "--out", tmp_path / "new")
    assert (status, "interrupted before anything was saved; to begin again" in err) == (130, True), err
    status, _, err = mythos(capsys, "--resume", "--out", tmp_path / "new")
    assert (status, "it was ended before it saved one, begin without --resume" in err) == (2, True), err
    assert mythos(capsys, run[0], "--out", tmp_path / "new")[0] == 0


def test_interrupted_in_the_last_sweep_says_what_is_saved(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("open_mythos.analysis.sweep.sweep", interrupting)
    folder = tmp_path / "my run"
    words = ["train", run[0], "--out", folder, "--device", "cpu", "--track", "none"]
    assert cli.main([*map(str, words)]) == 130
    err = capsys.readouterr().err
    assert f"{folder} is saved at step 2. Go on (at its end, with the sweep and the report)" in err
    assert f"--out '{folder}' --resume" in err


def test_interrupted_twice_says_the_last_checkpoint(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("open_mythos.train.evaluate.evaluate", interrupting)
    folder = tmp_path / "new"
    status, _, err = mythos(capsys, run[0], "eval_every=3", "--steps", 9, "--out", folder)
    assert status == 130
    assert f"{folder} is saved at step 2. Go on" in err


def test_a_folder_with_something_else_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    before = contents(tmp_path)
    status, _, err = mythos(capsys, run[0], "--out", tmp_path)
    assert (status, "config.json is not of a run, and a run would write over it" in err) == (2, True), err
    assert contents(tmp_path) == before


def test_a_run_needs_a_folder_of_its_own(run, capsys):
    status, _, err = mythos(capsys, run[0], "--out", "")
    assert (status, "--out should name a folder for the run" in err) == (2, True), err


def flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize(("damage", "why"), [(flipped, "SHA-256"), (lambda content: b"", "cut short")])
def test_a_damaged_newest_checkpoint_is_passed_over_and_that_is_said(run, tmp_path, capsys, damage, why):
    folder = tmp_path / "torn"
    toy.train(Recipe.load(run[0]), folder)
    for step in (2, 1):
        weights = folder / "checkpoints" / f"step-{step:08}" / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(damage(before))
        for words in (
            ["generate", folder, "--prompt", "a", "--tokens", 3],
            ["sweep", folder, "--loops", "1"],
        ):
            status = cli.main([*map(str, words), "--device", "cpu"])
            err = capsys.readouterr().err
            assert (status, why in err) == (0 if step == 2 else 2, True), err
            assert err.count("\n") == 1
            assert (f"passed over a damaged checkpoint, took {folder}/checkpoints/step-00000001" in err) == (
                step == 2
            )
    weights.write_bytes(before)
    status, _, err = mythos(capsys, "--resume", "--out", folder, "--steps", 3)
    assert (status, "passed over a damaged checkpoint, took" in err, why in err) == (0, True, True), err
    assert sorted(toy.losses(folder)) == [1, 2, 3]


def test_the_way_to_go_on_is_quoted_for_the_shell():
    words = shlex.split(_again(Path("my runs/a'b"), Options(recipe="toy one.json")))
    assert words == ["mythos", "train", "toy one.json", "--out", "my runs/a'b", "--resume"]


def test_a_folder_cannot_be_in_a_file(run, capsys):
    status, _, err = mythos(capsys, run[0], "--out", run[0] / "below")
    assert status == 2
    assert f"a run needs a folder, but {run[0]} is a file" in err


def test_rows_of_one_token_train_to_the_end(run, tmp_path, capsys):
    assert mythos(capsys, run[0], "length=1", "--steps", 2, "--out", tmp_path / "short")[0] == 0
    assert sorted(toy.losses(tmp_path / "short")) == [1, 2]


def test_a_run_in_two_parts_draws_the_dropout_of_the_run_in_one(run, tmp_path, capsys):
    recipe = Recipe.load(run[0]).override("model.prelude.*.dropout=0.1", "steps=4")
    recipe.save(tmp_path / "dropout.json")
    assert mythos(capsys, tmp_path / "dropout.json", "--out", tmp_path / "whole")[0] == 0
    with pytest.raises(KeyboardInterrupt):
        toy.train(recipe, tmp_path / "parts", [Every(1, interrupt_the_third_step)])
    assert mythos(capsys, "--resume", "--out", tmp_path / "parts")[0] == 0
    ours, theirs = (saved(tmp_path / name, 4) for name in ("whole", "parts"))
    assert ours.keys() == theirs.keys()
    assert any("random" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def interrupt_the_third_step(state: TrainState, metrics: Metrics) -> None:
    if state.step == 3:
        raise KeyboardInterrupt


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    files = sorted((folder / "checkpoints" / f"step-{step:08}").glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}
