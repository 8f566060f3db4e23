"""Everything that decides a training run: the model, the text, and how one learns from the other.

A run's folder holds its recipe as `config.json`; that file is valid input for another run.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from open_mythos.config import Config
from open_mythos.data.corpus import Corpus, CorpusConfig, Reading, Reasoning, Streamed
from open_mythos.data.puzzles import PUZZLES, puzzle_named
from open_mythos.data.shards import open_corpus
from open_mythos.data.text import Files, Hub, source
from open_mythos.data.token_files import ENDINGS, TokenFiles
from open_mythos.model import Model
from open_mythos.train.keeper import Keep
from open_mythos.train.lr import LearningRate, WarmupStableDecay
from open_mythos.train.objective import Objective
from open_mythos.train.optim import MuonAdamW, Optimiser
from open_mythos.train.parallel import check_expert_parallel
from open_mythos.train.precision import Precision


class Prepared(Config):
    """A folder that `mythos data prepare` wrote."""

    folder: str

    def build(self) -> Corpus:
        return open_corpus(Path(self.folder))


CADENCE = ("eval_every", "eval_rows", "eval_stride", "sample_every", "save_every")
POSITIVE = ("length", "batch", "micro", "steps", "seconds", "clip", *CADENCE)

Data = CorpusConfig | Prepared | TokenFiles | Streamed | Reasoning


class Recipe(Config):
    """`batch` sequences of `length` tokens make one update, `micro` of them at a time (all, if none is said).

    A run ends after `steps` updates or `seconds` of training, whichever is first.
    """

    model: Model
    data: Data = CorpusConfig()
    length: int = 256
    batch: int = 32
    micro: int | None = None
    steps: int | None = None
    seconds: float | None = None
    objective: Objective = Objective()
    optimiser: Optimiser = MuonAdamW()
    lr: LearningRate = WarmupStableDecay()
    clip: float = 1.0
    precision: Precision = "auto"
    remat: bool = False
    compile: bool = False  # one step of the loop as one graph, whatever the depth
    expert_parallel: int = 1  # processes that share out the routed experts
    documents: bool = False  # no attention across documents
    weights: str | None = None  # folder of a run whose weights to begin with
    seed: int = 0
    eval_every: int = 100
    eval_rows: int = 64
    eval_stride: int | None = None  # tokens from one held-out row to the next; below `length` they overlap
    sample_every: int = 100
    save_every: int = 100
    keep: Keep = Keep()

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise ValueError("a run needs an end: give steps, seconds, or both")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                finite = "" if value <= 0 else " and finite"
                raise ValueError(f"{name} must be above zero{finite}, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed should be 0 to 2^63 - 1, got {self.seed}")
        if self.batch % self.rows:
            raise ValueError(f"a batch of {self.batch} does not split into micro-batches of {self.rows}")
        if self.eval_stride is not None and self.eval_stride > self.length:
            raise ValueError(
                f"held-out rows of {self.length} tokens, one every {self.eval_stride}, leave tokens out; "
                f"eval_stride can be 1 to {self.length}"
            )
        if self.length > self.model.context:
            raise ValueError(
                f"rows of {self.length} tokens do not fit a context of {self.model.context} tokens"
            )
        check_expert_parallel(self.model, self.expert_parallel)
        if self.compile and self.expert_parallel > 1:
            raise ValueError(
                "a step in which processes exchange tokens is no single graph; leave compile or "
                f"expert_parallel={self.expert_parallel} out"
            )

    def anchored(self) -> "Recipe":
        """With absolute paths to the data, which mean the same wherever the recipe is read."""
        data = self.data
        if isinstance(data, Prepared):
            return self.replace(data=data.replace(folder=str(Path(data.folder).absolute())))
        if isinstance(data, TokenFiles):
            folder = None if data.tokenizer is None else str(Path(data.tokenizer).absolute())
            paths = tuple(str(Path(path).absolute()) for path in data.paths)
            return self.replace(data=data.replace(paths=paths, tokenizer=folder))
        if isinstance(data, CorpusConfig | Streamed) and isinstance(data.source, Files):
            paths = tuple(str(Path(path).absolute()) for path in data.source.paths)
            return self.replace(data=data.replace(source=data.source.replace(paths=paths)))
        return self

    @property
    def rows(self) -> int:
        """Sequences per forward pass."""
        return self.batch if self.micro is None else self.micro

    def rows_on(self, ranks: int) -> int:
        """Sequences per forward pass of each rank.

        Raises `ValueError` if the batch cannot be shared out so.
        """
        rows = self.micro if self.micro is not None else max(1, self.batch // ranks)
        if self.batch % (rows * ranks):
            raise ValueError(
                f"a batch of {self.batch} does not split into micro-batches of {rows} on each of {ranks} "
                "ranks"
            )
        return rows

    def reading(self, rank: int = 0, ranks: int = 1) -> Reading:
        """What one rank reads of the data for each forward pass."""
        return Reading(self.length, self.rows_on(ranks), self.seed, self.documents, rank, ranks)

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is done, 0 to 1."""
        shares = [step / self.steps] if self.steps is not None else []
        shares += [seconds / self.seconds] if self.seconds is not None else []
        return min(1.0, max(shares))

    def rate(self, step: int, progress: float) -> float:
        """The factor on every learning rate. The run's length in steps is judged by its pace so far."""
        total = self.steps
        if total is None or (progress > 0 and step / progress < total):
            total = max(step + 1, round(step / progress)) if progress > 0 else 1_000_000
        return self.lr.at(step, total)


def data_named(spoken: Sequence[str], recipe: Recipe) -> Data:
    """What a user means by these words: a prepared folder, token files, puzzles, or text for the recipe's
    tokenizer.

    A data set of the Hub is streamed. Raises `ValueError` for words that are none of these.
    """
    if len(spoken) == 1 and (Path(spoken[0]) / "index.json").is_file():
        return Prepared(folder=spoken[0])
    if spoken and all(Path(word).suffix in ENDINGS and Path(word).is_file() for word in spoken):
        return TokenFiles(paths=tuple(spoken))
    if spoken and all(word.lower() in PUZZLES for word in spoken):
        return Reasoning(puzzles=tuple(puzzle_named(word) for word in spoken))
    before = recipe.data if isinstance(recipe.data, CorpusConfig | Streamed) else CorpusConfig()
    found = source(*spoken)
    if isinstance(found, Hub) and isinstance(before, CorpusConfig):
        return Streamed(source=found, tokenizer=before.tokenizer)
    if isinstance(before, Streamed):
        return before.replace(source=found)
    return before.replace(source=found, ends=isinstance(found, Files))
