"""The command line answers fast, and what goes wrong is one sentence and a status."""

import subprocess
import sys
import types

import pytest

from open_mythos.cli import main as cli


@pytest.fixture
def verb(monkeypatch):
    """Make `mythos show` run a given function."""

    def install(body):
        module = types.ModuleType("open_mythos.cli.show")
        module.main = body
        monkeypatch.setitem(sys.modules, "open_mythos.cli.show", module)

    monkeypatch.delenv("MYTHOS_DEBUG", raising=False)
    return install


def raising(error):
    def body(argv):
        raise error

    return body


def test_options_reach_the_verb_and_its_status_comes_back(verb):
    seen = []
    verb(lambda argv: seen.append(argv) or 7)
    assert cli.main(["show", "tiny", "--x", "1"]) == 7
    assert seen == [["tiny", "--x", "1"]]


def test_help_of_a_verb_is_asked_of_the_verb(verb):
    seen = []
    verb(lambda argv: seen.append(argv) or 0)
    assert cli.main(["help", "show"]) == 0
    assert seen == [["--help"]]


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (ValueError("7 heads do not divide 64"), 2, "mythos show: 7 heads do not divide 64\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "mythos show: No such file: a.txt\n"),
        (OSError("disk quota"), 1, "mythos show: disk quota\n"),
        (KeyboardInterrupt(), 130, "mythos show: interrupted\n"),
        (cli.Stop(75, "saved; go on with --resume"), 75, "saved; go on with --resume\n"),
        (cli.Stop(3), 3, ""),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(verb, capsys, error, status, sentence):
    verb(raising(error))
    assert cli.main(["show"]) == status
    assert capsys.readouterr().err == sentence


def test_a_missing_package_names_the_extra_that_brings_it(verb, capsys, monkeypatch):
    monkeypatch.setattr(cli.metadata, "requires", lambda name: ["torch>=2", 'pyarrow>=17; extra == "data"'])
    verb(raising(ModuleNotFoundError("no", name="pyarrow.parquet")))
    assert cli.main(["show"]) == 1
    assert "pip install 'open_mythos[data]'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("bug"), ModuleNotFoundError("bug", name="open_mythos.nnn")])
def test_a_bug_keeps_its_traceback(verb, error):
    verb(raising(error))
    with pytest.raises(type(error), match="bug"):
        cli.main(["show"])


def test_debug_keeps_every_traceback(verb, monkeypatch):
    verb(raising(ValueError("seen")))
    monkeypatch.setenv("MYTHOS_DEBUG", "1")
    with pytest.raises(ValueError, match="seen"):
        cli.main(["show"])


def test_system_exit_passes(verb):
    verb(raising(SystemExit(9)))
    with pytest.raises(SystemExit) as stop:
        cli.main(["show"])
    assert stop.value.code == 9


def test_a_typo_is_answered_with_the_verb_meant(capsys):
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert cli.main(["xyzzy"]) == 2
    assert "there are show, train" in capsys.readouterr().err


def test_no_verb_is_an_error_that_lists_them(capsys):
    assert cli.main([]) == 2
    assert "usage: mythos VERB" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["report", "--help"], ["nonsense"]])
def test_nothing_heavy_is_imported_to_answer(arguments):
    code = (
        "import sys; from open_mythos.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'matplotlib', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_is_no_error():
    code = (
        "import sys, types, os; from open_mythos.cli.main import main\n"
        "module = types.ModuleType('show'); module.main = lambda argv: print('line ' * 100000) or 0\n"
        "sys.modules['open_mythos.cli.show'] = module; sys.exit(main(['show']))"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    assert running.stderr.read() == b""
    running.stderr.close()
    assert running.wait() == 1
