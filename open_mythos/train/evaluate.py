"""How well a model does on what it has not seen.

Text: bits per byte, the same unit for every tokenizer and for gzip. Puzzles: the share of wrong answers.
"""

import gzip
import lzma
import math
from collections.abc import Sequence

import torch

from open_mythos.data.corpus import Corpus
from open_mythos.data.puzzles.puzzle import Puzzles, batch_of, examples_of
from open_mythos.data.rows import Tokens, in_order
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.mode import evaluating
from open_mythos.train.loss import IGNORED, next_token_loss
from open_mythos.train.precision import Precision, arithmetic, resolve
from open_mythos.train.recipe import Recipe

ENOUGH = 1024  # puzzles, where nobody says how many


def evaluate(model: LoopedLM, corpus: Corpus, recipe: Recipe, rows: int | None) -> dict[str, float]:
    """How well a run is doing on what it has not seen, by the names of metrics.jsonl.

    Text: bits per byte of `rows` rows, or of all there are, which overlap as the recipe says. Puzzles: the
    share of wrong answers at the difficulties of the test, and at those of training (on new examples),
    `rows` in all for each.
    """
    puzzle = corpus.puzzle
    if puzzle is None:
        bits = held_out_bits(
            model,
            corpus.held_out,
            recipe.length,
            rows=rows,
            stride=recipe.eval_stride,
            precision=recipe.precision,
        )
        return {"eval_bits_per_byte": bits}
    each = [max(1, (rows or ENOUGH) // len(kinds)) for kinds in (puzzle.train, puzzle.test)]
    seen, unseen = (
        wrong_answers(model, puzzle, kinds, n, length=recipe.length, precision=recipe.precision)
        for kinds, n in zip((puzzle.train, puzzle.test), each, strict=True)
    )
    return {"eval_error": unseen, "eval_error_trained": seen}


@torch.no_grad()
def wrong_answers(
    model: LoopedLM,
    puzzle: Puzzles,
    difficulties: Sequence[int],
    each: int,
    *,
    length: int | None = None,
    plan: Plan | None = None,
    precision: Precision = "auto",
) -> float:
    """The share of `each` examples per difficulty whose answer is not right in every word."""
    device = model.embed.weight.device
    wrong, count = 0, 0
    for difficulty in difficulties:
        tokens, targets, _ = batch_of(puzzle, examples_of(puzzle, difficulty, each), length).to(device)
        with evaluating(model), arithmetic(resolve(precision, device), device):
            best = model.head(model.features(tokens, plan)).argmax(-1)
        right = ((best == targets) | (targets == IGNORED)).all(1)
        wrong, count = wrong + int((~right).sum()), count + len(right)
    return wrong / count


@torch.no_grad()
def held_out_bits(
    model: LoopedLM,
    text: Tokens,
    length: int,
    *,
    rows: int | None = None,
    stride: int | None = None,
    batch: int = 16,
    plan: Plan | None = None,
    precision: Precision = "auto",
) -> float:
    """Bits per byte of the first `rows` rows of `length` tokens (or all) at the depth of `plan`.

    Rows begin every `stride` tokens, by default every `length`; what they share is counted once (`in_order`).
    Bytes are counted by the text's average per token.
    """
    device = model.embed.weight.device
    nats, count = 0.0, 0
    limit = None if rows is None else -(-rows // batch)
    for part in in_order(text, length, batch, limit, stride):
        tokens, targets, _ = part.to(device)
        with evaluating(model), arithmetic(resolve(precision, device), device):
            loss = next_token_loss(model.features(tokens, plan), model.head.weight, targets)
        nats += float(loss.tokens.sum())
        count += int(loss.valid)
    return nats / count / math.log(2) * len(text) / text.text_bytes


def compressors(text: str) -> dict[str, float]:
    """Bits per byte of the same text under gzip and xz at their best."""
    data = text.encode("utf-8", errors="replace")
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "xz -9": len(lzma.compress(data, preset=9))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}
