"""What an objective asks of the model: learned exits, against their definition and in small trainings."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from open_mythos.loop.halt import ExitGate
from open_mythos.loop.schedule import Fixed, Plan, seeded
from open_mythos.loop.state import State
from open_mythos.nn.context import Context
from open_mythos.train.load import saved_weights
from open_mythos.train.metrics import read_rows
from open_mythos.train.objective import Objective
from open_mythos.train.readout import Geometric, LearnedExit, TaughtExit, Uniform
from open_mythos.train.recipe import Recipe
from open_mythos.train.regularise import jacobian_secant, loop_similarity, norm_drift
from tests.system import toy
from tests.tiny import MODELS, VOCAB

N = 3


def given() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, VOCAB, (2, 7)), torch.randint(0, VOCAB, (2, 7))


@pytest.mark.parametrize("threshold", [1.0, 0.5])
@pytest.mark.parametrize("prior", [Uniform(), Geometric(ratio=0.8)])
def test_exits_are_learned_from_a_run_of_each_depth(prior: Uniform | Geometric, threshold: float) -> None:
    """The slow way: a model without a gate run once to every depth, all logits, exits by their products."""
    model = MODELS["ouro"].override(f"loop.halt.threshold={threshold}").build()
    torch.nn.init.normal_(model.loop.halt.score.weight)  # some tokens leave early
    tokens, targets = given()
    objective = Objective(readout=LearnedExit(prior=prior, beta=0.1))
    scored = objective.score(model, [targets], Plan(N), Context.counting(tokens))
    plain = MODELS["ouro"].override('loop.halt={"is": "Last"}').build()
    plain.load_state_dict(model.state_dict(), strict=False)
    total, left, steps = torch.zeros(2, 7), torch.ones(2, 7), torch.zeros(2, 7)
    logs = prior.over(N).log()
    for n in range(N):
        h = plain.features(tokens, Plan(n + 1))
        gate = model.loop.halt.logits(h).sigmoid()
        p = left * gate if n < N - 1 else left
        left = left - p
        entropy = F.cross_entropy(plain.head(h).mT, targets, reduction="none")
        total = total + p * (entropy + 0.1 * (p.log() - logs[n]))
        steps = steps + (n + 1) * p
    assert_close(scored.total, total.sum())
    assert_close(scored.exit_step, steps.sum())
    shared = [p for name, p in plain.named_parameters()]
    theirs = torch.autograd.grad(total.sum(), [*shared, model.loop.halt.score.weight])
    ours = dict(model.named_parameters())
    names = [name for name, _ in plain.named_parameters()]
    mine = torch.autograd.grad(scored.total, [*(ours[name] for name in names), model.loop.halt.score.weight])
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_taught_exit_moves_the_gate_alone() -> None:
    model = MODELS["ouro"].build()
    tokens, targets = given()
    scored = Objective(readout=TaughtExit()).score(model, [targets], Plan(N), Context.counting(tokens))
    scored.total.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "loop.halt.score.weight", "loop.halt.score.bias",
    }  # fmt: skip
    assert not scored.tally.loads


def test_what_cannot_learn_to_exit_says_what_is_missing() -> None:
    tokens, targets = given()
    ctx = Context.counting(tokens)
    learn = Objective(readout=LearnedExit())
    with pytest.raises(ValueError, match=r"model\.loop\.halt=.*ExitGate"):
        learn.score(MODELS["huginn"].build(), [targets], Plan(N), ctx)
    with pytest.raises(ValueError, match="every step needs gradient"):
        learn.score(MODELS["ouro"].build(), [targets], Plan(N, 1), ctx)
    with pytest.raises(ValueError, match="per='batch'"):
        learn.score(MODELS["ouro"].build(), [targets], Plan((1, 2)), ctx)


def recipe(folder: Path, *overrides: str) -> Recipe:
    made = toy.recipe(folder, steps=30, save_every=30)
    loop = made.model.loop.replace(halt=ExitGate(), schedule=Fixed(steps=3))
    return made.replace(model=made.model.replace(loop=loop)).override(*overrides)


def test_trainings_that_learn_to_leave(tmp_path: Path) -> None:
    """Ouro's first stage, its second from there, and PonderNet: a lower loss, and a gate that moved."""
    one = 'objective.readout={"is": "LearnedExit", "beta": 0.05}'
    two = 'objective.readout={"is": "TaughtExit"}'
    early = 'objective.readout={"is": "LearnedExit", "beta": 0.5, "prior": {"is": "Geometric", "ratio": 0.1}}'
    first = rows(recipe(tmp_path, one), tmp_path / "one")
    second = rows(recipe(tmp_path, two, f"weights={tmp_path / 'one'}"), tmp_path / "two")
    ponder = rows(recipe(tmp_path, early), tmp_path / "ponder")
    for run in (first, ponder):
        assert run[-1]["loss"] < 0.8 * run[0]["loss"]
    assert ponder[-1]["exit_step"] < first[-1]["exit_step"] - 0.2
    assert abs(second[-1]["exit_step"] - second[0]["exit_step"]) > 0.1
    assert second[0]["loss"] == pytest.approx(first[-1]["loss"], rel=0.3)
    ours, theirs = (saved_weights(tmp_path / name) for name in ("one", "two"))
    moved = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert moved == {"loop.halt.score.weight", "loop.halt.score.bias"}


