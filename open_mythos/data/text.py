"""Where text comes from: a source is a config that yields documents, each a `str`.

    documents -> split by document -> tokens -> rows

- `Stdlib`: the Python standard library's own source on this interpreter, without its tests (about 12 MB, no
  download). Code and docstrings: good for a first run, not for claims about quality.
- `Files`: the user's files and folders: text, markdown, code, jsonl and parquet with a text column
  (`files.py`).
- `Hub`: a Hugging Face dataset, streamed; FineWeb-Edu unless told otherwise.

`source("python")`, `source("essays/", "notes.jsonl")` and `source("HuggingFaceFW/fineweb-edu:sample-100BT")`
turn what a user types into one of them. Law: a document is on the same side of the split in every run,
wherever it lies (tests/unit/data/test_text.py).
"""

import hashlib
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from open_mythos.config import Config
from open_mythos.data.files import READABLE, FilePart, file_parts, kind_of, rows_of
from open_mythos.data.network import require_hub

TEST_FOLDERS = {"test", "tests", "idle_test"}
OTHERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}  # not its own, or generated text
FEW = 4  # held-out documents; of fewer, chance would decide how much text is held out
PASSED_OVER = frozenset(TEST_FOLDERS | OTHERS)


class Stdlib(Config):
    """The source of Python's standard library, file by file in the order of their names."""

    def parts(self) -> list[FilePart]:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = (path for path in root.rglob("*.py") if PASSED_OVER.isdisjoint(path.relative_to(root).parts))
        return [FilePart(str(path)) for path in sorted(paths)]

    def rows(self, part: FilePart, start: int = 0) -> Iterator[tuple[int, str]]:
        """(0, the file) unless it is empty."""
        return rows_of(part, "text", sys.maxsize, start)

    def documents(self) -> Iterator[str]:
        return (text for part in self.parts() for _, text in self.rows(part))


class Files(Config):
    """Files and folders, in the order given, each folder in the order of names.

    A plain text file longer than `longest` characters is cut at blank lines, so that one big book can still
    be split by document; `<|endoftext|>` in such a file ends a document as well. jsonl and parquet hold one
    document per row, in the column `text_field`; `.gz` is unpacked on the way. Raises `ValueError` for a
    missing path, a folder without text, a row without the column.
    """

    paths: tuple[str, ...]
    text_field: str = "text"
    longest: int = 16_384

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("Files needs at least one file or folder")
        if self.longest < 1:
            raise ValueError(
                f"Files.longest is the most characters of one document, at least 1; got {self.longest}"
            )

    def parts(self) -> list[FilePart]:
        return file_parts(self.paths)

    def rows(self, part: FilePart, start: int = 0) -> Iterator[tuple[int, str]]:
        """(row number within the part, document), from row `start` on."""
        return rows_of(part, self.text_field, self.longest, start)

    def documents(self) -> Iterator[str]:
        return (text for part in self.parts() for _, text in self.rows(part))


class Hub(Config):
    """A dataset of the Hugging Face Hub by name, streamed with the `datasets` library (`pip install
    open_mythos[data]`).

    `config` is the dataset's own name for a subset (`sample-10BT`, `sample-100BT` and `default` of
    FineWeb-Edu). With `data_files` the name is a format of `datasets` (`json`, `parquet`, `text`) and nothing
    is downloaded if the files are local. Offline, `ValueError` at once says what to do instead.
    """

    name: str = "HuggingFaceFW/fineweb-edu"
    config: str | None = "sample-10BT"
    split: str = "train"
    text_field: str = "text"
    revision: str | None = None
    data_files: tuple[str, ...] = ()

    def dataset(self) -> Any:
        """The `datasets.IterableDataset` with the text column alone."""
        if not self.data_files and not Path(self.name).exists():
            require_hub(
                f"the dataset {self.name}", "give local files or folders, or the built-in corpus `python`"
            )
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"reading {self.name} needs the datasets library: pip install open_mythos[data]"
            ) from error
        stream = datasets.load_dataset(
            self.name,
            self.config,
            data_files=list(self.data_files) or None,
            split=self.split,
            revision=self.revision,
            streaming=True,
        )
        if stream.column_names and self.text_field not in stream.column_names:
            raise ValueError(
                f"{self.name} has no column {self.text_field!r}; it has {', '.join(stream.column_names)}"
            )
        return stream.select_columns([self.text_field])

    def documents(self) -> Iterator[str]:
        for row in self.dataset():
            if row[self.text_field]:
                yield row[self.text_field]


