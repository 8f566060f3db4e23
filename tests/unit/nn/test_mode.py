"""Evaluation is for a while: what was frozen stays frozen, what trained goes on to train."""

import contextlib

from torch import nn

from open_mythos.nn.mode import evaluating


def test_each_module_is_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before == [True, True, False, False]
