"""Ordinary pretrained models made into looped ones, weights and all.

    relax       Bae et al. 2024 (arXiv 2410.20672): L layers folded into a block that runs L / K times

                    W      =  stepwise   K layers at even distances, first and last among them
                              average    mean of the layers that come to share
                              lower      the first K layers
                    B A    =  truncated singular value decomposition of  W_l - W

    retrofit    McLeish et al. 2025 (arXiv 2511.07384): prelude, core and coda are cut out, the core is looped

The gains of RMSNorm are moved into the linear maps behind them before maps are shared (the function stays
the same), so that all that differs between layers is linear, and at full rank the looped model is the
original. Norms of query and key heads cannot be moved: beside pairs they keep gains per step, without pairs
they are shared as the maps are.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from open_mythos.loop.inject import ConcatInjection
from open_mythos.model import LoopedLM, Model
from open_mythos.nn.attention import HeadNormalisation
from open_mythos.nn.linear import LoRAProjection
from open_mythos.presets.relaxed import relaxed
from open_mythos.presets.retrofit import Cut
from open_mythos.presets.retrofit import retrofit as cut_config

Sharing = Literal["stepwise", "average", "lower"]
Adapter = Literal["through", "drawn"]
Weights = dict[str, Tensor]  # of one layer
BEHIND = {"mixer_norm.weight": ("mixer.q", "mixer.k", "mixer.v"), "ffn_norm.weight": ("ffn.gate_up",)}


@torch.no_grad()
def relax(lm: LoopedLM, loops: int, rank: int | None, sharing: Sharing | None = None) -> LoopedLM:
    """The fixed-depth `lm` as a loop of `loops` turns with pairs of `rank`, or none.

    Unless told otherwise the shared maps are the average with pairs and stepwise without, which the paper
    found best. Raises `ValueError` for models that cannot be folded so.
    """
    config = relaxed(lm.config, loops, rank)
    sharing = sharing or ("stepwise" if rank is None else "average")
    layers = [_gainless(_weights(layer)) for layer in lm.prelude]
    block = len(layers) // loops
    made = _outside(lm, config)
    assert made.loop is not None
    for j, layer in enumerate(made.loop.layers):
        tied = layers[j::block]
        shared = _share(layers, tied, j, block, sharing)
        _fill(layer, shared)
        for name, module in layer.named_modules():
            if isinstance(module, LoRAProjection):
                _relax(module, name, shared, tied)
            if isinstance(module, HeadNormalisation) and module.weight is not None and rank is not None:
                module.weight.copy_(torch.stack([layer[f"{name}.weight"] for layer in tied]))
    return made


@torch.no_grad()
def retrofit(lm: LoopedLM, cut: Cut, adapter: Adapter = "through") -> LoopedLM:
    """`lm` with its core made a loop, and a head of its own.

    An adapter `through` passes the input on without listening to the state: at first every depth gives the
    logits of the kept layers, and to listen is what training adds. `drawn` is the paper's: uniform up to
    1 / sqrt(2 D), so that training first has to repair the model.
    """
    config = cut_config(lm.config, cut)
    made = _outside(lm, config)
    assert made.loop is not None
    stages = (made.prelude, made.loop.layers, made.coda)
    for stage, source in zip(stages, cut.layers(len(lm.prelude)), strict=True):
        for layer, i in zip(stage, source, strict=True):
            layer.load_state_dict(lm.prelude[i].state_dict())
    inject = made.loop.inject
    assert isinstance(inject, ConcatInjection)
    if adapter == "drawn":
        inject.mix.weight.uniform_(-1, 1).mul_((2 * config.dim) ** -0.5)
    else:
        inject.mix.weight.copy_(torch.eye(config.dim, 2 * config.dim).roll(config.dim, 1))
    return made


def low_rank(
    matrix: Float[Tensor, "O I"], rank: int
) -> tuple[Float[Tensor, "O {rank}"], Float[Tensor, "{rank} I"]]:
    """B, A with B A the closest matrix of this rank; padded with zeros where the rank is more than full."""
    u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    kept = min(rank, len(s))
    up, down = matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
    up[:, :kept], down[:kept] = u[:, :kept] * s[:kept], v[:kept]
    return up, down


def _outside(lm: LoopedLM, config: Model) -> LoopedLM:
    """The new model with all of the old but its layers: embedding, last norm and head."""
    made = config.build().to(lm.embed.weight)
    outer = {name: t for name, t in lm.state_dict().items() if not name.startswith("prelude.")}
    made.load_state_dict(outer, strict=False)
    return made.train(lm.training)


def _weights(layer: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def _gainless(weights: Weights) -> Weights:
    for norm, maps in BEHIND.items():
        if norm in weights:  # some have none
            for name in maps:
                weights[f"{name}.weight"] *= weights[norm]
            weights[norm] = torch.ones_like(weights[norm])
    return weights


def _share(layers: Sequence[Weights], tied: Sequence[Weights], j: int, block: int, how: Sharing) -> Weights:
    if how == "lower":
        return layers[j]
    if how == "stepwise":
        return layers[round(j * (len(layers) - 1) / max(block - 1, 1))]
    return {name: torch.stack([layer[name] for layer in tied]).mean(0) for name in tied[0]}


def _fill(layer: nn.Module, shared: Weights) -> None:
    own = layer.state_dict()
    for name, tensor in shared.items():
        own[name].copy_(tensor)


def _relax(module: LoRAProjection, name: str, shared: Weights, tied: Sequence[Weights]) -> None:
    """One pair, and one shift of the bias, for each of the layers that the map now stands for."""
    for n, layer in enumerate(tied):
        lost = layer[f"{name}.weight"] - shared[f"{name}.weight"]
        module.up[n], module.down[n] = low_rank(lost, module.down.shape[1])
        if module.shift is not None:
            module.shift[n] = layer[f"{name}.bias"] - shared[f"{name}.bias"]
