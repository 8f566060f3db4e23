"""Models have as many parameters as was published."""

import pytest
import torch

from open_mythos.model import Model
from open_mythos.presets.huginn import huginn
from open_mythos.presets.parcae import parcae, parcae_gpt

COUNTS = [
    (parcae, "140m", 144_323_136),
    (parcae, "370m", 388_003_328),
    (parcae, "770m", 776_655_680),
    (parcae, "1.3b", 1_338_591_744),
    (parcae_gpt, "140m", 143_141_184),
    (parcae_gpt, "370m", 385_903_104),
    (parcae_gpt, "770m", 773_375_040),
    (parcae_gpt, "1.3b", 1_333_868_544),
    (huginn, "3.5b", 3_564_976_800),
]


@pytest.mark.parametrize(("make", "size", "count"), COUNTS)
def test_parameters(make, size: str, count: int) -> None:
    config: Model = make(size)
    with torch.device("meta"):
        lm = config.build()
    assert sum(parameter.numel() for parameter in lm.parameters()) == count
    assert Model.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("make", [parcae, parcae_gpt, huginn])
def test_an_unknown_size_is_named(make) -> None:
    with pytest.raises(ValueError, match="comes in the sizes"):
        make("7b")