def rows(recipe: Recipe, folder: Path) -> list[dict[str, float]]:
    toy.train(recipe, folder)
    return read_rows(folder / "metrics.jsonl")


def test_what_shapes_the_loop_is_added_to_the_loss() -> None:
    """By the regularisers' own functions, of the states that a watcher sees; so is the gradient."""
    model = MODELS["parcae"].build()
    tokens, targets = given()
    ctx = Context.counting(tokens)
    states: list[State] = []
    model.features(tokens, Plan(N), rng=seeded(1), watch=lambda _, state: states.append(state))
    plain = Objective().score(model, [targets], Plan(N), ctx, seeded(1)).total
    at, last = torch.full((2,), N - 1), torch.ones(2, dtype=torch.bool)

    def step(h: torch.Tensor) -> torch.Tensor:
        return model.step(State.begin(states[-1].e.detach(), h), ctx.turn(at, [N - 1] * 2), at, last).h

    rng = seeded(1)
    model.features(tokens, Plan(N), rng=rng)  # draws the start, as the objective does before its probe
    asked = {
        "drift": norm_drift(states[0].h, states[-1].h),
        "jacobian": jacobian_secant(step, states[-1].h, rng),
    }
    weights = list(model.loop.layers.parameters())
    for name, value in asked.items():
        scored = Objective.from_dict(Objective().to_dict() | {name: 0.3})
        total = scored.score(model, [targets], Plan(N), ctx, seeded(1)).total
        assert_close(total, plain + 0.3 * value * targets.numel(), atol=1e-4, rtol=1e-5)
        mine, theirs = (torch.autograd.grad(x, weights, retain_graph=True) for x in (total - plain, value))
        for a, b in zip(mine, theirs, strict=True):
            assert_close(a, 0.3 * targets.numel() * b, atol=1e-3, rtol=1e-2)


def test_alike_layers_are_rewarded() -> None:
    model = MODELS["fixed-depth"].build()
    tokens, targets = given()
    layers, objective = [*model.prelude, *model.coda], Objective(similarity=10.0)
    plain, total = (
        one.score(model, [targets], Plan(1), Context.counting(tokens)).total
        for one in (Objective(), objective)
    )
    assert_close(total, plain - 10 * loop_similarity(layers, 1) * targets.numel())


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("parcae", {"similarity": 1.0}, "do not loop"),
        ("fixed-depth", {"drift": 1.0}, "there is none"),
        ("fixed-depth", {"jacobian": 1.0}, "there is none"),
    ],
)
def test_nothing_to_shape(name: str, asked: dict[str, float], words: str) -> None:
    tokens, targets = given()
    with pytest.raises(ValueError, match=words):
        Objective(**asked).score(MODELS[name].build(), [targets], Plan(1), Context.counting(tokens))


def test_shaping_every_step_needs_one_depth() -> None:
    tokens, targets = given()
    with pytest.raises(ValueError, match="one depth"):
        Objective(drift=1.0).score(
            MODELS["parcae"].build(), [targets], Plan((1, 2)), Context.counting(tokens)
        )
