"""A text corpus ready for training: tokenizer, training tokens, held-out tokens.

`CorpusConfig.build` makes it in memory from any source (the built-in one takes seconds); `open_corpus` opens
what `mythos data prepare` wrote (`shards.py`). Both read the same way.
"""

from typing import NamedTuple

from open_mythos.config import Config
from open_mythos.data.rows import Tokens, tokenize
from open_mythos.data.text import Files, Hub, Source, Stdlib, split_documents
from open_mythos.data.tokenizer import BPE, Bytes, HubTokenizer, Tokenizer


class Corpus(NamedTuple):
    """What a run reads. `held_out_text` is there for corpora in memory, to compare with gzip and xz."""

    tokenizer: Tokenizer
    training: Tokens
    held_out: Tokens
    held_out_text: str | None = None


class CorpusConfig(Config):
    """A source, a tokenizer, and the fraction of documents held out from both trainings."""

    source: Stdlib | Files | Hub = Stdlib()
    tokenizer: Bytes | BPE | HubTokenizer = BPE()
    held_out: float = 0.05

    def build(self) -> Corpus:
        """Everything in memory; for a source larger than that, `prepare` or stream it.

        Raises `ValueError` for a corpus that is empty, or too short for the split or the tokenizer.
        """
        return corpus_from(self.source, self.tokenizer, self.held_out)


def corpus_from(source: Source, tokenizer: Bytes | BPE | HubTokenizer, held_out: float) -> Corpus:
    """Read, split by document, build the tokenizer on the training part, tokenize both parts."""
    training, kept = split_documents(source.documents(), held_out)
    built = tokenizer.build(training)
    return Corpus(built, tokenize(training, built), tokenize(kept, built), "".join(kept))
