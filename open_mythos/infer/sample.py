"""From logits to the next token.

    Sampling    repetition penalty, temperature, top-k, top-p, min-p, in this order; then one draw

    penalty r      z / r where z > 0, else z r, for tokens already in the sequence
                   Keskar et al. 2019 (arXiv 1909.05858)
    temperature t  z / t; zero takes the likeliest token
    top-k          only the k likeliest, Fan et al. 2018 (arXiv 1805.04833)
    top-p          the fewest tokens whose probability reaches p, Holtzman et al. 2019 (arXiv 1904.09751)
    min-p          only tokens at least min_p times as likely as the likeliest
                   Nguyen et al. 2024 (arXiv 2407.01082)

A row's randomness is its own: uniform numbers from (seed, row), so neither its neighbours nor the length of
what is asked change what it draws. Law: tests/unit/infer/test_sample.py, against a twin in plain Python.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from open_mythos.config import Config

NextLogits = Float[Tensor, "B V"]
Uniforms = Float[Tensor, "B"]


class Sampling(Config):
    """How to choose; by default the likeliest token. No `top_k`, or 0, or more than V keeps all."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            self.temperature >= 0, "temperature", "at least 0 (0 takes the likeliest token)", self.temperature
        )
        _require((self.top_k or 0) >= 0, "top_k", "at least 1, or none for all tokens", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _require(
            self.repetition_penalty > 0, "repetition_penalty", "above 0 (1 is none)", self.repetition_penalty
        )
        _require(self.seed >= 0, "seed", "at least 0", self.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def choose(
    logits: NextLogits,
    sampling: Sampling,
    uniform: Uniforms | None = None,
    seen: Bool[Tensor, "B V"] | None = None,
) -> Int[Tensor, "B"]:
    """The next token of each row. `uniform` in [0, 1) decides (not asked for when greedy); `seen` marks the
    tokens that the penalty is for. Nothing here waits for the device."""
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits.argmax(-1)
    if uniform is None:
        raise ValueError(
            f"to sample at temperature {sampling.temperature} a uniform number per row is needed"
        )
    return draw(probabilities(logits, sampling), uniform)


def probabilities(logits: NextLogits, sampling: Sampling) -> NextLogits:
    """What is drawn from, once temperature and the three filters are applied."""
    # Subtracting the maximum first keeps a tiny temperature finite.
    heat = max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    scaled = (logits - logits.amax(-1, keepdim=True)) / heat
    if sampling.top_k and sampling.top_k < scaled.shape[-1]:
        scaled = keep_likeliest(scaled, sampling.top_k)
    if sampling.top_p < 1:
        scaled = keep_nucleus(scaled, sampling.top_p)
    p = scaled.softmax(-1)
    if sampling.min_p > 0:
        p = p.where(p >= sampling.min_p * p.amax(-1, keepdim=True), 0.0)
    return p / p.sum(-1, keepdim=True)


def penalised(logits: NextLogits, seen: Bool[Tensor, "B V"], penalty: float) -> NextLogits:
    """Tokens in `seen` made less likely (or, with a penalty below one, more)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likeliest(logits: NextLogits, count: int) -> NextLogits:
    """-inf on all but the `count` largest and those equal to the last of them."""
    least = logits.topk(count, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_nucleus(logits: NextLogits, mass: float) -> NextLogits:
    """-inf on tokens that come after the likelier ones have reached `mass`; the likeliest always stays."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    p = ordered.softmax(-1)
    beyond = p.cumsum(-1) - p >= mass
    beyond[:, 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)


def draw(p: NextLogits, uniform: Uniforms) -> Int[Tensor, "B"]:
    """The token at which the running sum of probabilities passes `uniform`."""
    heights = p.double().cumsum(-1)
    # Below one by more than rounding, so that a token without probability is never reached.
    mark = uniform.double().clamp_max(1 - 2.0**-40)[:, None] * heights[:, -1:]
    return (heights <= mark).sum(-1).clamp_max(p.shape[-1] - 1)


def uniforms(seed: int, row: int, count: int) -> np.ndarray:
    """The first `count` uniform numbers of a row; a longer request begins with the same ones."""
    return np.random.default_rng((seed, row)).random(count)


def _require(holds: bool, name: str, expected: str, given: object) -> None:
    if not holds:
        raise ValueError(f"{name} should be {expected}, got {given}")
