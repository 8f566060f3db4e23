"""Differentiating a model in other ways than one backward pass: twice, in parts, and through `torch.func`."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from open_mythos.loop.route import Everyone
from open_mythos.model import LoopedLM
from tests.zoo import EVERY, awake, close, words

Weights = dict[str, Tensor]


def loss_of(model: LoopedLM, weights: Weights, tokens: Tensor) -> Tensor:
    return functional_call(model, weights, (tokens,)).log_softmax(-1)[..., 0].mean()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # the library's own forward mode
@pytest.mark.parametrize("name", EVERY)
def test_torch_func_agrees_with_autograd(name: str) -> None:
    """Gradients, and in forward mode the derivative along a direction, at once for all weights. Recomputing
    steps is for the backward pass alone."""
    model, tokens = awake(EVERY[name]).double(), words()
    if model.loop is not None:
        model.loop.remat = True
    weights = {key: weight.detach() for key, weight in model.named_parameters()}
    grads = grad(lambda given: loss_of(model, given, tokens))(weights)
    loss_of(model, dict(model.named_parameters()), tokens).backward()
    for key, weight in model.named_parameters():
        close(grads[key], torch.zeros_like(weight) if weight.grad is None else weight.grad, 1e-5)
    rng = torch.Generator().manual_seed(0)
    way = {key: torch.randn(w.shape, generator=rng, dtype=w.dtype) for key, w in weights.items()}
    _, along = jvp(lambda given: loss_of(model, given, tokens), (weights,), (way,))
    close(along, torch.stack([(grads[key] * way[key]).sum() for key in weights]).sum(), 1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["mythos-mla-act", "mythos-gqa-act", "parcae", "huginn", "ouro", "chen"])
def test_vmap_reads_each_row_alone(name: str) -> None:
    model, tokens = awake(EVERY[name]), words()
    with torch.no_grad():
        mapped = vmap(lambda row: model(row[None])[0])(tokens)
        close(mapped, model(tokens), 1e-4)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("frozen", ["", "loop.layers", "norm", "embed"])
def test_a_gradient_has_a_gradient(name: str, frozen: str) -> None:
    """Against the same in `torch.func`, which knows no gradient that is written out by hand."""
    model, tokens = awake(EVERY[name]).double(), words()
    if frozen and model.loop is not None and not isinstance(model.loop.config.route, Everyone):
        pytest.skip("who is chosen hangs on weights of all parts")
    for key, weight in model.named_parameters():
        weight.requires_grad_(not frozen or frozen not in key)
    learned = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    loss = loss_of(model, learned, tokens)
    pulled = torch.autograd.grad(loss, list(learned.values()), create_graph=True, allow_unused=True)
    length = torch.stack([g.square().sum() for g in pulled if g is not None]).sum()
    twice = torch.autograd.grad(length, list(learned.values()), allow_unused=True)

    def squared(given: Weights) -> Tensor:
        first = grad(lambda inner: loss_of(model, inner, tokens))(given)
        return torch.stack([g.square().sum() for g in first.values()]).sum()

    plain = grad(squared)({key: weight.detach() for key, weight in learned.items()})
    for key, found in zip(learned, twice, strict=True):
        scale = plain[key].abs().max().clamp_min(1)  # routers score in float32
        close((torch.zeros_like(plain[key]) if found is None else found) / scale, plain[key] / scale, 1e-4)
