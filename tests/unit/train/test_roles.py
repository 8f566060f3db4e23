import pytest
import torch
from torch import nn

from open_mythos.nn.moe import MoE
from open_mythos.train.roles import Role, roles


class SwiGLU(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * width, bias=False)
        self.down = nn.Linear(width, dim, bias=True)

    def matrices(self) -> dict[str, int]:
        return {"gate_up": 2}


class Experts(nn.Module):
    def __init__(self, count: int, dim: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(count, 2 * width, dim))
        self.down = nn.Parameter(torch.randn(count, dim, width))
        self.bias = nn.Parameter(torch.zeros(count))

    def matrices(self) -> dict[str, int]:
        return {"gate_up": 2, "down": 1}


class Model(nn.Module):
    def __init__(self, tied: bool, dim: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, dim)
        self.ffn = SwiGLU(dim, 6)
        self.experts = Experts(3, dim, 4)
        self.norm = nn.RMSNorm(dim)
        self.halt = nn.Linear(dim, 1)
        self.head = nn.Linear(dim, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class Declares(nn.Module):
    def __init__(self, **declared: int | tuple[int, ...]) -> None:
        super().__init__()
        self.fused = nn.Linear(4, 9)
        self.declared = declared

    def matrices(self) -> dict[str, int | tuple[int, ...]]:
        return self.declared


def test_roles_follow_the_modules() -> None:
    found = roles(Model(tied=False))
    assert found == {
        "embed.weight": Role("table"),
        "ffn.gate_up.weight": Role("matrix", 2),
        "ffn.down.weight": Role("matrix"),
        "ffn.down.bias": Role("vector"),
        "experts.gate_up": Role("matrix", 2),
        "experts.down": Role("matrix", 1),
        "experts.bias": Role("vector"),
        "norm.weight": Role("vector"),
        "halt.weight": Role("vector"),  # one row
        "halt.bias": Role("vector"),
        "head.weight": Role("head"),
    }


def test_a_tied_head_is_a_table() -> None:
    found = roles(Model(tied=True))
    assert found["embed.weight"] == Role("table")
    assert "head.weight" not in found


def test_frozen_parameters_have_no_role() -> None:
    model = Model(tied=True)
    model.experts.requires_grad_(False)
    assert not [name for name in roles(model) if name.startswith("experts")]


def test_uneven_blocks_and_opting_out() -> None:
    assert roles(Declares(fused=(4, 5)))["fused.weight"] == Role("matrix", (4, 5))
    assert roles(Declares(fused=(8, 1)))["fused.weight"] == Role("vector")
    assert roles(Declares(fused=0))["fused.weight"] == Role("vector")


@pytest.mark.parametrize("declared", [{"fused": 2}, {"fused": (4, 4)}, {"other": 1}, {"fused.bias": 1}])
def test_impossible_declarations_are_refused(declared: dict[str, int | tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="declares"):
        roles(Declares(**declared))


@pytest.mark.parametrize("shared", [0, 1])
def test_experts_of_the_core_with_and_without_shared_ones(shared: int) -> None:
    found = roles(MoE(experts=4, chosen=2, width=8, shared=shared).build(16))
    assert found["gate_up"] == Role("matrix", 2)
    assert found["router"] == Role("vector")
    assert ("shared_gate_up.weight" in found) == bool(shared)
