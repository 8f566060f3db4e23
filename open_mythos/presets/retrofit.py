"""Retrofitted recurrence, McLeish et al. 2025 (arXiv 2511.07384): depth taught to a model that was trained
without.

A pretrained decoder is cut into (prelude, core, coda), the layers between prelude and core are dropped, and
the core becomes a loop as in Huginn:

    h_0      ~  truncated normal of std sqrt(2 / (5 * 5280)): Huginn's before scaling, whatever the width
    h_{n+1}  =  core(W [h_n ; e])              e = prelude(tokens); no norm in the loop or behind it
    logits   =  head(norm(coda(h_T)))          the head is a matrix of its own, even if it was the embedding

Exact about the forward pass and the checkpoint (hub/retrofit.py), the eight steps of gradient, and the
curriculum: depths are log-normal Poisson about a mean that grows as 1 - sqrt(1 - p) over the first three
quarters of training, or linearly over a shorter part in the ablations (`Cut.until`, `Cut.shape`). Published
are models of mean 4, 8, 16 and 32. Weights come from `hub.surgery.retrofit`; it trains best with Muon.

    name                             from            prelude, core, coda   dropped        parameters
    retrofit-tinyllama-1.1b          TinyLlama 1.1B  4, 8, 4               layers 4..9    844,171,264
    retrofit-llama-3.2-1b            Llama 3.2 1B    4, 6, 4               layers 4, 5    1,385,228,288
    retrofit-llama-3.2-1b-shallow    Llama 3.2 1B    2, 4, 2               layers 2..9    1,020,299,264
    retrofit-olmo2-1b                OLMo 2 1B       4, 6, 4               layers 4, 5    1,359,071,232
"""

import math
from typing import Literal

from open_mythos.config import Config
from open_mythos.loop.core import Loop
from open_mythos.loop.inject import Concat
from open_mythos.loop.schedule import LogNormalPoisson, Ramp
from open_mythos.loop.start import Noise
from open_mythos.model import Model
from open_mythos.presets import baseline, huginn, olmo

STD = math.sqrt(2 / (5 * huginn.SIZES["3.5b"].dim))


class Cut(Config):
    prelude: int
    core: int
    coda: int
    mean: float = 32.0
    grad: int = 8
    until: float = 0.75  # share of training over which the depth grows
    shape: Literal["linear", "sqrt"] = "sqrt"

    def layers(self, count: int) -> tuple[list[int], list[int], list[int]]:
        """Which of `count` layers each stage takes. Raises `ValueError` if they are too few."""
        if min(self.prelude, self.core, self.coda) < 0 or self.core < 1:
            raise ValueError(
                f"a cut has a core of at least one layer, got {self.prelude}, {self.core}, {self.coda}"
            )
        if self.prelude + self.core + self.coda > count:
            raise ValueError(f"({self.prelude}, {self.core}, {self.coda}) does not fit into {count} layers")
        end = count - self.coda
        return list(range(self.prelude)), list(range(end - self.core, end)), list(range(end, count))


def retrofit(model: Model, cut: Cut) -> Model:
    """The fixed-depth `model` with its core made a loop. Raises `ValueError` if it has one already."""
    if model.loop is not None or model.coda:
        raise ValueError(
            "only a fixed-depth model can be retrofitted with a loop; this one has stages already"
        )
    prelude, core, coda = cut.layers(len(model.prelude))
    depth = LogNormalPoisson(mean=cut.mean, grad=min(cut.grad, math.ceil(cut.mean)))
    return model.replace(
        prelude=tuple(model.prelude[i] for i in prelude),
        loop=Loop(
            layers=tuple(model.prelude[i] for i in core),
            start=Noise(std=STD),
            inject=Concat(),
            schedule=Ramp(of=depth, until=cut.until, start=0.0, shape=cut.shape, redrawn=True),
        ),
        coda=tuple(model.prelude[i] for i in coda),
        tied=False,
    )


CUTS = {
    "retrofit-tinyllama-1.1b": ("tinyllama-1.1b", Cut(prelude=4, core=8, coda=4)),
    "retrofit-llama-3.2-1b": ("llama-3.2-1b", Cut(prelude=4, core=6, coda=4)),
    "retrofit-llama-3.2-1b-shallow": (
        "llama-3.2-1b",
        Cut(prelude=2, core=4, coda=2, until=0.125, shape="linear"),
    ),
    "retrofit-olmo2-1b": ("olmo2-1b", Cut(prelude=4, core=6, coda=4)),
}
_WHOLE = baseline.MODELS | olmo.MODELS
MODELS = {name: retrofit(_WHOLE[whole], cut) for name, (whole, cut) in CUTS.items()}
