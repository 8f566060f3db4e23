"""A config survives JSON, takes overrides, and its errors say what would have worked."""

import json
from pathlib import Path
from typing import get_args

import pytest

from open_mythos.config import Config
from open_mythos.loop import exit  # noqa: A004
from open_mythos.loop.core import Loop
from open_mythos.loop.halt import ACT, Last, UniversalACT
from open_mythos.loop.mark import PositionStep, StepTable
from open_mythos.model import Model
from open_mythos.nn.attention import GQA, MLA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import MLP
from open_mythos.nn.moe import MoE
from open_mythos.nn.rope import Interpolated
from tests.zoo import EVERY, LOOPED, parts

PARCAE = EVERY["parcae"]


@pytest.mark.parametrize("name", EVERY)
def test_survives_json(name: str, tmp_path: Path) -> None:
    config = EVERY[name]
    for part in parts(config):
        again = type(part).from_dict(json.loads(json.dumps(part.to_dict())))
        assert again == part
        assert hash(again) == hash(part)
    config.save(tmp_path / "config.json")
    assert Model.load(tmp_path / "config.json") == config


@pytest.mark.parametrize("name", LOOPED)
def test_overrides(name: str) -> None:
    config = EVERY[name]
    other = config.override(
        'loop.halt={"is": "ACT", "threshold": 0.75}', "loop.halt.threshold=0.5", "tied=false"
    )
    assert other.loop == config.loop.replace(halt=ACT(threshold=0.5))
    assert not other.tied
    assert other.override(f"tied={json.dumps(config.tied)}", 'loop.halt={"is": "Last"}') == config.replace(
        loop=config.loop.replace(halt=Last())
    )
    assert config.override() == config
    assert other.override("loop.halt=Last").loop.halt == Last()


def test_overrides_reach_into_tuples() -> None:
    one = PARCAE.override("loop.layers.1.ffn.width=8").loop
    assert [layer.ffn.width for layer in one.layers] == [128, 8]
    both = PARCAE.override("loop.layers.*.ffn.width=8", "loop.layers.*.mixer.rope=null").loop
    assert [layer.ffn.width for layer in both.layers] == [8, 8]
    assert [layer.mixer.rope for layer in both.layers] == [None, None]
    assert PARCAE.override("prelude=[]").prelude == ()


def test_the_original_stays() -> None:
    before = PARCAE.to_dict()
    PARCAE.override("loop.layers.*.ffn.width=8")
    assert PARCAE.to_dict() == before
    with pytest.raises(AttributeError):
        PARCAE.dim = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("loop.inject=Diagnal", "Loop.inject should be Nothing or Add or .*, got 'Diagnal'"),
        ("loop.halt=Loop", "Loop.halt should be Last or ACT or .*, got 'Loop'"),
        ("loop.layers.0.mixer=GQA", "GQA needs heads"),
        ("loop.inject.is=Diagnal", "Loop.inject cannot be 'Diagnal'; it can be Nothing, Add"),
        ('loop={"is": "GQA"}', "Model.loop cannot be 'GQA'; it can be Loop"),
        ("dimm=3", "there is no 'dimm'; did you mean 'dim'"),
        ("loop.qqqq=3", "there is no 'qqqq'; it has layers, start"),
        ("loop.layers.2.ffn.width=8", r"'2' should be \* or an item number below 2"),
        ("dim", "should look like path.to.field=value"),
        ("dim=wide", "Model.dim should be int, got 'wide'"),
        ("dim=true", "Model.dim should be int, got True"),
        ("dim=1.5", "Model.dim should be int, got 1.5"),
        ("dim=[1]", "Model.dim should be int, got the list"),
        ("tied=1", "Model.tied should be bool, got 1"),
        ("dim.x=1", "there is no 'x'"),
        ("loop.schedule.per=batches", "per should be 'batch' or 'sequence', got 'batches'"),
        ("dim=0", "Model.dim must be at least 1, got 0"),
        ("loop.schedule.mean=0", "at least one step"),
        ("loop.schedule.grad=0", "at least one step must carry gradient, got grad=0"),
    ],
)
def test_errors_teach(assignment: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PARCAE.override(assignment)


def test_from_dict_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="GQA needs heads"):
        GQA.from_dict({})
    with pytest.raises(ValueError, match="GQA has no field 'head'; did you mean 'heads'"):
        GQA.from_dict({"head": 3})
    assert ACT.from_dict({"threshold": 1}).threshold == 1.0


def test_a_file_that_holds_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="cannot read a Model"):
        Model.load(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="should hold a JSON object"):
        Model.load(path)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: GQA(heads=4, kv_heads=3), "heads must be a multiple of kv_heads, got 4 and 3"),
        (lambda: GQA(heads=5).build(32), "dim=32 is no multiple of heads=5; set head_dim"),
        (lambda: GQA(heads=3, head_dim=5).build(32), "head_dim=5 is not even"),
        (lambda: MLA(heads=2, q_rank=0, kv_rank=1, rope_dim=2, nope_dim=2, value_dim=2), "q_rank must be"),
        (lambda: MLA(heads=2, q_rank=1, kv_rank=1, rope_dim=3, nope_dim=2, value_dim=2), "must be even"),
        (lambda: MoE(experts=4, chosen=5, width=8), "each token can choose 1 to 4 experts, got chosen=5"),
        (lambda: MoE(experts=0, chosen=1, width=8), "experts and width of at least 1"),
        (lambda: Loop(layers=()), "a loop needs at least one layer"),
        (lambda: ACT(threshold=0.0), r"the halting threshold lies in \(0, 1\], got 0.0"),
        (lambda: EVERY["huginn"].replace(norm=None), "leave=FinalNorm uses the model's last norm"),
        (
            lambda: PreNorm.from_dict({"mixer": {"heads": 4}, "ffn": {"is": "MLP"}}),
            "cannot be None; it can be GQA",
        ),
        (lambda: MoE(experts=4, chosen=2, width=8, shared_width=0), "MoE.shared_width must be .* got 0"),
        (lambda: GQA(heads=4, head_dim=0), "GQA.head_dim must be at least 1, got 0"),
        (lambda: GQA(heads=4, kv_heads=0), "multiple of kv_heads, got 4 and 0"),
        (lambda: MLP(width=0), "MLP.width must be at least 1, got 0"),
        (lambda: Interpolated(factor=0.0), "Interpolated.factor must be above 0, got 0.0"),
        (lambda: StepTable(steps=0), "StepTable.steps must be at least 1, got 0"),
        (lambda: PositionStep(steps=0), "PositionStep.steps must be at least 1, got 0"),
        (lambda: UniversalACT(epsilon=0.0), r"UniversalACT.epsilon lies in \(0, 1\), got 0.0"),
        (lambda: UniversalACT(epsilon=1.0), r"UniversalACT.epsilon lies in \(0, 1\), got 1.0"),
        (lambda: exit.Steps(steps=0), "Steps.steps must be at least 1, got 0"),
        (lambda: exit.SameToken(times=0), "SameToken.times must be at least 1, got 0"),
    ],
)
def test_impossible_choices(build: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build()  # type: ignore[operator]


@pytest.mark.parametrize("rule", get_args(exit.Exit))
@pytest.mark.parametrize("name", ["least", "every"])
def test_exit_rules_take_at_least_one_step_and_count_in_steps(rule: type[Config], name: str) -> None:
    needed = {"steps": 3} if rule is exit.Steps else {}
    assert getattr(rule(**needed, **{name: 1}), name) == 1
    with pytest.raises(ValueError, match=f"{rule.__name__}.{name} must be at least 1, got 0"):
        rule(**needed, **{name: 0})
