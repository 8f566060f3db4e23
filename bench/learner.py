"""One side of bench/train.py: a process that trains when told to, and says how far it has come.

It is given its task as JSON and then, line by line, the seconds to go on for; after each turn it prints one
line of JSON: its own training time so far, the tokens seen, and held-out bits per byte. Measuring is not
counted as training; both sides keep freed memory. The original is the package's own code, trained as its
script trains on a machine without a GPU: float32, all logits, clipping at 1, AdamW on everything, warmup
and cosine.

python bench/learner.py TASK
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple, Protocol

import original
import torch
from torch.nn import functional as F

from open_mythos.analysis import rival
from open_mythos.data.corpus import Corpus
from open_mythos.data.rows import in_order
from open_mythos.data.shards import open_corpus
from open_mythos.train.allocator import keep_freed_memory
from open_mythos.train.evaluate import held_out_bits
from open_mythos.train.lr import WarmupCosine
from open_mythos.train.recipe import Prepared, Recipe
from open_mythos.train.recipes import for_model, small_mythos
from open_mythos.train.step import TrainState, train_step

CPU = torch.device("cpu")
DECAY, BETAS, CLIP, FLOOR = 0.1, (0.9, 0.95), 1.0, 0.1


class Task(NamedTuple):
    """What both sides are told. `lr` is the original's, none for ours; `seconds` is the whole training."""

    lr: float | None
    seconds: float
    threads: int
    dim: int
    loops: int
    vocab: int
    length: int
    batch: int
    rows: int  # of held-out text
    seed: int
    text: str  # what `mythos data prepare` wrote
    original: str  # the unpacked wheel

    def recipe(self) -> Recipe:
        """Ours; of the original it is the size, the text and the batches."""
        model = small_mythos(self.dim, max(1, self.dim // 64), self.vocab, mean=self.loops)
        return for_model(model).replace(
            data=Prepared(folder=self.text),
            length=self.length,
            batch=self.batch,
            steps=None,
            seconds=self.seconds,
            seed=self.seed,
        )


class Side(Protocol):
    parameters: int

    def update(self, progress: float, seconds: float) -> None:
        """Once; `progress` is the share of the training that is over, `seconds` the time it took."""

    def bits(self) -> float:
        """Per byte of held-out text, at the trained mean of loops."""


class Ours:
    def __init__(self, task: Task, corpus: Corpus) -> None:
        self.recipe, self.corpus, self.rows = task.recipe(), corpus, task.rows
        self.state = TrainState.begin(self.recipe, corpus.loader(self.recipe.reading()), CPU)
        self.parameters = sum(p.numel() for p in self.state.model.parameters())

    def update(self, progress: float, seconds: float) -> None:
        self.state.seconds = seconds
        train_step(self.state, self.recipe, [next(self.state.loader)])

    def bits(self) -> float:
        held_out, recipe = self.corpus.held_out, self.recipe
        return held_out_bits(
            self.state.model, held_out, recipe.length, rows=self.rows, precision=recipe.precision
        )


class Original:
    def __init__(self, task: Task, corpus: Corpus) -> None:
        recipe = task.recipe()
        assert task.lr is not None
        self.lr, self.corpus, self.length, self.rows = task.lr, corpus, task.length, task.rows
        self.loader, self.step = corpus.loader(recipe.reading()), 0
        package = original.load(Path(task.original))
        torch.manual_seed(task.seed)
        settings = vars(rival.settings_like(recipe.model, task.length))
        theirs = {
            name: settings[name] for name in package.MythosConfig.__dataclass_fields__ if name in settings
        }
        self.model = package.OpenMythos(package.MythosConfig(**theirs)).train()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.lr, weight_decay=DECAY, betas=BETAS, fused=True
        )

    def update(self, progress: float, seconds: float) -> None:
        total = max(self.step + 1, round(self.step / progress)) if progress > 0 else 1_000_000
        rate = WarmupCosine(warmup=round(rival.WARMUP * total), floor=FLOOR).at(self.step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        tokens, targets, _ = next(self.loader)
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(tokens)
        F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.step += 1

    @torch.no_grad()
    def bits(self) -> float:
        self.model.eval()
        nats, count, text = 0.0, 0, self.corpus.held_out
        for tokens, targets, _ in in_order(text, self.length, 16, -(-self.rows // 16)):
            logits = self.model(tokens).flatten(0, 1)
            nats += F.cross_entropy(logits, targets.reshape(-1), reduction="sum").item()
            count += targets.numel()
        self.model.train()
        return nats / count / math.log(2) * len(text) / text.text_bytes


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    keep_freed_memory()
    torch.set_num_threads(task.threads)
    corpus = open_corpus(Path(task.text), verify=False)
    side: Side = Ours(task, corpus) if task.lr is None else Original(task, corpus)
    seconds, updates = 0.0, 0

    def tell() -> None:
        tokens = updates * task.batch * task.length
        bits, done = side.bits(), seconds >= task.seconds
        print(
            json.dumps(
                {
                    "parameters": side.parameters,
                    "seconds": seconds,
                    "tokens": tokens,
                    "bits": bits,
                    "done": done,
                }
            ),
            flush=True,
        )

    tell()
    for line in sys.stdin:
        until = min(seconds + float(line), task.seconds)
        while seconds < until:
            began = time.perf_counter()
            side.update(seconds / task.seconds, seconds)
            seconds += time.perf_counter() - began
            updates += 1
        tell()


if __name__ == "__main__":
    main()
