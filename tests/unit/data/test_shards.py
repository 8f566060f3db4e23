"""Prepared folders: equal to the corpus in memory, whole or absent, and never silently wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from open_mythos.data import shards
from open_mythos.data.rows import Tokens, tokenize
from open_mythos.data.shards import Prepare, open_corpus
from open_mythos.data.text import Files, is_held_out
from open_mythos.data.tokenizer import BPE, Bytes, ByteTokenizer


@pytest.fixture
def plan(tmp_path: Path) -> Prepare:
    lines = (json.dumps({"text": f"document number {i} " * (i % 5 + 1)}) for i in range(600))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return Prepare(
        source=Files(paths=(str(tmp_path / "texts.jsonl"),)), tokenizer=Bytes(), part_tokens=10_000
    )


def ids(tokens: Tokens) -> list[int]:
    return tokens.read(0, len(tokens)).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_prepared_folder_is_the_corpus(plan: Prepare, tmp_path: Path) -> None:
    index = plan.write(tmp_path / "out")
    corpus = open_corpus(tmp_path / "out")
    texts = list(plan.source.documents())
    held_out = [text for text in texts if is_held_out(text, plan.held_out)]
    training = [text for text in texts if not is_held_out(text, plan.held_out)]
    assert ids(corpus.training) == ids(tokenize(training, ByteTokenizer()))
    assert ids(corpus.held_out) == ids(tokenize(held_out, ByteTokenizer()))
    assert corpus.training.text_bytes == sum(map(len, training))
    assert len(corpus.training.arrays) > 1
    assert isinstance(corpus.training.arrays[0], np.memmap)
    assert corpus.training.arrays[0].dtype == np.uint16
    assert index["documents"] == 600


def test_killed_anywhere_it_goes_on_to_the_same_folder(
    plan: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan.replace(tokenizer=BPE(vocab_size=270), part_tokens=1000)
    plan.write(tmp_path / "whole")
    real = shards.write_whole
    for survived in range(10):
        left = survived

        def write(path: Path, content: bytes) -> None:
            nonlocal left
            if left == 0:
                path.with_name(f".{path.name}.part").write_bytes(content[:10])
                raise KeyboardInterrupt
            left -= 1
            real(path, content)

        folder = tmp_path / f"killed-{survived}"
        monkeypatch.setattr(shards, "write_whole", write)
        with pytest.raises(KeyboardInterrupt):
            plan.write(folder)
        monkeypatch.setattr(shards, "write_whole", real)
        plan.write(folder)
        assert {
            name: data for name, data in contents(folder).items() if not name.endswith(".part")
        } == contents(tmp_path / "whole")


def test_preparing_again_changes_nothing_and_another_plan_is_refused(plan: Prepare, tmp_path: Path) -> None:
    plan.write(tmp_path / "out")
    before = contents(tmp_path / "out")
    plan.write(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="prepared with other settings"):
        plan.replace(held_out=0.2).write(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty and holds no prepared data"):
        plan.write(tmp_path / "mine")


def test_a_damaged_shard_is_found(plan: Prepare, tmp_path: Path) -> None:
    plan.write(tmp_path / "out")
    shard = tmp_path / "out" / "training-00001.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    with pytest.raises(ValueError, match=r"training-00001\.bin has \d+ bytes instead of"):
        open_corpus(tmp_path / "out", verify=False)
    shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(ValueError, match=r"training-00001\.bin is corrupt"):
        open_corpus(tmp_path / "out")
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        open_corpus(tmp_path / "out")


def test_an_unfinished_or_foreign_folder_is_refused(plan: Prepare, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder of `mythos data prepare`"):
        open_corpus(tmp_path)
    plan.write(tmp_path / "out")
    path = tmp_path / "out" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"complete": False}))
    with pytest.raises(ValueError, match="is not finished"):
        open_corpus(tmp_path / "out")
    path.write_text(json.dumps(index | {"format": 99}))
    with pytest.raises(ValueError, match="not of format"):
        open_corpus(tmp_path / "out")


def test_impossible_plans_are_refused(plan: Prepare, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        plan.replace(held_out=1.0)
    with pytest.raises(ValueError, match="no document of it is left"):
        plan.replace(limit=0).write(tmp_path / "none")


def test_a_large_vocabulary_takes_four_bytes() -> None:
    assert shards.dtype_for(2**16) == np.uint16
    assert shards.dtype_for(2**16 + 1) == np.uint32
