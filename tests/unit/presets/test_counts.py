"""The presets, counted, and compared with what was published."""

import pytest
import torch

from open_mythos.presets import chen, names, preset

PUBLISHED = {
    "parcae-140m": 144_323_136,
    "parcae-370m": 388_003_328,
    "parcae-770m": 776_655_680,
    "parcae-1.3b": 1_338_591_744,
    "parcae-gpt-140m": 143_141_184,
    "parcae-gpt-370m": 385_903_104,
    "parcae-gpt-770m": 773_375_040,
    "parcae-gpt-1.3b": 1_333_868_544,
    "huginn-3.5b": 3_564_976_800,
    "ouro-2.6b": 2_667_974_657,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "olmo-1b": 1_176_764_416,
    "olmo2-1b": 1_484_916_736,
    "retrofit-tinyllama-1.1b": 844_171_264,
    "retrofit-llama-3.2-1b": 1_385_228_288,
    "retrofit-llama-3.2-1b-shallow": 1_020_299_264,
    "retrofit-olmo2-1b": 1_359_071_232,
}


def count(config: object) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in config.build().parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name: str) -> None:
    assert count(preset(name)) == PUBLISHED[name]


def test_half_of_ouro_lacks_half_of_the_layers() -> None:
    small, large = count(preset("ouro-1.4b")), count(preset("ouro-2.6b"))
    layer = 4 * 2048**2 + 3 * 2048 * 5632 + 4 * 2048
    assert large - small == 24 * layer


def test_the_graph_model_with_act_is_as_its_author_counted() -> None:
    core = chen.chen(chen.SIZES["chen-graph"].replace(act=True))
    assert count(chen.Classifier(core=core, roles=2)) == 172_674


def test_the_sequence_models_stay_below_the_authors_million() -> None:
    assert count(chen.CLASSIFIERS["chen-logic"]) < 1_000_000


@pytest.mark.parametrize("name", names())
def test_every_name_gives_a_model_that_survives_json(name: str) -> None:
    model = preset(name)
    assert type(model).from_dict(model.to_dict()) == model


def test_a_wrong_name_gets_a_hint() -> None:
    with pytest.raises(ValueError, match=r"no preset 'ouro-1.4'.*ouro-1.4b"):
        preset("ouro-1.4")


def test_a_larger_vocabulary_needs_larger_value_embeddings() -> None:
    with pytest.raises(
        ValueError, match=r"prelude\.1\.mixer.* rows for 32768 tokens, the vocabulary has 40000"
    ):
        count(preset("parcae-140m").replace(vocab=40_000))
