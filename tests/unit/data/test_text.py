"""Documents: where they come from, how they are split, and what bad input says."""

import gzip
import json
from pathlib import Path

import pytest

from open_mythos.data import network
from open_mythos.data.network import OfflineError
from open_mythos.data.text import (
    Files,
    Hub,
    Stdlib,
    is_held_out,
    place_of,
    source,
    split_documents,
    split_text,
)


def test_stdlib_is_real_code_without_tests() -> None:
    parts = Stdlib().parts()
    assert parts == Stdlib().parts()
    folders = {folder for part in parts for folder in Path(part.path).parts}
    assert not folders & {"tests", "idle_test", "site-packages"}
    assert sum(Path(part.path).stat().st_size for part in parts) > 8_000_000
    decoder = next(part for part in parts if part.path.endswith("json/decoder.py"))
    ((_, text),) = Stdlib().rows(decoder)
    assert "class JSONDecoder" in text


def test_files_reads_text_rows_and_packed_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": ""}\n{"text": "fourth"}\n')
    with gzip.open(tmp_path / "d.txt.gz", "wt") as file:
        file.write("fifth<|endoftext|>sixth")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(Files(paths=(str(tmp_path),)).documents()) == [
        "first",
        "second",
        "third",
        "fourth",
        "fifth",
        "sixth",
    ]


def test_parquet_parts_are_row_groups(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}" for i in range(10)]
    parquet.write_table(arrow.table({"body": texts}), tmp_path / "a.parquet", row_group_size=4)
    files = Files(paths=(str(tmp_path / "a.parquet"),), text_field="body")
    assert len(files.parts()) == 3
    assert list(files.documents()) == texts
    assert [text for _, text in files.rows(files.parts()[1], start=2)] == ["row 6", "row 7"]
    with pytest.raises(ValueError, match="has no column 'text'; it has body"):
        list(files.replace(text_field="text").documents())
    parquet.write_table(arrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: the column 'text' should hold text, got int"):
        list(Files(paths=(str(tmp_path / "b.parquet"),)).documents())


def test_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {i} " + "word " * 20 for i in range(50)) + "x" * 2000
    (tmp_path / "book.txt").write_text(text)
    pieces = list(Files(paths=(str(tmp_path / "book.txt"),), longest=500).documents())
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 500
    assert pieces[0].endswith("\n\n")


def test_rows_go_on_from_any_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(7)))
    files = Files(paths=(str(tmp_path),))
    whole = list(files.rows(files.parts()[0]))
    assert list(files.rows(files.parts()[0], start=3)) == whole[3:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json\n", "line 1: not valid JSON"),
        ('{"body": "x"}\n', "the text in 'text', got body"),
        ("[1]\n", "got a list"),
        ('{"text": 5}\n', "the text in 'text', got a number there"),
    ],
)
def test_bad_rows_say_where_and_what(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(Files(paths=(str(tmp_path / "a.jsonl"),)).documents())


def test_bad_files_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file or folder"):
        Files(paths=(str(tmp_path / "none"),)).parts()
    with pytest.raises(ValueError, match="holds no text"):
        Files(paths=(str(tmp_path),)).parts()
    with pytest.raises(ValueError, match="at least one"):
        Files(paths=())
    packed = gzip.compress(b"a text that is packed" * 99)
    for content in (b"no such thing", packed[:-20], packed[:20] + b"?" + packed[21:]):
        for name in ("a.txt.gz", "a.jsonl.gz"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"cannot read .*{name}: "):
                list(Files(paths=(str(tmp_path / name),)).documents())
    (tmp_path / "data.bin").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="zero bytes"):
        list(Files(paths=(str(tmp_path / "data.bin"),)).documents())


def test_the_split_is_by_text_alone() -> None:
    documents = [f"document {i}" for i in range(2000)]
    training, held_out = split_documents(documents, 0.1)
    assert sorted(training + held_out) == sorted(documents)
    assert 140 < len(held_out) < 260
    assert held_out == [text for text in documents if is_held_out(text, 0.1)]
    assert split_documents(documents[::-1], 0.1)[1] == held_out[::-1]
    assert place_of("a text") == 0.32574514005307587  # the same on every machine, in every version
    assert not {*split_documents(documents + documents, 0.1)[0]} & {*held_out}


def test_a_tiny_corpus_still_splits() -> None:
    training, held_out = split_documents(["a", "b", "c"], 1e-9)
    assert (len(training), len(held_out)) == (2, 1)
    training, held_out = split_documents(["a", "b", "c"], 1 - 1e-9)
    assert (len(training), len(held_out)) == (1, 2)
    with pytest.raises(ValueError, match="at least 2 different documents"):
        split_documents(["same", "same"], 0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_documents(["a", "b"], 0.0)


@pytest.mark.parametrize("size", [800, 3000, 16_384, 20_000, 60_000, 200_000])
def test_a_small_corpus_holds_out_as_much_text_as_was_asked_for(tmp_path: Path, size: int) -> None:
    text = "\n".join(f"line {i} says {i * i % 97}" for i in range(size // 12))[:size]
    (tmp_path / "book.txt").write_text(text)
    documents = list(Files(paths=(str(tmp_path / "book.txt"),)).documents())
    training, held_out = split_text(documents, 0.05)
    assert 0.025 < len("".join(held_out)) / len(text) < 0.08
    assert held_out[-1].startswith("line ")
    assert sorted("".join(training + held_out)) == sorted(text)
    assert split_text(documents, 0.05) == (training, held_out)


def test_few_short_documents_are_held_out_whole() -> None:
    documents = [f"document {i} of a few" for i in range(60)]
    training, held_out = split_text(documents + documents[:1], 0.05)
    assert 2 <= sum(text in documents for text in held_out) <= 3
    assert split_text(documents[::-1], 0.05)[1] == held_out[::-1]
    assert not {*held_out} & {*training}


def test_equal_documents_are_cut_alike() -> None:
    training, held_out = split_text(["the same words\n" * 20] * 3, 0.1)
    assert len({*training}) == len({*held_out}) == 1
    assert len(training) == len(held_out) == 3


def test_many_documents_are_split_as_ever() -> None:
    documents = [f"document {i}" for i in range(200)]
    assert split_text(documents, 0.05) == split_documents(documents, 0.05)


@pytest.mark.parametrize("documents", [[], ["a"], [" \n"]])
def test_too_little_text_to_split_says_so(documents: list[str]) -> None:
    with pytest.raises(ValueError, match="is too short to hold out"):
        split_text(documents, 0.1)


def test_source_understands_what_users_type(tmp_path: Path) -> None:
    assert source("python") == Stdlib() == source()
    assert source(str(tmp_path)) == Files(paths=(str(tmp_path),))
    assert source("HuggingFaceFW/fineweb-edu") == Hub()
    assert source("HuggingFaceFW/fineweb-edu:sample-100BT") == Hub(config="sample-100BT")
    assert source("some/dataset") == Hub(name="some/dataset", config=None)
    with pytest.raises(ValueError, match="no file or folder 'nowhere'"):
        source("nowhere")


@pytest.mark.parametrize("word", ["texts/bok.txt", "texts/more", "nowhere/a.jsonl", "nowhere/a.txt.gz"])
def test_a_mistyped_path_is_no_dataset_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"there is no file or folder '{word}'; give paths"):
        source(word)


def test_offline_is_said_at_once_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    network.hub_in_reach.cache_clear()
    try:
        with pytest.raises(OfflineError, match="cannot be reached; go online, or give local files"):
            next(Hub().documents())
    finally:
        network.hub_in_reach.cache_clear()
