"""Folding a plain decoder into a loop: what is promised to be equal is equal."""

import pytest
import torch
from torch import Tensor

from open_mythos.hub.load import from_pretrained, save_pretrained
from open_mythos.hub.surgery import low_rank, relax, retrofit
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.norm import LayerNorm
from open_mythos.presets.baseline import Shape, llama
from open_mythos.presets.olmo import olmo, olmo2
from open_mythos.presets.retrofit import Cut
from tests.lively import lively

SHAPE = Shape(vocab=37, dim=16, layers=6, heads=4, kv_heads=2, width=20)
TOKENS = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(0))


def plain(**changes: object) -> LoopedLM:
    return lively(llama(SHAPE.replace(**changes)))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


@pytest.mark.parametrize("sharing", ["stepwise", "average", "lower"])
@pytest.mark.parametrize(
    "kind",
    [{}, {"bias": True}, {"bias": True, "out_bias": True, "tied": False}, {"head_norm": True}],
    ids=str,
)
def test_full_rank_is_the_original(kind: dict[str, bool], sharing: str) -> None:
    lm = plain(**kind)
    looped = relax(lm, loops=3, rank=20, sharing=sharing)  # type: ignore[arg-type]
    assert looped.steps == 3
    close(looped(TOKENS), lm(TOKENS))


def test_olmo_keeps_its_logits_at_full_rank_and_its_layers_in_a_retrofit() -> None:
    lm = lively(olmo(SHAPE))
    close(relax(lm, loops=2, rank=20)(TOKENS), lm(TOKENS))
    for plain_lm in (lm, lively(olmo2(SHAPE))):
        whole = retrofit(plain_lm, Cut(prelude=2, core=2, coda=2))  # nothing is dropped
        close(whole(TOKENS, 3), plain_lm(TOKENS))
    with pytest.raises(ValueError, match="pre-norm"):
        relax(lively(olmo2(SHAPE)), 2, 20)


def test_a_norm_with_a_bias_is_not_folded() -> None:
    config = llama(SHAPE)
    layer = config.prelude[0].replace(norm=LayerNorm())
    with pytest.raises(ValueError, match="without a bias"):
        relax(lively(config.replace(prelude=6 * (layer,))), 2, 20)


def test_more_rank_loses_less() -> None:
    lm = plain()
    errors = [float((relax(lm, 2, rank)(TOKENS) - lm(TOKENS)).detach().norm()) for rank in (1, 8, 14, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[-1]


def test_a_low_rank_pair_is_the_closest_there_is() -> None:
    matrix = torch.randn(7, 5)
    up, down = low_rank(matrix, 2)
    torch.testing.assert_close((matrix - up @ down).norm(), torch.linalg.svdvals(matrix)[2:].norm())
    up, down = low_rank(matrix, 9)
    torch.testing.assert_close(up @ down, matrix)


def test_the_shared_layers_are_those_named() -> None:
    lm = plain()
    with torch.no_grad():
        for layer in lm.prelude:
            layer.mixer_norm.weight.fill_(1.0)
    whole = [layer.mixer.q.weight for layer in lm.prelude]

    def shared(sharing: str) -> list[Tensor]:
        made = relax(lm, 2, None, sharing)  # type: ignore[arg-type]
        assert made.loop is not None
        return [layer.mixer.q.weight for layer in made.loop.layers]

    for j in range(3):
        close(shared("lower")[j], whole[j])
        close(shared("stepwise")[j], whole[(0, 2, 5)[j]])
        close(shared("average")[j], (whole[j] + whole[j + 3]) / 2)


def test_one_loop_without_pairs_is_the_original() -> None:
    lm = plain(head_norm=True)
    close(relax(lm, 1, None)(TOKENS), lm(TOKENS))


def test_a_converted_model_is_saved_and_loaded(tmp_path: object) -> None:
    looped = relax(plain(), 2, 4)
    save_pretrained(looped, str(tmp_path))
    assert torch.equal(from_pretrained(str(tmp_path))(TOKENS), looped.eval()(TOKENS))


def test_one_step_of_the_retrofit_is_the_model_of_the_kept_layers() -> None:
    lm = plain()
    looped = retrofit(lm, Cut(prelude=1, core=2, coda=1))
    kept = lively(llama(SHAPE.replace(layers=4)))
    kept.load_state_dict(lm.state_dict(), strict=False)
    for layer, i in zip(kept.prelude, (0, 3, 4, 5), strict=True):
        layer.load_state_dict(lm.prelude[i].state_dict())
    close(looped(TOKENS, 1), kept(TOKENS))
    # The state is not listened to yet, and the gradient says how to.
    close(looped(TOKENS, Plan(3), rng=torch.Generator().manual_seed(0)), kept(TOKENS))
    looped(TOKENS, 3)[..., 0].sum().backward()
    listens = looped.loop.inject.mix.weight.grad[:, :16]  # type: ignore[union-attr]
    assert listens.abs().max() > 0.01


def test_the_papers_adapter_is_drawn_uniformly_and_the_head_is_a_copy() -> None:
    lm = plain(tied=True)
    looped = retrofit(lm, Cut(prelude=1, core=2, coda=1), adapter="drawn")
    weight, bound = looped.loop.inject.mix.weight, 32**-0.5  # type: ignore[union-attr]
    assert 0.95 * bound < weight.abs().max() <= bound
    assert abs(weight.std() - bound / 3**0.5) < 0.1 * bound
    assert torch.equal(looped.head.weight, lm.embed.weight)
    assert looped.head.weight is not looped.embed.weight


def test_a_retrofit_starts_where_huginn_does_whatever_its_width() -> None:
    looped = retrofit(plain(), Cut(prelude=1, core=2, coda=1))
    start = looped.loop.start(torch.zeros(9, 60, 16), torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    assert abs(start.std() / 0.008703882797784892 - 1) < 0.03  # the truncation takes 1.3 %
    assert start.abs().max() <= 3 * 0.0087039


def test_the_depth_grows_with_training() -> None:
    schedule = retrofit(plain(), Cut(prelude=1, core=2, coda=1, until=0.5)).config.loop.schedule  # type: ignore[union-attr]
    rng = torch.Generator().manual_seed(0)
    means = [sum(schedule.draw(rng, 1, p).mean for _ in range(50)) / 50 for p in (0.0, 0.25, 1.0)]
    assert means[0] < 3 < means[1] < 24 < means[2]


@pytest.mark.parametrize("loops", [0, 4])
def test_layers_must_fold(loops: int) -> None:
    with pytest.raises(ValueError, match="do not fold"):
        relax(plain(), loops, None)


def test_a_cut_must_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        retrofit(plain(), Cut(prelude=3, core=3, coda=3))


def test_a_loop_is_not_looped_again() -> None:
    with pytest.raises(ValueError, match="fixed-depth"):
        relax(relax(plain(), 2, None), 2, None)
