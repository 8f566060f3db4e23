"""Generation is the repeated uncached forward, whoever shares the batch; and it stops where it can."""

import numpy as np
import pytest
import torch

from open_mythos.infer.generate import Emitted, generate, stream
from open_mythos.infer.sample import Sampling
from open_mythos.loop.exit import Confidence, ReadoutChange, StateChange, Steps
from open_mythos.loop.schedule import Plan
from open_mythos.nn.cache import Deepest, LastExited, PerLoop, Ring, Shared
from open_mythos.nn.context import Context
from tests import tiny
from tests.lively import lively, work_of

MODELS = tiny.MODELS | tiny.ROUTED
LOOPED = [name for name, config in MODELS.items() if config.loop is not None]
PROMPTS = [[1, 2, 3, 4], [7], [9, 8, 7, 6, 5, 4]]
CHANGE = StateChange(threshold=0.6)
WARM = Sampling(temperature=1.0, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.3, seed=3)


@torch.no_grad()
def repeated_forward(model, prompt, count, loops=None, rule=None):
    """The definition: the whole sequence again for every token, the likeliest one each time."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), loops, exit=rule)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_is_the_repeated_forward(name):
    model, loops = lively(MODELS[name]), [2, 3, 5] if name in LOOPED else None
    got = generate(model, PROMPTS, max_new_tokens=4, loops=loops)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, got, strict=True)):
        depth = loops[row] if isinstance(loops, list) else loops
        assert completion.tokens == repeated_forward(model, prompt, 4, depth)
        assert completion.finish == "length"


@torch.no_grad()
def warmly_repeated_forward(model, prompt, count, loops):
    """The whole sequence again, every token from where it began when it was new."""
    tokens = torch.tensor([prompt])
    starts = model.encode(tokens, Context.counting(tokens)).h
    for _ in range(count):
        ctx = Context.counting(tokens)
        state = model.loop(model.encode(tokens, ctx, start=starts), ctx, Plan(loops))
        best = model.read(state, ctx)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], 1)
        starts = torch.cat([starts, model.between(state.answer[:, -1:])], 1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", LOOPED)
def test_a_warm_start_is_where_the_token_before_ended(name):
    model = lively(MODELS[name])
    warm = generate(model, PROMPTS, max_new_tokens=4, loops=[2, 3, 5], warm=True)
    for prompt, loops, completion in zip(PROMPTS, [2, 3, 5], warm, strict=True):
        assert completion.tokens == warmly_repeated_forward(model, prompt, 4, loops)
    # The prompt is read as ever, under an exit rule too.
    rule = {"loops": 5, "exit": Steps(steps=5), "policy": PerLoop(), "warm": True}
    assert generate(model, PROMPTS[2:], max_new_tokens=4, **rule)[0].tokens == warm[2].tokens


def test_a_warm_start_shows_and_goes_with_its_row():
    model = lively(MODELS["huginn"])
    options = {"max_new_tokens": 12, "loops": 1, "warm": True}
    warm = generate(model, PROMPTS, **options)
    assert warm != generate(model, PROMPTS, **options | {"warm": False})
    first = warm[0].tokens[2]  # ends a row, and the others go on
    for row, completion in enumerate(generate(model, PROMPTS, eos=first, **options)):
        assert completion.tokens == warm[row].tokens[: len(completion.tokens)]


class OnlyFrom:
    """An exit rule for the tokens of a sequence from `first` on."""

    def enough(self, before, after, *rest):
        return super().enough(before, after, *rest) & (torch.arange(after.left.shape[1]) >= self.first)


class LateStateChange(OnlyFrom, StateChange):
    first: int


class LateConfidence(OnlyFrom, Confidence):
    first: int


@pytest.mark.parametrize("name", LOOPED)
def test_under_an_exit_rule_with_an_exact_cache_too(name):
    """The prompt but its last token is read at full depth."""
    model = lively(MODELS[name])
    got = generate(model, PROMPTS, max_new_tokens=3, loops=[4, 6, 5], exit=CHANGE, policy=PerLoop())
    for prompt, depth, completion in zip(PROMPTS, [4, 6, 5], got, strict=True):
        rule = LateStateChange(first=len(prompt) - 1, **vars(CHANGE))
        assert completion.tokens == repeated_forward(model, prompt, 3, depth, rule)


@pytest.mark.parametrize("name", [name for name in LOOPED if not MODELS[name].coda])
def test_under_a_rule_on_the_readout_too(name):
    """Without a coda, where the readout of a token does not depend on how far the others are."""
    model = lively(MODELS[name])
    sure = Confidence(entropy=2.5)
    got = generate(model, PROMPTS, max_new_tokens=5, exit=sure, policy=PerLoop())
    for completion, prompt in zip(got, PROMPTS, strict=True):
        rule = LateConfidence(first=len(prompt) - 1, **vars(sure))
        assert completion.tokens == repeated_forward(model, prompt, 5, None, rule)


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, None) for name in LOOPED), *(("huginn", policy) for policy in (Shared(), Ring(slots=2)))],
    ids=str,
)
def test_a_row_ignores_its_neighbours(name, policy):
    model = lively(MODELS[name])
    options = {"max_new_tokens": 3, "sampling": WARM, "exit": CHANGE, "policy": policy}
    together = generate(model, PROMPTS, loops=[3, 5, 2], **options)
    others = generate(model, [PROMPTS[0], [33, 12, 50], [2]], loops=[3, 1, 7], **options)
    alone = generate(model, [PROMPTS[0]], loops=3, **options)
    assert together[0] == others[0] == alone[0]


def test_equal_prompts_draw_differently_and_a_longer_request_begins_the_same():
    model = lively(MODELS["huginn"])
    drawn = generate(model, [[5, 6]] * 4, max_new_tokens=6, sampling=WARM)
    assert len({tuple(completion.tokens) for completion in drawn}) > 1
    longer = generate(model, [[5, 6]] * 4, max_new_tokens=9, sampling=WARM)
    assert [c.tokens[:6] for c in longer] == [c.tokens for c in drawn]


@pytest.mark.parametrize("name", [name for name in LOOPED if name not in tiny.ROUTED])
def test_rows_that_left_the_loop_compute_nothing(name):
    """Beyond the prompts, the work done is the sum of the steps reported.

    (Where tokens choose their depth, one that declines a step is computed and hidden.)
    """
    model = lively(MODELS[name])
    options = {"loops": 8, "exit": StateChange(threshold=0.6, least=1)}
    with work_of(model) as first:
        begun = generate(model, PROMPTS, max_new_tokens=1, **options)
    with work_of(model) as work:
        made = generate(model, PROMPTS, max_new_tokens=3, **options)
    reading = sum(first) - sum(completion.steps[0] for completion in begun)
    assert sum(work) - reading == sum(sum(completion.steps) for completion in made)


@pytest.mark.parametrize("name", LOOPED)
def test_a_prescribed_exit_is_that_many_loops(name):
    """From a prompt of one token, so that nothing is read at full depth."""
    model, ones = lively(MODELS[name]), [[4], [7], [50]]
    for policy in (PerLoop(), LastExited()):
        want = generate(model, ones, max_new_tokens=4, loops=2, policy=policy)
        assert generate(model, ones, max_new_tokens=4, loops=5, exit=Steps(steps=2), policy=policy) == want


def test_what_ends_a_row():
    model = lively(MODELS["ouro"])
    free = [completion.tokens for completion in generate(model, PROMPTS, max_new_tokens=8)]
    eos, pair = free[0][2], free[1][3:5]
    got = generate(model, PROMPTS, max_new_tokens=8, eos=eos, stop=[pair])
    for row, completion in enumerate(got):
        ends = [i for i, token in enumerate(free[row]) if token == eos or free[row][i - 1 : i + 1] == pair]
        assert completion.tokens == free[row][: ends[0] + 1 if ends else 8]
    assert got[0].finish == "eos"
    assert got[1].finish in ("stop", "eos")
    assert [len(c.steps) == len(c.tokens) for c in got] == [True] * 3


def test_finished_rows_leave_the_batch():
    model = lively(MODELS["ouro"])
    first = generate(model, PROMPTS, max_new_tokens=1)[0].tokens[0]
    with work_of(model) as everyone:
        generate(model, PROMPTS, max_new_tokens=8)
    with work_of(model) as fewer:
        generate(model, PROMPTS, max_new_tokens=8, eos=first)
    assert sum(fewer) <= sum(everyone) - 7 * model.steps


@pytest.mark.parametrize("at_once", [3, 50])
def test_looking_seldom_changes_nothing(at_once):
    model = lively(MODELS["parcae"])
    options = {"max_new_tokens": 9, "sampling": WARM, "eos": range(0, 61, 9), "loops": [2, 3, 4]}
    assert generate(model, PROMPTS, at_once=at_once, **options) == generate(model, PROMPTS, **options)


def test_a_stream_is_the_same_tokens_in_order():
    model = lively(MODELS["mythos-mla"])
    seen: list[Emitted] = []
    whole = generate(model, PROMPTS, max_new_tokens=4, on_token=seen.append)
    assert list(stream(model, PROMPTS, max_new_tokens=4)) == seen
    assert [e.row for e in seen] == [0, 1, 2] * 4
    assert [[e.token for e in seen if e.row == row] for row in range(3)] == [c.tokens for c in whole]
    assert [e.finish for e in seen] == [None] * 9 + ["length"] * 3


def test_a_stream_left_halfway_puts_the_model_back():
    model = lively(MODELS["huginn"]).train()
    tokens = stream(model, PROMPTS, max_new_tokens=4)
    next(tokens)
    assert not model.training
    tokens.close()
    assert model.training


def test_a_padded_tensor_with_a_mask_is_the_list_of_its_rows():
    model = lively(MODELS["universal"])
    want = generate(model, PROMPTS, max_new_tokens=4)
    left, right = torch.full((3, 6), 60), torch.full((3, 6), 60)
    for row, prompt in enumerate(PROMPTS):
        left[row, 6 - len(prompt) :] = right[row, : len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([[4], [1], [6]])
    assert generate(model, right, mask=(torch.arange(6) < lengths).long(), max_new_tokens=4) == want
    assert generate(model, left, mask=(torch.arange(6) >= 6 - lengths).long(), max_new_tokens=4) == want


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_generates(name):
    model = lively(MODELS[name]).bfloat16()
    rule = ReadoutChange() if name in LOOPED else None
    for completion in generate(model, PROMPTS, max_new_tokens=3, sampling=WARM, exit=rule):
        assert len(completion.tokens) == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 61]]}, "token 61 of prompt 0 is outside the vocabulary of 0 to 60"),
        ({"prompts": [[-1]]}, "token -1"),
        ({"prompts": [[1] * 29]}, "29 tokens; with 5 new ones that is more than the model's context of 32"),
        ({"max_new_tokens": 0}, "max_new_tokens should be at least 1, got 0"),
        ({"loops": 0}, "at least one step, got loops=0"),
        ({"loops": [1, 2, 3]}, "3 depths for 1 prompts"),
        ({"stop": [[]]}, "stop sequence"),
        ({"mask": torch.ones(1, 2, dtype=torch.long)}, "mask goes with prompts in a tensor"),
    ],
)
def test_bad_requests_are_refused_before_any_work(changes, sentence):
    model = lively(MODELS["huginn"].replace(context=32))
    given = {"prompts": [[1, 2]], "max_new_tokens": 5} | changes
    with work_of(model) as work, pytest.raises(ValueError, match=sentence):
        generate(model, given.pop("prompts"), **given)
    assert not work


def test_the_last_new_token_needs_no_room():
    """It is never read, so a context of n tokens has room for n + 1."""
    model = lively(MODELS["huginn"].replace(context=8))
    (completion,) = generate(model, [[1, 2, 3]], max_new_tokens=6, sampling=Sampling(temperature=0))
    assert len(completion.tokens) == 6


def test_numbers_of_numpy_and_torch():
    model = lively(MODELS["huginn"])
    plain, *others = (
        generate(model, [[1, 2]], max_new_tokens=4, loops=loops, eos=eos, sampling=Sampling(temperature=0))
        for loops, eos in (
            (2, 3),
            (np.int64(2), np.int64(3)),
            (torch.tensor(2), torch.tensor(3)),
            (torch.tensor([2]), iter([3])),
            (np.array([2]), {3}),
        )
    )
    assert all(other == plain for other in others)


def test_a_model_without_a_loop_says_so():
    model = lively(MODELS["fixed-depth"])
    with pytest.raises(ValueError, match="without a loop"):
        generate(model, PROMPTS, max_new_tokens=2, loops=3)
    with pytest.raises(ValueError, match="no loop"):
        generate(model, PROMPTS, max_new_tokens=2, exit=Steps(steps=1))
    with pytest.raises(ValueError, match="leave warm out"):
        generate(model, PROMPTS, max_new_tokens=2, warm=True)
    assert generate(model, PROMPTS, max_new_tokens=2)[0].steps == [0, 0]


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # in PyTorch's own imports
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in MODELS),
        *((name, {"exit": CHANGE}) for name in ("mythos-mla-act", "huginn", "recursions-shared")),
        ("mythos-gqa-act", {"exit": Steps(steps=2), "policy": Ring(slots=2)}),
        ("huginn", {"policy": Shared(), "warm": True}),
        ("ngrams", {"policy": Deepest()}),
    ],
    ids=str,
)
def test_the_verbs_to_compile_remember_as_the_plain_ones(name, options):
    """Here run as they are; that they can be compiled: tests/unit/infer/test_compiled.py."""
    model = lively(MODELS[name])
    given = {"max_new_tokens": 6, "sampling": WARM, "eos": range(0, 61, 5)} | options
    with torch.compiler.set_stance("force_eager"):
        for prompts, loops in ((PROMPTS, [2, 3, 5]), ([[7]], 4)):
            asked = given | ({"loops": loops} if name in LOOPED else {})
            assert generate(model, prompts, compile=True, **asked) == generate(model, prompts, **asked)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MODELS)
def test_on_an_accelerator_the_same(name):
    model = lively(MODELS[name])
    here = generate(model, PROMPTS, max_new_tokens=6)
    there = generate(model.cuda(), PROMPTS, max_new_tokens=6, eos=[])
    assert [c.tokens for c in there] == [c.tokens for c in here]
