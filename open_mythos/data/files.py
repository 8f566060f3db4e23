"""Documents in files: what is a text file, and how to read one from any row on.

A `FilePart` is the unit in which files are shuffled and shared out: a whole file, or one row group of a
parquet file. Its rows are numbered, so a reader can go on where it stopped (`stream.py`).
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
# fmt: off
TEXT = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".csv", ".tsv", ".py",
    ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".js", ".jsx",
    ".ts", ".tsx", ".rb", ".php", ".swift", ".sh", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".ex",
    ".erl", ".clj", ".lisp", ".sql", ".css", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".zig",
})
# fmt: on
ROWS = frozenset({".jsonl", ".ndjson", ".parquet"})
READABLE = TEXT | ROWS
HIDDEN = frozenset({"node_modules", "__pycache__"})
KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
END_OF_TEXT = "<|endoftext|>"


class FilePart(NamedTuple):
    """A file, or one row group of a parquet file."""

    path: str
    group: int | None = None


def file_parts(paths: Iterable[str]) -> list[FilePart]:
    """All parts of the given files and folders, in a fixed order.

    Raises `ValueError` where nothing is found.
    """
    found = [file for path in paths for file in _files_under(Path(path))]
    return [part for file in found for part in _parts_of(file)]


def rows_of(part: FilePart, text_field: str, longest: int, start: int = 0) -> Iterator[tuple[int, str]]:
    """(row, document) from row `start` on; rows without text are passed over but keep their number."""
    return ((row, text) for row, text in _every_row(part, text_field, longest, start) if text.strip())


def _files_under(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {str(path)!r}")
    files = (file for file in path.rglob("*") if kind_of(file) in READABLE and file.is_file())
    seen = [file for file in sorted(files) if not _is_hidden(file.relative_to(path))]
    if not seen:
        raise ValueError(
            f"the folder {str(path)!r} holds no text: it needs .txt, .md, code, .jsonl or .parquet files"
        )
    return seen


def kind_of(path: Path) -> str:
    """How a file's name ends, before .gz where it is packed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes or [""])[-1]


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") or name in HIDDEN for name in path.parts)


def _parts_of(path: Path) -> list[FilePart]:
    if kind_of(path) != ".parquet":
        return [FilePart(str(path))]
    return [FilePart(str(path), group) for group in range(_parquet(str(path)).num_row_groups)]


def _every_row(part: FilePart, text_field: str, longest: int, start: int) -> Iterator[tuple[int, str]]:
    kind = kind_of(Path(part.path))
    if kind == ".parquet":
        return _parquet_rows(part, text_field, start)
    if kind in ROWS:
        return _unpacked(_json_rows(part.path, text_field, start), part.path)
    pieces = enumerate(_unpacked(_pieces(part.path, longest), part.path))
    return ((row, text) for row, text in pieces if row >= start)


def _unpacked(rows: Iterator[T], path: str) -> Iterator[T]:
    """The rows of a file. Raises `ValueError` that names it if it is packed and what it packs is damaged."""
    try:
        yield from rows
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _open(path: str) -> TextIOWrapper:
    try:
        if path.endswith(".gz"):
            return gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="")
        return Path(path).open(encoding="utf-8", errors="replace", newline="")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _json_rows(path: str, text_field: str, start: int) -> Iterator[tuple[int, str]]:
    with _open(path) as lines:
        for row, line in enumerate(lines):
            if row >= start and line.strip():
                yield row, _text_in(line, text_field, f"{path}, line {row + 1}")


def _text_in(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        raise ValueError(
            f"{where}: should be an object with the text in {text_field!r}, got {_spoken(record, text_field)}"
        )
    return str(record[text_field])


def _spoken(record: Any, text_field: str) -> str:
    """What is there in place of an object with text."""
    if not isinstance(record, dict):
        return KINDS[type(record)]
    return f"{KINDS[type(record[text_field])]} there" if text_field in record else ", ".join(record) or "none"


def _parquet(path: str) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"reading {path} needs pyarrow: pip install open_mythos[data]") from error
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _parquet_rows(part: FilePart, text_field: str, start: int) -> Iterator[tuple[int, str]]:
    file = _parquet(part.path)
    if text_field not in file.schema_arrow.names:
        raise ValueError(
            f"{part.path} has no column {text_field!r}; it has {', '.join(file.schema_arrow.names)}"
        )
    seen = 0
    for batch in file.iter_batches(row_groups=[part.group], columns=[text_field], batch_size=1024):
        first, seen = seen, seen + len(batch)
        if seen > start:
            texts = enumerate(batch.column(0).to_pylist(), first)
            yield from ((row, _text_of(text, part.path, text_field)) for row, text in texts if row >= start)


def _text_of(value: Any, path: str, text_field: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"{path}: the column {text_field!r} should hold text, got {type(value).__name__}; name the "
            "column that does with text_field"
        )
    return value or ""


def _pieces(path: str, longest: int) -> Iterator[str]:
    """A text file as documents of at most `longest` characters, cut at blank lines where there are some."""
    held = ""
    with _open(path) as lines:
        for line in lines:
            ended, mark, rest = line.partition(END_OF_TEXT)
            held += ended
            while mark:
                yield held
                held, mark, rest = rest.partition(END_OF_TEXT)
            if "\0" in line:
                raise ValueError(
                    f"{path} does not look like text: it holds zero bytes (token ids come as .npy or .bin "
                    "files alone, or as a folder of `mythos data prepare`)"
                )
            while len(held) > longest:
                cut = _cut(held, longest)
                yield held[:cut]
                held = held[cut:]
    yield held


def _cut(text: str, longest: int) -> int:
    for mark in ("\n\n", "\n", " "):
        if (at := text.rfind(mark, longest // 2, longest)) >= 0:
            return at + len(mark)
    return longest
