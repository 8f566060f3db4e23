"""`mythos data` as a user meets it."""

from pathlib import Path

import pytest

from open_mythos.cli.main import main
from open_mythos.data.shards import open_corpus


def test_prepare_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {i} says something." * 30 for i in range(200)))
    out = str(tmp_path / "out")
    assert main(["data", "prepare", out, "--data", str(tmp_path / "book.txt"), "--tokenizer", "bytes"]) == 0
    printed = capsys.readouterr().out
    assert "a vocabulary of 259" in printed
    assert len(open_corpus(tmp_path / "out").training) > 100_000
    assert main(["data", "check", out]) == 0
    assert "agrees with its checksum" in capsys.readouterr().out
    (tmp_path / "out" / "training-00000.bin").write_bytes(b"short")
    assert main(["data", "check", out]) == 2
    assert "has 5 bytes instead of" in capsys.readouterr().err


def test_show_prints_puzzles_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "khop", "--difficulty", "3", "--count", "2", "--set", "entities=40"]) == 0
    printed = capsys.readouterr().out
    assert "KHop(entities=40" in printed
    assert printed.count(" = e") == 2
    (tmp_path / "a.txt").write_text("words to be seen")
    assert main(["data", "show", str(tmp_path / "a.txt")]) == 0
    assert "words to be seen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "khopp"], "did you mean khop"),
        (["show", "khop", "--set", "entitles=4"], "did you mean 'entities'"),
        (["prepare", "nowhere", "--data", "no/such/file.txt"], "there is no file or folder"),
        (["prepare", "nowhere", "--data", ""], "an empty name is no text"),
        (["prepare", "nowhere", "--tokenizer", "what"], "there is no tokenizer 'what'"),
    ],
)
def test_mistakes_get_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = [str(tmp_path / word) if word == "nowhere" else word for word in argv]
    assert main(["data", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
