"""Token ids that were made elsewhere: `.npy` arrays of whole numbers, or `.bin` files without a header.

A `tokenizer.json` beside the first file, or in the folder that `tokenizer` names, says what text they stand
for. Without one they are read and written as numbers, and a byte of text is a byte of those.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from open_mythos.config import Config
from open_mythos.data.corpus import Corpus
from open_mythos.data.rows import Tokens
from open_mythos.data.tokenizer import EOS, CoreTokenizer, Tokenizer, load_folder

ENDINGS = (".npy", ".bin")
NUMBERS = 2**20  # ids that are read and written as numbers, at most
READ = 2**20  # held-out ids that are written out to see how long their text is


class TokenFiles(Config):
    """The files in turn; the last `held_out` of all ids are held out. `dtype` is that of `.bin` files."""

    paths: tuple[str, ...]
    tokenizer: str | None = None
    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    held_out: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"the held-out fraction should lie between 0 and 1, got {self.held_out}")
        if not self.paths:
            raise ValueError("there are no files of token ids; give at least one path")

    def build(self) -> Corpus:
        """Memory-mapped. Raises `ValueError` for files that hold no ids, or ids beyond the tokenizer."""
        arrays = [_opened(Path(path), np.dtype(self.dtype).newbyteorder("<")) for path in self.paths]
        largest = max(int(array.max()) for array in arrays)
        tokenizer = self._tokenizer(largest)
        if largest >= tokenizer.vocab_size:
            raise ValueError(
                f"{', '.join(self.paths)} hold the id {largest}, but the tokenizer knows ids below "
                f"{tokenizer.vocab_size}; name the one that they were made with (data.tokenizer=FOLDER)"
            )
        whole = Tokens(arrays, tokenizer.eos)
        kept = max(1, round(self.held_out * len(whole)))
        held_out = whole.read(len(whole) - kept, kept)
        shown = tokenizer.decode(held_out[:READ].tolist()).encode("utf-8", errors="replace")
        if not shown:
            raise ValueError(
                f"the last {kept} ids of {self.paths[-1]}, which are held out, stand for no text at all; cut "
                "what fills the file up, or hold out more (data.held_out)"
            )
        text_bytes = round(len(shown) * kept / min(kept, READ))
        return Corpus(
            tokenizer,
            Tokens(_without_end(arrays, kept), tokenizer.eos),
            Tokens([held_out], tokenizer.eos, text_bytes),
        )

    def _tokenizer(self, largest: int) -> Tokenizer:
        folder = Path(self.paths[0]).parent if self.tokenizer is None else Path(self.tokenizer)
        if self.tokenizer is not None or (folder / "tokenizer.json").is_file():
            return load_folder(folder)
        if largest >= NUMBERS:
            raise ValueError(
                f"{', '.join(self.paths)} hold the id {largest}; without a tokenizer ids are below {NUMBERS}."
                f" Are they {self.dtype} (data.dtype=...)? Else name their tokenizer (data.tokenizer=FOLDER)"
            )
        words = {str(number): number for number in range(largest + 1)}
        core = tokenizers.Tokenizer(models.WordLevel(words | {EOS: largest + 1}, unk_token=EOS))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return CoreTokenizer(core, eos=EOS)


def _opened(path: Path, dtype: np.dtype) -> np.ndarray:
    """All ids of a file. Raises `ValueError` if it holds none, or something else."""
    try:
        bare = path.suffix != ".npy"
        ids = _mapped(path, dtype) if bare else np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read token ids from {path}: {error}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        kind = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise ValueError(f"{path} should hold one row of whole numbers, the token ids; it holds {kind}")
    if int(ids.min()) < 0:
        raise ValueError(f"{path} holds the id {int(ids.min())}; ids are counted from 0")
    return ids


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        raise ValueError(
            f"{size} bytes are no row of {dtype.name}; say what they are with data.dtype=uint16, uint32, "
            "int32 or int64"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _without_end(arrays: list[np.ndarray], count: int) -> list[np.ndarray]:
    """The arrays but for the last `count` numbers of all."""
    left = sum(map(len, arrays)) - count
    cut = []
    for array in arrays:
        cut.append(array[:left])
        left = max(0, left - len(array))
    return [array for array in cut if len(array)]
