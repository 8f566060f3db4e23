"""A model builds and runs where nothing is stored, and is filled whole when it gets storage."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from open_mythos.model import LoopedLM, Model
from open_mythos.nn.cache import KVCache
from open_mythos.nn.context import Context
from tests.zoo import EVERY, words

MILLION = 1_000_000


def on_meta(config: Model) -> LoopedLM:
    with torch.device("meta"):
        return config.build()


@pytest.mark.parametrize("name", EVERY)
def test_runs_on_meta(name: str) -> None:
    model = on_meta(EVERY[name])
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    logits = model(words().to("meta"))
    assert logits.is_meta
    assert logits.shape == (2, 7, model.config.vocab)


@pytest.mark.parametrize("name", EVERY)
def test_reset_fills_everything(name: str) -> None:
    """As if it had been made with storage at once, tensor for tensor; tied weights are still one."""
    late, early = on_meta(EVERY[name]).to_empty(device="cpu"), EVERY[name].build()
    assert (late.head.weight is late.embed.weight) == EVERY[name].tied
    with torch.no_grad():
        for tensor in (*late.parameters(), *late.buffers()):
            tensor.fill_(torch.nan)
    for model in (late, early):
        torch.manual_seed(5)
        model.reset_parameters()
    assert late.state_dict().keys() == early.state_dict().keys()
    for key, tensor in early.state_dict().items():
        assert torch.equal(late.state_dict()[key], tensor), key


class Largest(TorchFunctionMode):
    """The most elements that any function of torch returned."""

    elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", EVERY)
def test_a_million_tokens_need_no_table_of_pairs(name: str) -> None:
    """Nothing grows faster than the tokens: no dense mask, no scores outside the kernel."""
    model = on_meta(EVERY[name].replace(context=MILLION))
    with torch.no_grad(), Largest() as seen:
        logits = model(torch.zeros(1, MILLION, dtype=torch.long, device="meta"))
    assert logits.shape == (1, MILLION, EVERY[name].vocab)
    # The widest thing a token has is the middle of its feed-forward, below 16 widths of the model.
    assert MILLION * EVERY[name].dim <= seen.elements <= 16 * MILLION * EVERY[name].dim


@pytest.mark.parametrize("name", ["mythos-mla", "mythos-gqa-act", "huginn"])
def test_one_more_token_after_a_million(name: str) -> None:
    config = EVERY[name].replace(context=MILLION + 1)
    model, cache = on_meta(config), KVCache(rows=1, capacity=MILLION + 1)
    tokens = torch.zeros(1, 1, dtype=torch.long, device="meta")
    ctx = Context.counting(tokens, start=MILLION, cache=cache)
    with torch.no_grad(), Largest() as seen:
        assert model(tokens, ctx=ctx).shape == (1, 1, config.vocab)
    assert seen.elements <= 16 * MILLION * config.dim
