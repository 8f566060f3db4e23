"""Text to token ids and back.

- `Bytes`: one token per byte of UTF-8, 256 ids and three specials. Nothing to train, nothing to download.
- `BPE`: byte-level byte-pair encoding (Sennrich et al. 2016) trained on the corpus at hand, saved with the
  run.
- `HubTokenizer`: any tokenizer of the Hugging Face Hub, or of a folder, that has a `tokenizer.json`.

`build(documents)` makes the `Tokenizer`; `save(folder)` writes `tokenizer.json` and `tokenizer_config.json`,
which `load_tokenizer` and transformers' `AutoTokenizer` read. Ids never reach `vocab_size`: special tokens
are counted. Text is text: a document that spells a special token gets ordinary tokens for it. Law:
decode(encode(text)) == text for every text (tests/unit/data/test_tokenizer.py).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from open_mythos.config import Config
from open_mythos.data.network import hub_in_reach, require_hub
from open_mythos.whole import write_whole

EOS, BOS, PAD = SPECIALS = ("<|eos|>", "<|bos|>", "<|pad|>")
ENDS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    EOS,
)  # what others call it, where they do not say

# Words with their leading space, numbers in threes, punctuation, line ends with what they close: the pre-
# split of the GPT-4 family, which keeps indentation in one piece.
PRE_SPLIT = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer offers. `eos` ends a document; `bos` and `pad` may be absent."""

    vocab_size: int
    eos: int
    bos: int | None
    pad: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


class Bytes(Config):
    """Ids 0..255 are the bytes; then eos, bos, pad."""

    def build(self, documents: Iterable[str] = ()) -> Tokenizer:
        return ByteTokenizer()


class BPE(Config):
    """`vocab_size` ids (specials and bytes among them) from the first `sample` characters of the corpus."""

    vocab_size: int = 4096
    sample: int = 20_000_000

    def __post_init__(self) -> None:
        if self.vocab_size < 256 + len(SPECIALS):
            raise ValueError(f"a byte-level BPE needs a vocabulary of at least 259, got {self.vocab_size}")

    def build(self, documents: Iterable[str] = ()) -> Tokenizer:
        """Train. Raises `ValueError` if the corpus is too short to give `vocab_size` tokens."""
        core = _byte_level(tokenizers.Tokenizer(models.BPE()))
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        core.train_from_iterator(_first(documents, self.sample), trainer)
        if core.get_vocab_size() < self.vocab_size:
            raise ValueError(
                f"the corpus is too short for a BPE of {self.vocab_size} tokens: it gave "
                f"{core.get_vocab_size()}; "
                "give more text, a smaller vocab_size, or Bytes"
            )
        return CoreTokenizer(core, eos=EOS, bos=BOS, pad=PAD)


class HubTokenizer(Config):
    """A tokenizer by its name on the Hub (OpenMythos' is `openai/gpt-oss-20b`), or by a folder's path."""

    name: str = "openai/gpt-oss-20b"
    revision: str | None = None

    def build(self, documents: Iterable[str] = ()) -> Tokenizer:
        """Raises `ValueError` for an unknown name, or if the Hub is out of reach and its cache empty."""
        folder = Path(self.name)
        if not folder.is_dir():
            folder = _download(self.name, self.revision)
        return load_folder(folder)


Tokenizers = Bytes | BPE | HubTokenizer


class ByteTokenizer:
    """UTF-8 bytes as ids. `save` writes the equal `tokenizer.json`; this class is only the fast way."""

    def __init__(self) -> None:
        self.vocab_size, self.eos = 259, 256
        self.bos: int | None = 257
        self.pad: int | None = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        _save(byte_core(), folder, {"eos": EOS, "bos": BOS, "pad": PAD}, kind="Bytes")


