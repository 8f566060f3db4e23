"""What a run learns from: a tokenizer, something to train on, held-out tokens.

    CorpusConfig   any source, whole in memory (the built-in one takes seconds)
    Streamed       any source, read on the fly: FineWeb-Edu unless told otherwise
    Reasoning      puzzles made on the fly, one or a mixture
    open_corpus    what `mythos data prepare` wrote (`shards.py`)
    TokenFiles     token ids made elsewhere (`token_files.py`)

All are read the same way: `Corpus.loader` gives the batches of one rank, with a state that resumes exactly.
"""

import itertools
from typing import Any, NamedTuple

from open_mythos.config import Config
from open_mythos.data.batch import Loader
from open_mythos.data.puzzles import Puzzle
from open_mythos.data.puzzles.mixture import Mixture, WordTokenizer
from open_mythos.data.puzzles.puzzle import PuzzleLoader, examples_of
from open_mythos.data.rows import RowLoader, Tokens, tokenize
from open_mythos.data.stream import Stream
from open_mythos.data.text import Files, Hub, Stdlib, is_held_out, split_documents, split_text
from open_mythos.data.tokenizer import BPE, Bytes, HubTokenizer, Tokenizer

HELD_OUT_EXAMPLES = 8  # per difficulty, as text to look at


class Reading(NamedTuple):
    """How batches are wanted: `batch` rows of `length` tokens for rank `rank` of `world`."""

    length: int
    batch: int
    seed: int = 0
    documents: bool = False
    rank: int = 0
    world: int = 1


class Corpus(NamedTuple):
    """What a run reads. `held_out_text` is there for corpora in memory, to compare with gzip and xz."""

    tokenizer: Tokenizer
    training: Tokens | Stream | Mixture
    held_out: Tokens
    held_out_text: str | None = None

    @property
    def puzzle(self) -> Mixture | None:
        """What to ask the model, if it learns to answer rather than to continue text."""
        return self.training if isinstance(self.training, Mixture) else None

    def loader(self, how: Reading) -> Loader:
        """Batches without end. Raises `ValueError` for impossible sizes."""
        if isinstance(self.training, Stream):
            stream = self.training.replace(
                length=how.length, batch=how.batch, seed=how.seed, documents=how.documents
            )
            return stream.build(self.tokenizer, how.rank, how.world)
        place: dict[str, Any] = {
            "batch": how.batch,
            "length": how.length,
            "seed": how.seed,
            "rank": how.rank,
            "world": how.world,
        }
        if isinstance(self.training, Mixture):
            return PuzzleLoader(self.training, **place)
        return RowLoader(self.training, documents=how.documents, **place)

    def __str__(self) -> str:
        if isinstance(self.training, Tokens):
            return f"{len(self.training):,} tokens to learn from, {len(self.held_out):,} held out"
        if isinstance(self.training, Stream):
            return f"a stream of text to learn from, {len(self.held_out):,} tokens held out"
        names = ", ".join(type(puzzle).__name__ for puzzle in self.training.puzzles)
        return f"puzzles to learn from: {names}; {len(self.training.test)} kinds held out"


class CorpusConfig(Config):
    """A source, a tokenizer, and the fraction of documents held out from both trainings.

    With `ends`, where documents are few, that fraction of their text is held out (`split_text`); without it
    chance may hold out much more or less. Runs from before there was a choice are without.
    """

    source: Stdlib | Files | Hub = Stdlib()
    tokenizer: Bytes | BPE | HubTokenizer = BPE()
    held_out: float = 0.05
    ends: bool = False

    def build(self) -> Corpus:
        """Everything in memory; for a source larger than that, `prepare` or stream it.

        Raises `ValueError` for a corpus that is empty, or too short for the split or the tokenizer.
        """
        training, kept = self.split()
        built = self.tokenizer.build(training)
        return Corpus(built, tokenize(training, built), tokenize(kept, built), "".join(kept))

    def split(self) -> tuple[list[str], list[str]]:
        """The texts to train on and those held out. Raises `ValueError` for a corpus too short for both."""
        return (split_text if self.ends else split_documents)(self.source.documents(), self.held_out)


class Streamed(Config):
    """Text read while training. `held_out` is the fraction of documents passed over; the first
    `held_out_documents` of them are what is evaluated. Rows are shuffled inside a `window`; each rank reads
    with `workers` threads.
    """

    source: Stdlib | Files | Hub = Hub()
    tokenizer: Bytes | BPE | HubTokenizer = HubTokenizer()
    held_out: float = 0.01
    held_out_documents: int = 64
    window: int = 1024
    workers: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or self.held_out_documents < 1:
            raise ValueError("Streamed needs a held-out fraction in (0, 1) and at least one such document")

    def build(self) -> Corpus:
        """Raises `ValueError` if the source or the tokenizer is out of reach, or nothing is held out."""
        stream = Stream(source=self.source, held_out=self.held_out, window=self.window, workers=self.workers)
        texts = (text for text in self.source.documents() if not is_held_out(text, self.held_out))
        tokenizer = self.tokenizer.build(texts)
        held_out = tokenize(stream.held_out_documents(self.held_out_documents), tokenizer)
        if not len(held_out):
            raise ValueError(f"no document of the source is held out; raise held_out={self.held_out}")
        return Corpus(tokenizer, stream, held_out)


class Reasoning(Config):
    """Puzzles, each with its difficulties for training and for the test."""

    puzzles: tuple[Puzzle, ...]

    def build(self) -> Corpus:
        mixture = Mixture(puzzles=self.puzzles)
        tokenizer = WordTokenizer(mixture.vocabulary())
        kinds = (examples_of(mixture, kind, HELD_OUT_EXAMPLES) for kind in mixture.test)
        texts = [example.text for example in itertools.chain.from_iterable(kinds)]
        return Corpus(tokenizer, mixture, tokenize(texts, tokenizer))
