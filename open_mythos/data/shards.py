"""Tokens on disk: a folder of memory-mapped shards, an index with checksums, and the tokenizer.

    index.json                what it was made from; per part and split: tokens, documents, bytes, sha256
    tokenizer.json            and tokenizer_config.json
    training-00000.bin        ids as little-endian uint16 or uint32, eos after each document, no header
    held_out-00000.bin

Every file is written under a temporary name, synced and renamed, the index last. After each part the index
tells how many documents of the source are in, so a preparation that was killed goes on from there and ends in
the very same folder. Law: tests/unit/data/test_shards.py.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from open_mythos.config import Config
from open_mythos.data.corpus import Corpus
from open_mythos.data.rows import Tokens, dtype_for, groups
from open_mythos.data.text import Files, Hub, Stdlib, is_held_out
from open_mythos.data.tokenizer import BPE, Bytes, HubTokenizer, Tokenizer, load_folder
from open_mythos.whole import write_whole

FORMAT = 1
AT_ONCE = 256  # documents tokenized together
Split = Literal["training", "held_out"]
SPLITS: tuple[Split, ...] = ("training", "held_out")
Progress = Callable[[int, int], None]  # documents, tokens so far


class Prepare(Config):
    """Tokenise a source ahead of training into parts of about `part_tokens` tokens.

    A BPE is trained on the first documents of the source that are not held out. `limit` stops after so many
    documents.
    """

    source: Stdlib | Files | Hub = Stdlib()
    tokenizer: Bytes | BPE | HubTokenizer = BPE()
    held_out: float = 0.05
    part_tokens: int = 100_000_000
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"the held-out fraction should lie in [0, 1), got {self.held_out}")
        if self.part_tokens < 1:
            raise ValueError(f"a part needs at least 1 token, got {self.part_tokens}")

    def write(self, folder: Path, progress: Progress = lambda documents, tokens: None) -> dict[str, Any]:
        """Fill `folder`, or go on filling it, and return its index.

        Raises `ValueError` if the folder holds something else, or the source gives no training text.
        """
        index = _begin(self, folder)
        tokenizer = self._tokenizer(folder)
        index |= {"eos": tokenizer.eos, "vocab_size": tokenizer.vocab_size}
        rest = itertools.islice(self.source.documents(), index["documents"], self.limit)
        part = _Part(folder, index, tokenizer.vocab_size)
        for texts in groups(rest if not index["complete"] else (), AT_ONCE):
            part.add(texts, tokenizer, self.held_out)
            progress(index["documents"] + part.documents, index["tokens"] + part.size())
            if part.size() >= self.part_tokens:
                part = part.close()
        part.close(complete=True)
        if not any(shard["tokens"] for shard in index["shards"]["training"]):
            raise ValueError("the corpus is too short: no document of it is left for training")
        return index

    def _tokenizer(self, folder: Path) -> Tokenizer:
        if (folder / "tokenizer_config.json").is_file():
            return load_folder(folder)
        texts = itertools.islice(self.source.documents(), self.limit)
        built = self.tokenizer.build(text for text in texts if not is_held_out(text, self.held_out))
        built.save(folder)
        return built


class _Part:
    """One shard of each split in the making, and the index they will enter together."""

    def __init__(self, folder: Path, index: dict[str, Any], vocab_size: int):
        self.folder, self.index, self.vocab_size = folder, index, vocab_size
        self.documents = 0
        self.ids: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.text_bytes = dict.fromkeys(SPLITS, 0)

    def size(self) -> int:
        return sum(len(ids) for arrays in self.ids.values() for ids in arrays)

    def add(self, texts: list[str], tokenizer: Tokenizer, fraction: float) -> None:
        dtype = dtype_for(self.vocab_size)
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            split: Split = "held_out" if is_held_out(text, fraction) else "training"
            self.ids[split].append(np.array([*ids, tokenizer.eos], dtype))
            self.text_bytes[split] += len(text.encode("utf-8", errors="replace"))
        self.documents += len(texts)

    def close(self, complete: bool = False) -> "_Part":
        """Write both shards, then the index that names them; the next part."""
        for split in SPLITS if self.documents else ():
            name = f"{split}-{len(self.index['shards'][split]):05d}.bin"
            arrays = self.ids[split]
            content = np.concatenate(arrays).tobytes() if arrays else b""
            write_whole(self.folder / name, content)
            self.index["shards"][split].append(
                {
                    "name": name,
                    "tokens": sum(map(len, arrays)),
                    "documents": len(arrays),
                    "bytes": self.text_bytes[split],
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            )
        self.index["documents"] += self.documents
        self.index["tokens"] += self.size()
        self.index["complete"] = complete
        write_whole(self.folder / "index.json", (json.dumps(self.index, indent=1) + "\n").encode())
        return _Part(self.folder, self.index, self.vocab_size)


def open_corpus(folder: Path, verify: bool = True) -> Corpus:
    """The corpus in a prepared folder, memory-mapped.

    `verify` reads every shard once to compare checksums (about a second per gigabyte): on with one rank of
    many is enough. Sizes are compared always. Raises `ValueError` for a folder that is not one, unfinished,
    truncated or corrupt.
    """
    index = read_index(folder)
    if not index["complete"]:
        raise ValueError(
            f"{folder} is not finished ({index['documents']} documents are in): run `mythos data prepare` "
            "again"
        )
    training, held_out = (_open_split(folder, index, split, verify) for split in SPLITS)
    return Corpus(load_folder(folder), training, held_out)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a prepared folder. Raises `ValueError` if there is none that can be read."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder} is not a folder of `mythos data prepare`: cannot read index.json ({error})"
        ) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}; prepare the data again with this version")
    return index


def _begin(plan: Prepare, folder: Path) -> dict[str, Any]:
    """The index to go on from: a fresh one, or that of the same preparation, interrupted."""
    made_from = plan.to_dict()
    if (folder / "index.json").exists():
        index = read_index(folder)
        if index["made_from"] != made_from:
            raise ValueError(f"{folder} was prepared with other settings; choose another folder or remove it")
        return index
    if folder.exists() and any(_foreign(folder.iterdir())):
        raise ValueError(f"{folder} is not empty and holds no prepared data; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    shards: dict[Split, list[Any]] = {split: [] for split in SPLITS}
    fresh = {"format": FORMAT, "complete": False, "documents": 0, "tokens": 0}
    return fresh | {"made_from": made_from, "shards": shards}


def _foreign(paths: Iterable[Path]) -> Iterable[Path]:
    """What a preparation killed before its first index does not leave behind."""
    ours = ("tokenizer", "training-", "held_out-", ".training-", ".held_out-", ".index", ".tokenizer")
    return (path for path in paths if not path.name.startswith(ours))


def _open_split(folder: Path, index: dict[str, Any], split: Split, verify: bool) -> Tokens:
    dtype = dtype_for(index["vocab_size"])
    shards = index["shards"][split]
    arrays = [
        _open_shard(folder / shard["name"], shard, dtype, verify) for shard in shards if shard["tokens"]
    ]
    return Tokens(arrays, index["eos"], sum(shard["bytes"] for shard in shards))


def _open_shard(path: Path, shard: dict[str, Any], dtype: np.dtype[Any], verify: bool) -> np.ndarray:
    expected = shard["tokens"] * dtype.itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        has = "is missing" if size is None else f"has {size} bytes instead of {expected}"
        raise ValueError(f"the shard {path} {has}: copy it again or prepare the data again")
    if verify:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                raise ValueError(
                    f"the shard {path} is corrupt (its checksum differs): copy it again or prepare again"
                )
    return np.memmap(path, dtype=dtype, mode="r")