class CoreTokenizer:
    """A `tokenizers.Tokenizer` (any `tokenizer.json`) with its special tokens by role."""

    def __init__(self, core: tokenizers.Tokenizer, eos: str, bos: str | None = None, pad: str | None = None):
        self.core = core
        self.core.encode_special_tokens = True
        self.core.no_padding()
        self.core.no_truncation()
        self._names = {"eos": eos, "bos": bos, "pad": pad}
        self.vocab_size = max(core.get_vocab(with_added_tokens=True).values()) + 1
        self.eos = _id(core, eos)
        self.bos = None if bos is None else _id(core, bos)
        self.pad = None if pad is None else _id(core, pad)

    def encode(self, text: str) -> list[int]:
        return list(self.core.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode` for each text, on all cores."""
        return [
            list(found.ids) for found in self.core.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.core.decode(list(ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        _save(self.core, folder, self._names)


def load_tokenizer(place: str | Path) -> Tokenizer:
    """The tokenizer saved in a folder, or one of the Hub by name. Raises `ValueError` if there is none."""
    return load_folder(Path(place)) if Path(place).is_dir() else HubTokenizer(name=str(place)).build()


def load_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a folder with a `tokenizer.json`, ours or another's."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json; `Tokenizer.save` and transformers write one")
    settings = _settings(folder)
    if settings.get("open_mythos") == "Bytes":
        return ByteTokenizer()
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
    eos = _named(settings, "eos") or next((end for end in ENDS if core.token_to_id(end) is not None), None)
    if eos is None:
        raise ValueError(
            f"{folder} does not say which token ends a text: its tokenizer_config.json needs eos_token"
        )
    return CoreTokenizer(core, eos, _named(settings, "bos"), _named(settings, "pad"))


def tokenizer_named(spoken: str, vocab_size: int = 4096) -> Tokenizers:
    """What a user means by `bytes`, `bpe`, a folder, or the name of a tokenizer on the Hub."""
    if spoken == "bytes":
        return Bytes()
    if spoken == "bpe":
        return BPE(vocab_size=vocab_size)
    if Path(spoken).is_dir() or "/" in spoken:
        return HubTokenizer(name=spoken)
    raise ValueError(f"there is no tokenizer {spoken!r}; give bytes, bpe, a folder, or owner/name of the Hub")


def byte_core() -> tokenizers.Tokenizer:
    """`Bytes` as a BPE without merges: the slow twin of `ByteTokenizer`, and its form on disk."""
    vocabulary = {_letter(byte): byte for byte in range(256)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    return core


def _letter(byte: int) -> str:
    """The printable letter that stands for a byte in byte-level vocabularies: itself, or one from 256 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in kept else chr(256 + byte - sum(other < byte for other in kept))


def _byte_level(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    split = pre_tokenizers.Split(Regex(PRE_SPLIT), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    core.decoder = decoders.ByteLevel()
    return core


def _first(documents: Iterable[str], characters: int) -> Iterator[str]:
    for text in documents:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def _id(core: tokenizers.Tokenizer, name: str) -> int:
    found = core.token_to_id(name)
    if found is None:
        raise ValueError(f"the tokenizer has no token {name!r}, which it names as special")
    return int(found)


def _named(settings: dict[str, Any], role: str) -> str | None:
    token = settings.get(f"{role}_token")
    return token.get("content") if isinstance(token, dict) else token


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _save(
    core: tokenizers.Tokenizer, folder: Path, names: dict[str, str | None], kind: str | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", core.to_str(pretty=True))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    settings |= {f"{role}_token": name for role, name in names.items() if name}
    settings |= {"open_mythos": kind} if kind else {}
    write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def _download(name: str, revision: str | None) -> Path:
    """The cached folder of a Hub tokenizer, fetched if the Hub is in reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["tokenizer.json", "tokenizer_config.json"]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=files, local_files_only=not hub_in_reach()
            )
        )
    except LocalEntryNotFoundError:
        require_hub(f"the tokenizer {name}", "use `bytes`, `bpe`, or a folder with a tokenizer.json")
        raise
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the Hub gives no tokenizer {name!r} ({reason}); check the name, or log in if it is gated"
        ) from error