Source = Stdlib | Files | Hub


def source(*spoken: str) -> Source:
    """The source a user means: `python`, paths that exist, or `owner/dataset[:config]` of the Hub.

    Raises `ValueError` if it is none of these. What lies in a folder that is here, or ends as files do, is a
    path.
    """
    if not spoken or spoken == ("python",):
        return Stdlib()
    missing = [path for path in spoken if not Path(path).exists()]
    if "" in spoken:
        raise ValueError("an empty name is no text; give paths, owner/dataset of the Hub, or python")
    if not missing:
        return Files(paths=spoken)
    if len(spoken) == 1 and _is_hub_name(spoken[0]):
        name, _, subset = spoken[0].partition(":")
        return Hub(name=name, config=subset or (Hub().config if name == Hub().name else None))
    raise ValueError(
        f"there is no file or folder {missing[0]!r}; give paths, owner/dataset of the Hub, or python"
    )


def _is_hub_name(word: str) -> bool:
    """owner/dataset[:config]; a path in a folder that is here, or with the ending of a file, is mistyped."""
    path = Path(word)
    of_a_file = path.parent.exists() or kind_of(path) in READABLE
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", word) is not None and not of_a_file


def place_of(text: str) -> float:
    """A number in [0, 1) that is the document's own: equal text, equal place, on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out `fraction`, judged from its text alone."""
    return place_of(text) < fraction


def split_documents(documents: Iterable[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split a corpus in memory into (training, held-out) documents; equal documents stay together.

    A corpus so small that chance holds out nothing (or all) gives (or keeps) the document with the lowest
    (highest) place. Raises `ValueError` if there are not two different documents, or `fraction` is outside
    (0, 1).
    """
    _check_fraction(fraction)
    placed = [(place_of(text), text) for text in documents]
    places = sorted({place for place, _ in placed})
    if len(places) < 2:
        raise ValueError(
            f"a held-out split needs at least 2 different documents, the corpus has {len(places)}; give more "
            "files, or hold out the end of a document with data.ends=true"
        )
    edge = min(max(fraction, places[1]), places[-1])  # places below the edge are held out
    training = [text for place, text in placed if place >= edge]
    return training, [text for place, text in placed if place < edge]


def split_text(documents: Iterable[str], fraction: float) -> tuple[list[str], list[str]]:
    """As `split_documents`, unless that would hold out fewer than `FEW` documents on average.

    Then documents are held out in the order of their places as long as the `fraction` of all characters
    lasts, and of the one that is too long its end. Raises `ValueError` if there is too little text for that.
    """
    _check_fraction(fraction)
    texts = list(documents)
    copies = Counter(texts)
    if fraction * len(copies) >= FEW:
        return split_documents(texts, fraction)
    left = max(1, round(fraction * sum(map(len, texts))))
    begins: dict[str, int] = {}  # where the held-out part of a document begins
    for text in sorted(copies, key=place_of):
        fits = copies[text] * len(text) <= left
        begins[text] = 0 if fits else _line_near(text, len(text) - left // copies[text])
        left -= copies[text] * (len(text) - begins[text])
        if not fits or left <= 0:
            break
    training = [text[: begins.get(text, len(text))] for text in texts]
    kept = [text[begins[text] :] for text in texts if text in begins]
    training, kept = ([text for text in part if text.strip()] for part in (training, kept))
    if not (training and kept):
        raise ValueError(
            f"a corpus of {sum(map(len, texts))} characters is too short to hold out {fraction} of it; give "
            "more text"
        )
    return training, kept


def _line_near(text: str, at: int) -> int:
    """Where a line, or else a word, begins nearest to here, at most half of what follows away."""
    reach = (len(text) - at) // 2
    for mark in ("\n", " "):
        around = text.rfind(mark, max(0, at - reach), at), text.find(mark, at, at + reach)
        if found := [place + 1 for place in around if place >= 0]:
            return min(found, key=lambda place: abs(place - at))
    return at


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction should lie between 0 and 1, got {fraction}")
