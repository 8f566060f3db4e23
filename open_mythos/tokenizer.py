"""The tokenizer of OpenMythos by its own names: `MythosTokenizer`, `load_tokenizer`, `get_vocab_size`.

The default is `openai/gpt-oss-20b` of the Hugging Face Hub. Only its `tokenizer.json` is needed; transformers
is not. Unlike the original, `vocab_size` counts the special tokens, so every id fits an embedding of that
size.
"""

import functools
from collections.abc import Sequence
from typing import Any

from open_mythos.data import tokenizer as _tokenizers

DEFAULT_MODEL_ID = "openai/gpt-oss-20b"


class MythosTokenizer:
    """A Hub (or local) tokenizer by name.

    >>> tok = MythosTokenizer("path/to/folder")  # doctest: +SKIP
    >>> tok.decode(tok.encode("Hello world"))  # doctest: +SKIP
    'Hello world'

    Raises `ValueError` when the name is unknown, and at once, saying what to do, when the Hub is out of
    reach.
    """

    def __init__(self, model_id: str = DEFAULT_MODEL_ID):
        self.model_id = model_id
        self._plain = _tokenizers.load_tokenizer(model_id)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """transformers' `AutoTokenizer` where that is installed, else the `tokenizers.Tokenizer` beneath."""
        try:
            from transformers import AutoTokenizer
        except ImportError:
            return getattr(self._plain, "core", self._plain)
        return AutoTokenizer.from_pretrained(self.model_id)

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the largest id, special tokens included, and one."""
        return self._plain.vocab_size

    @property
    def eos(self) -> int:
        """The id that ends a text."""
        return self._plain.eos

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""
        return self._plain.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode` for each text, on all cores."""
        return self._plain.encode_batch(texts)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some ids; special tokens are left out."""
        return self._plain.decode(token_ids)


def load_tokenizer(model_id: str = DEFAULT_MODEL_ID) -> MythosTokenizer:
    """`MythosTokenizer(model_id)`: by name on the Hub, or a folder such as a run's own."""
    return MythosTokenizer(model_id)


def get_vocab_size(model_id: str = DEFAULT_MODEL_ID) -> int:
    """The vocabulary an OpenMythos model needs for this tokenizer, special tokens included."""
    return load_tokenizer(model_id).vocab_size
