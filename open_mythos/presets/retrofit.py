"""Retrofitted recurrence, McLeish et al. 2025 (arXiv 2511.07384): depth taught to a model that was trained
without.

A pretrained decoder is cut into (prelude, core, coda), the layers between prelude and core are dropped, and
the core becomes a loop as in Huginn:

    h_0      ~  truncated normal
    h_{n+1}  =  core(W [h_n ; e])              e = prelude(tokens)

Exact about the cut, the concatenating adapter, the random start, eight steps of gradient, and the
curriculum: the mean of the log-normal Poisson depth grows over the first quarter of training. (What the
paper leaves to its code is ours: W begins as "pass e on", so that the cut model is where training starts,
and the start's scale is Huginn's.) Weights come from `hub.surgery.retrofit`; it trains best with Muon.

    name                     from              prelude, core, coda   dropped        mean steps
    retrofit-tinyllama-1.1b  TinyLlama 1.1B    4, 8, 4               layers 4..9    32
"""

from open_mythos.config import Config
from open_mythos.loop.core import Loop
from open_mythos.loop.inject import Concat
from open_mythos.loop.schedule import LogNormalPoisson, Ramp
from open_mythos.loop.start import Noise
from open_mythos.model import Model
from open_mythos.presets.baseline import SHAPES, llama


class Cut(Config):
    prelude: int
    core: int
    coda: int
    mean: float = 32.0
    grad: int = 8
    until: float = 0.25  # share of training over which the depth grows

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
    depth = LogNormalPoisson(mean=cut.mean, grad=cut.grad)
    return model.replace(
        prelude=tuple(model.prelude[i] for i in prelude),
        loop=Loop(
            layers=tuple(model.prelude[i] for i in core),
            start=Noise(),
            inject=Concat(),
            schedule=Ramp(of=depth, until=cut.until),
        ),
        coda=tuple(model.prelude[i] for i in coda),
    )


CUTS = {"retrofit-tinyllama-1.1b": Cut(prelude=4, core=8, coda=4)}
MODELS = {
    "retrofit-tinyllama-1.1b": retrofit(llama(SHAPES["tinyllama-1.1b"]), CUTS["retrofit-tinyllama-1.1b"])
}
