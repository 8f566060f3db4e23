"""Mixture-of-recursions, Bae et al. 2025 (arXiv 2507.10524): a router decides how often each token recurs.

Middle-cycle sharing: the first and the last layer are their own, the block between them recurs. Who takes
step n is the `route` of the loop (loop/route.py): expert choice, with capacities falling by equal shares,
or token choice.

    name                    from         unique  block  steps  route                      keys and values
    recursions-360m         SmolLM-360M  2       10     3      ExpertChoice(1, 2/3, 1/3)  of each step
    recursions-360m-token   SmolLM-360M  2       10     3      TokenChoice                of each step
    recursions-360m-shared  SmolLM-360M  2       10     3      ExpertChoice(1, 2/3, 1/3)  of the first step

Exact about sharing, expert choice (logits, alpha 0.1, hierarchical filtering, auxiliary loss, and the
capacity's warm-up along a cosine, whose length is yours to say), token choice (one softmax over depths, whose
weight counts at the token's last step alone) and both ways to keep keys and values. Checkpoints of the
released code are read and written by hub/recursions.py; these three are its runs of July 2025.
"""

from open_mythos.config import Config
from open_mythos.loop.core import Loop
from open_mythos.loop.keys import EachStep, FirstStep
from open_mythos.loop.route import ExpertChoice, Routing, TokenChoice
from open_mythos.loop.schedule import Fixed
from open_mythos.model import Model
from open_mythos.presets.baseline import SHAPES, Shape, block, llama


class Size(Config):
    shape: Shape  # of the unshared model; its layers are ends + steps * block
    steps: int = 3
    tokens_choose: bool = False
    share_keys: bool = False  # all steps attend with the first one's keys and values
    warmup: float = 0.0  # share of training over which expert choice comes down to its capacities

    def __post_init__(self) -> None:
        if (self.shape.layers - 2) % self.steps:
            raise ValueError(
                f"{self.shape.layers} layers, less two ends, do not fold into {self.steps} steps"
            )


def recursions(size: Size) -> Model:
    """The model of `size`, as deep as its shape says when every token takes every step."""
    layer, steps = block(size.shape), size.steps
    falling = tuple((steps - n) / steps for n in range(steps))
    route: Routing = ExpertChoice(capacity=falling, warmup=size.warmup)
    if size.tokens_choose:
        route = TokenChoice(depths=steps, z_loss=1e-5)
    loop = Loop(
        layers=(size.shape.layers - 2) // steps * (layer,),
        route=route,
        keys=FirstStep() if size.share_keys else EachStep(),
        schedule=Fixed(steps=steps),
    )
    return llama(size.shape).replace(prelude=(layer,), loop=loop, coda=(layer,))


_SMOLLM = SHAPES["smollm2-360m"].replace(base=1e4, context=2048)  # the first SmolLM
SIZES = {
    "recursions-360m": Size(shape=_SMOLLM),
    "recursions-360m-token": Size(shape=_SMOLLM, tokens_choose=True),
    "recursions-360m-shared": Size(shape=_SMOLLM, share_keys=True),
}
MODELS = {name: recursions(size) for name, size in SIZES.items()}
