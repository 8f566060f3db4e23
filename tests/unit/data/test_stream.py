"""Streams: every document once per epoch over ranks and workers; stopped anywhere, they go on exactly."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from open_mythos.data.batch import Batch, Loader
from open_mythos.data.prefetch import InTurn, Prefetch
from open_mythos.data.shares import read_share
from open_mythos.data.stream import Stream, StreamLoader
from open_mythos.data.text import Files, Hub, is_held_out
from open_mythos.data.tokenizer import ByteTokenizer


def jsonl(folder: Path, files: int = 4) -> Files:
    """Files of 10, 17, 24, .. documents of different lengths."""
    for file in range(files):
        lines = [json.dumps({"text": f"<{file}:{row}>" * (row % 3 + 1)}) for row in range(10 + 7 * file)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    return Files(paths=(str(folder),))


def parquet(folder: Path, files: int = 3) -> Files:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for file in range(files):
        texts = [f"<{file}:{row}>" for row in range(20 + 7 * file)]
        writer.write_table(arrow.table({"text": texts}), folder / f"{file}.parquet", row_group_size=5)
    return Files(paths=(str(folder),))


def hub(folder: Path) -> Hub:
    pytest.importorskip("datasets", reason="needs open_mythos[data]", exc_type=ImportError)
    files = parquet(folder)
    return Hub(name="parquet", config=None, data_files=tuple(sorted({part.path for part in files.parts()})))


SOURCES = pytest.mark.parametrize(
    "make", [jsonl, parquet, pytest.param(hub, marks=pytest.mark.filterwarnings("ignore"))]
)


def epoch_of(source: Files | Hub, share: int, of: int, epoch: int = 0) -> list[str]:
    reader, found = read_share(source, 3, share, of), []
    while True:
        text = next(reader)
        if reader.epoch > epoch:
            return found
        if reader.epoch == epoch:
            found.append(text)


@SOURCES
@pytest.mark.parametrize("of", [1, 2, 3, 4, 20])
def test_every_document_is_read_once_per_epoch(make, of: int, tmp_path: Path) -> None:
    source = make(tmp_path)
    everything = sorted(source.documents())
    for epoch in (0, 1):
        shares = [epoch_of(source, share, of, epoch) for share in range(of)]
        assert sorted(text for share in shares for text in share) == everything
    assert epoch_of(source, 0, of, 0) != epoch_of(source, 0, of, 1) or of == 20


@SOURCES
def test_a_reader_goes_on_exactly_from_anywhere(make, tmp_path: Path) -> None:
    source = make(tmp_path)
    for of in (1, 3):
        reader, texts, states = read_share(source, 3, of - 1, of), [], []
        for _ in range(150):
            states.append(json.dumps(reader.state_dict()))
            texts.append(next(reader))
        for stop in (0, 1, 5, 19, 20, 41, 80, 81, 82, 110):
            again = read_share(source, 3, of - 1, of)
            again.load_state_dict(json.loads(states[stop]))
            assert [next(again) for _ in range(20)] == texts[stop : stop + 20]


def take(loader: Loader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) for a, b in pairs)


def close(loader: Loader) -> None:
    assert isinstance(loader, InTurn)
    for worker in loader.loaders:
        assert isinstance(worker, Prefetch)
        worker.close()


@SOURCES
@pytest.mark.parametrize("workers", [1, 3])
def test_a_stream_goes_on_exactly_from_anywhere(make, workers: int, tmp_path: Path) -> None:
    stream = Stream(source=make(tmp_path), length=6, batch=3, window=10, workers=workers, documents=True)
    loader = stream.build(ByteTokenizer(), rank=1, world=2)
    states, batches = [], []
    for _ in range(60):
        states.append(json.dumps(loader.state_dict()))
        batches += take(loader, 1)
    close(loader)
    for stop in (0, 1, 3, 10, 29, 50):
        again = stream.build(ByteTokenizer(), rank=1, world=2)
        again.load_state_dict(json.loads(states[stop]))
        assert same(take(again, 10), batches[stop : stop + 10])
        close(again)


def test_a_window_shuffles_and_loses_nothing(tmp_path: Path) -> None:
    source = jsonl(tmp_path)
    reader = read_share(source, 0, 0, 1)
    expected: list[int] = []
    while len(expected) < 1021:
        expected += [*ByteTokenizer().encode(next(reader)), ByteTokenizer().eos]
    loader = StreamLoader(Stream(source=source, length=17, batch=20, window=20), ByteTokenizer())
    batches = take(loader, 3)
    orders = []
    for number, batch in enumerate(batches):
        rows = [tuple(expected[i : i + 17]) for i in range(number * 340, number * 340 + 340, 17)]
        assert len({*rows}) == 20
        got = [tuple(row) for row in batch.tokens.tolist()]
        assert Counter(got) == Counter(rows)
        assert got != rows
        orders.append([rows.index(row) for row in got])
    assert orders[0] != orders[1] != orders[2]


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    source = jsonl(tmp_path)
    stream = Stream(source=source, length=8, batch=4, window=8, held_out=0.3)
    held_out = list(stream.held_out_documents(1000))
    assert held_out == [text for text in source.documents() if is_held_out(text, 0.3)]
    assert 0 < len(held_out) < 60
    loader = StreamLoader(stream.replace(batch=1, window=1), ByteTokenizer())
    read = ByteTokenizer().decode(
        [i for batch in take(loader, 800) for i in batch.tokens[0].tolist() if i < 256]
    )
    assert all(
        text not in read for text in held_out if text.count("<") == 1 and f"{text}<" not in "".join(held_out)
    )


def test_another_world_size_is_refused(tmp_path: Path) -> None:
    stream = Stream(source=jsonl(tmp_path), length=6, batch=2, window=4)
    one, two = StreamLoader(stream, ByteTokenizer(), 0, 1), StreamLoader(stream, ByteTokenizer(), 0, 2)
    with pytest.raises(ValueError, match=r"read by 2 readers \(ranks x workers\) cannot go on with 1"):
        one.load_state_dict(two.state_dict())
    other = StreamLoader(stream, ByteTokenizer(), 1, 2)
    with pytest.raises(ValueError, match="share 0 where this run has 1"):
        other.load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match="length"):
        StreamLoader(stream.replace(length=7), ByteTokenizer()).load_state_dict(one.state_dict())


def test_too_little_text_for_so_many_readers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("only one document")
    reader = read_share(Files(paths=(str(tmp_path),)), 0, 1, 2)
    with pytest.raises(ValueError, match="no document for reader 1 of 2"):
        next(reader)


def test_impossible_streams_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Stream\.window should be at least 1, got 0"):
        Stream(window=0)
    with pytest.raises(ValueError, match="rank should lie in"):
        Stream().build(ByteTokenizer(), rank=3, world=2)
