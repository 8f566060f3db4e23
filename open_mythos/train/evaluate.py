"""How well a model predicts held-out text, in bits per byte: the same unit for every tokenizer and for gzip."""

import gzip
import lzma
import math

import torch

from open_mythos.data.rows import Tokens, in_order
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.train.loss import next_token_loss
from open_mythos.train.precision import Precision, arithmetic, resolve


@torch.no_grad()
def held_out_bits(
    model: LoopedLM,
    text: Tokens,
    length: int,
    *,
    rows: int | None = None,
    batch: int = 16,
    plan: Plan | None = None,
    precision: Precision = "auto",
) -> float:
    """Bits per byte of the first `rows` rows of `length` tokens (all, if none is said) at the depth of `plan`.

    Bytes are counted by the text's average per token.
    """
    device = model.embed.weight.device
    training = model.training
    model.eval()
    nats, count = 0.0, 0
    limit = None if rows is None else -(-rows // batch)
    for part in in_order(text, length, batch, limit):
        tokens, targets, _ = part.to(device)
        with arithmetic(resolve(precision, device), device):
            loss = next_token_loss(model.features(tokens, plan), model.head.weight, targets)
        nats += float(loss.tokens.sum())
        count += int(loss.valid)
    model.train(training)
    return nats / count / math.log(2) * len(text) / text.text_bytes


def compressors(text: str) -> dict[str, float]:
    """Bits per byte of the same text under gzip and xz at their best."""
    data = text.encode("utf-8", errors="replace")
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "xz -9": len(lzma.compress(data, preset=9))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}
