"""At threshold one, drafting changes nothing but the work: the text is greedy generation's at full depth."""

import pytest

from open_mythos.infer.generate import generate
from open_mythos.infer.speculate import speculate
from tests import tiny
from tests.lively import lively

MODELS = tiny.MODELS | tiny.ROUTED
LOOPED = [name for name, config in MODELS.items() if config.loop is not None]
PROMPT = [5, 17, 3, 40]


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize(("draft_loops", "lookahead"), [(1, 3), (4, 5)])
def test_the_text_is_that_of_greedy_generation(name: str, draft_loops: int, lookahead: int) -> None:
    model = lively(MODELS[name])
    want = generate(model, [PROMPT], max_new_tokens=6, loops=4)[0].tokens
    got = speculate(model, PROMPT, max_new_tokens=6, loops=4, draft_loops=draft_loops, lookahead=lookahead)
    assert got.tokens == want
    if draft_loops == 4:  # it agrees with itself
        assert got.kept == got.drafted == 5
    assert got.calls <= 5


def test_a_lower_threshold_lets_more_drafts_pass() -> None:
    model = lively(MODELS["huginn"])
    options = {"max_new_tokens": 24, "loops": 5, "draft_loops": 1, "lookahead": 4}
    strict, loose = (speculate(model, PROMPT, threshold=t, **options) for t in (1.0, 1e-6))
    assert strict.kept < strict.drafted
    assert loose.kept == loose.drafted
    assert len(strict.tokens) == len(loose.tokens) == 24


def test_it_stops_at_the_end_of_text() -> None:
    model = lively(MODELS["huginn"])
    whole = speculate(model, PROMPT, max_new_tokens=12, loops=4, draft_loops=2).tokens
    cut = speculate(model, PROMPT, max_new_tokens=12, loops=4, draft_loops=2, eos=[whole[5]]).tokens
    assert cut == whole[: whole.index(whole[5]) + 1]


def test_it_leaves_the_model_in_the_mode_it_was_in() -> None:
    model = lively(MODELS["huginn"])
    for training in (True, False):
        speculate(model.train(training), PROMPT, max_new_tokens=3, draft_loops=1)
        assert model.training is training


def test_the_last_token_needs_no_place_in_the_context() -> None:
    model = lively(MODELS["huginn"].replace(context=9))
    options = {"max_new_tokens": 6, "loops": 4}
    want = generate(model, [PROMPT], **options)[0].tokens
    assert speculate(model, PROMPT, draft_loops=2, **options).tokens == want
    with pytest.raises(ValueError, match="4 tokens and 7 new ones do not fit the context of 9"):
        speculate(model, PROMPT, max_new_tokens=7, loops=4, draft_loops=2)


def test_bad_requests_are_told() -> None:
    with pytest.raises(ValueError, match="shallower self"):
        speculate(MODELS["fixed-depth"].build(), PROMPT, max_new_tokens=2, draft_loops=1)
    model = MODELS["huginn"].build()
    with pytest.raises(ValueError, match="empty"):
        speculate(model, [], max_new_tokens=2, draft_loops=1)
    with pytest.raises(ValueError, match="threshold is in"):
        speculate(model, PROMPT, max_new_tokens=2, draft_loops=1, threshold=2.0)
    with pytest.raises(ValueError, match="context"):
        speculate(model, PROMPT, max_new_tokens=2_000_000, draft_loops=1)
