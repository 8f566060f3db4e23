"""show, generate and sweep on a small run; what a user gets wrong is one sentence and a status."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from open_mythos.cli import main as cli
from open_mythos.cli.generate import _Continuation, _print_all, _print_as_it_comes
from open_mythos.cli.named import choice
from open_mythos.cli.sweep import depths
from open_mythos.data.corpus import CorpusConfig
from open_mythos.data.text import Files
from open_mythos.data.tokenizer import Bytes
from open_mythos.infer.generate import Emitted
from open_mythos.loop.exit import Exit, StateChange, Steps
from open_mythos.train import checkpoint
from open_mythos.train.recipe import Recipe
from tests.tiny import MODELS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose model has not learned anything."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("runs")
    for i in range(20):
        (place / f"text{i}.txt").write_text(f"line {i} of some text that is held out or not\n" * 9)
    config = MODELS["parcae"].replace(vocab=259, context=256)
    for layers in ("prelude", "loop.layers", "coda"):
        config = config.override(
            f'{layers}.*.mixer.values={{"is": "ValueEmbedding", "vocab": 259, "gate": 8}}'
        )
    source = Files(paths=tuple(str(path) for path in sorted(place.glob("*.txt"))))
    data = CorpusConfig(source=source, tokenizer=Bytes(), held_out=0.3)
    folder = place / "small"
    folder.mkdir()
    Recipe(model=config, data=data, length=32, batch=4, steps=10).save(folder / "config.json")
    Bytes().build().save(folder / "tokenizer")
    weights = {f"model/{name}": tensor for name, tensor in config.build().state_dict().items()}
    checkpoint.save(checkpoint.step_folder(folder / "checkpoints", 10), weights, {"step": 10, "state": {}})
    return folder


def mythos(capsys, *argv):
    status = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_show_draws_a_run_and_counts_it(run, capsys):
    status, out, _ = mythos(capsys, "show", run, "--loops", 7)
    assert status == 0
    for word in (
        "loop, 7 times",
        "Diagonal",
        "head_norm",
        "PerLoop",
        "one loop",
        "all, 7 loops",
        "embed 259 x 32",
    ):
        assert word in out


def test_show_takes_names_files_and_overrides(tmp_path, capsys):
    assert "demo" in mythos(capsys, "show")[1]
    status, out, _ = mythos(capsys, "show", "mythos_1b", "loop.schedule.steps=3", "--json")
    assert status == 0
    assert json.loads(out)["loop"]["schedule"] == {"is": "Fixed", "steps": 3, "grad": None}
    (tmp_path / "mine.json").write_text(out)
    again = mythos(capsys, "show", tmp_path / "mine.json")[1]
    assert "loop, 3 times" in again
    assert "1,064,028,034" in again


def test_generate_is_repeatable_and_streams_what_all_at_once_gives(run, capsys):
    words = ("generate", run, "--prompt", "line 3", "--tokens", 12, "--seed", 5)
    status, out, _ = mythos(capsys, *words)
    assert status == 0
    assert out.startswith("line 3")
    assert mythos(capsys, *words)[1] == out
    assert mythos(capsys, *words, "--seed", 6)[1] != out
    several = mythos(capsys, *words, "--samples", 2)[1]
    assert several.startswith(f"--- 1\n{out.rstrip()}")
    assert "--- 2" in several


def test_generate_at_a_depth_and_with_an_exit_says_how_deep(run, capsys):
    words = ("generate", run, "--prompt", "a", "--tokens", 6, "--depths", "--temperature", 0)
    assert "6 took 5" in mythos(capsys, *words, "--loops", 5)[2]
    assert "6 took 2" in mythos(capsys, *words, "--loops", 5, "--exit", "Steps:steps=2")[2]
    shared = mythos(capsys, *words, "--exit", "StateChange:threshold=0.5", "--cache", "Ring:slots=2")
    assert shared[0] == 0
    assert "steps per token over 6 tokens" in shared[2]


class Words:
    """A tokenizer that decodes token i to the i-th of these words."""

    words = ("A", " brown", " fox", " sees", " a", "fox")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), "A brown fox sees"),
        (("brown",), "A brown"),
        (("row",), "A brow"),
        (("n f",), "A brown f"),
        (("sees", "n f", "fox"), "A brown f"),
        (("never",), "A brown fox sees"),
    ],
)
def test_a_stop_ends_the_text_wherever_its_tokens_begin(capsys, stop, text):
    made = [Emitted(0, token, 2, "length" if token == 3 else None) for token in range(4)]
    row = _Continuation(Words(), [], stop)
    _print_as_it_comes(iter(made), "> ", row)
    assert capsys.readouterr().out == f"> {text}\n"
    assert len(row.depths) == len(text.split())
    rows = [_Continuation(Words(), [], stop), _Continuation(Words(), [], ("A",))]
    _print_all((e._replace(row=i) for e in made for i in (0, 1)), "> ", rows)
    assert capsys.readouterr().out == f"--- 1\n> {text}\n--- 2\n> A\n"


def test_new_words_do_not_run_into_the_prompt(capsys):
    class Numbers:
        def decode(self, ids):
            return " ".join(map(str, ids))

    made = [Emitted(0, token, 2, "length" if token == 5 else None) for token in (4, 5)]
    _print_as_it_comes(iter(made), "1 2 3", _Continuation(Numbers(), [1, 2, 3], ()))
    assert capsys.readouterr().out == "1 2 3 4 5\n"


def test_generate_stops_at_a_text(run, capsys):
    words = ("generate", run, "--prompt", "line 3", "--tokens", 12, "--seed", 5)
    said = mythos(capsys, *words)[1].removeprefix("line 3")
    assert mythos(capsys, *words, "--stop", said[2])[1] == f"line 3{said[: said.index(said[2]) + 1]}\n"


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # in PyTorch's own imports
def test_generate_asks_for_a_compiler_before_it_begins(run, capsys):
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        status, out, err = mythos(capsys, "generate", run, "--prompt", "a", "--compile")
    assert (status, out) == (2, "")
    assert "there is none; install g++ or clang" in err


def test_sweep_prints_and_writes_what_the_report_reads(run, capsys):
    status, out, _ = mythos(capsys, "sweep", run, "--loops", "1:4", "--rows", 4)
    assert status == 0
    assert "bits per byte" in out
    assert json.loads((run / "sweep.json").read_text())["loops"] == [1, 2, 3, 4]
    (run / "sweep.json").unlink()
    other = run.parent / "text3.txt"
    assert (
        mythos(capsys, "sweep", run, "--loops", "2,4", "--data", other, "--length", 16, "--no-save")[0] == 0
    )
    assert not (run / "sweep.json").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["show", "mythos_2b"], "there is no model, file or folder 'mythos_2b'; close to it are mythos_"),
        (["show", "mythos_1b", "loop.hat=1"], "loop.hat"),
        (["show", "mythos_1b", "--loops", "0"], "at least one step"),
        (["show", "mythos_1b", "--loops", "9" * 20], "up to 1,000,000 steps"),
        (["show", "none.json"], "there is no file"),
        (["generate", "nowhere", "--prompt", "a"], "there is no folder nowhere"),
        (["generate", "RUN", "--prompt", ""], "prompt is empty"),
        (["generate", "RUN", "--prompt", "a", "--loops", "0"], "at least one step, got loops=0"),
        (["generate", "RUN", "--prompt", "a", "--tokens", "300"], "more than the model's context of 256"),
        (["generate", "RUN", "--prompt", "a", "--exit", "Stats"], "did you mean Steps?"),
        (["generate", "RUN", "--prompt", "a", "--exit", "Steps"], "Steps needs steps"),
        (["generate", "RUN", "--prompt", "a", "--top-p", "1.5"], "top_p should be in (0, 1], got 1.5"),
        (["generate", "RUN", "--prompt", "a", "--step", "9"], "has no checkpoint of step 9; it has steps 10"),
        (["generate", "RUN", "--prompt", "a", "--tokens", "0"], "--tokens should be at least 1, got 0"),
        (["generate", "RUN", "--prompt", "a", "--device", "meta"], "the device 'meta' cannot be used"),
        (["generate", "RUN", "--prompt", "a", "--stop", ""], "--stop should be some text"),
        (["generate", "RUN", "--prompt", "\udcff"], "the prompt is not valid UTF-8"),
        (
            ["generate", "RUN", "--prompt", "a", "--exit", "StateChange:threshold=NaN"],
            "finite number, got NaN",
        ),
        (["sweep", "RUN", "--length", "0"], "--length should be at least 1, got 0"),
        (["sweep", "RUN", "--loops", "0:4"], "loops should be depths of at least 1"),
        (["sweep", "RUN", "--length", "4000"], "do not fit the model's context"),
        (["sweep", "RUN", "--data", "nothing.txt"], "there is no file or folder 'nothing.txt'"),
        (["sweep", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(run, capsys, words, sentence):
    status, _, err = mythos(capsys, *[run if word == "RUN" else word for word in words])
    assert status == 2
    assert sentence in err
    assert err.count("\n") == 1


def test_a_foreign_checkpoint_is_refused(run, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    os.makedirs(foreign / "checkpoints")
    (foreign / "config.json").write_text((run / "config.json").read_text())
    weights = {"model/other.weight": torch.zeros(3)}
    checkpoint.save(checkpoint.step_folder(foreign / "checkpoints", 1), weights, {"step": 1, "state": {}})
    status, _, err = mythos(capsys, "generate", foreign, "--prompt", "a")
    assert status == 2
    assert "is not of the model in its config.json" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "says"),
    [("model.safetensors", "model.safetensors"), ("manifest.json", "manifest.json is not readable JSON")],
)
def test_a_damaged_checkpoint_says_what_is_wrong(run, tmp_path, capsys, file, says):
    shutil.copytree(run, tmp_path / "damaged")
    (tmp_path / "damaged" / "checkpoints" / "step-00000010" / file).write_bytes(b"")
    for words in (["generate", tmp_path / "damaged", "--prompt", "a"], ["sweep", tmp_path / "damaged"]):
        status, _, err = mythos(capsys, *words)
        assert status == 2
        assert "it has none that is whole: " in err
        assert says in err
        assert err.count("\n") == 1


def test_a_config_nested_too_deeply_is_one_sentence(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "deep")
    (tmp_path / "deep" / "config.json").write_text("[" * 100_000)
    for words in (["generate", tmp_path / "deep", "--prompt", "a"], ["show", tmp_path / "deep"]):
        status, _, err = mythos(capsys, *words)
        assert (status, "maximum recursion depth exceeded" in err) == (2, True), err
        assert err.count("\n") == 1


def test_as_a_command(run):
    command = [sys.executable, "-m", "open_mythos.cli.main", "generate", str(run), "--tokens", "3"]
    done = subprocess.run(command, input="line", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("line")
    done = subprocess.run(
        [*command, "--loops", "-1"], input="line", capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "mythos generate: a loop takes at least one step, got loops=-1\n"


@pytest.mark.parametrize("words", [["show"], ["generate"], ["sweep"], ["data", "prepare"]])
def test_help_answers_without_torch(words):
    code = (
        "import sys; from open_mythos.cli.main import main\n"
        f"try: main({[*words, '--help']})\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'rich.console', 'tokenizers') if m == 'torch' and m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_choice_in_a_word():
    assert choice(Exit, "StateChange") == StateChange()
    assert choice(Exit, "StateChange:threshold=0.5,least=3") == StateChange(threshold=0.5, least=3)
    assert choice(Exit, "Steps:steps=4") == Steps(steps=4)
    for bad in ("Steps:steps", "Steps:stops=4", "Steps:steps=x", "steps"):
        with pytest.raises(ValueError, match="Steps"):
            choice(Exit, bad)


def test_depths_as_one_writes_them():
    assert depths("1:4") == [1, 2, 3, 4]
    assert depths("2:10:4") == [2, 6, 10]
    assert depths("1,8,4") == [1, 8, 4]
    for bad in ("", "0", "4:1", "a", "1:2:3:4", "1:4:0"):
        with pytest.raises(ValueError, match="depths of at least 1"):
            depths(bad)
