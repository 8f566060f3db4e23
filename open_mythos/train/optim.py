"""Which optimiser updates what: parameter groups by role, and one object for the whole run.

AdamW       everything by AdamW; decay on matrices and an untied head only
            Loshchilov and Hutter 2019, arXiv 1711.05101
MuonAdamW   matrices by Muon, tables, head and vectors by AdamW    Jordan 2024; Parcae 2026, arXiv 2604.12946
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.config import Config
from open_mythos.train.muon import Muon
from open_mythos.train.parallel import spread_like
from open_mythos.train.roles import Kind, Role, roles

FUSED = ("cpu", "cuda", "mps", "xpu")


class AdamW(Config):
    """AdamW by role. Each role's learning rate is `lr` times its scale."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    table_scale: float = 1.0
    head_scale: float = 1.0
    vector_scale: float = 1.0
    decay_all: bool = False  # tables and vectors too, as the script of the original OpenMythos does

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"a learning rate is not negative, got AdamW.lr={self.lr}")

    def build(self, model: nn.Module) -> "Optimizer":
        """Raises `ValueError` for a model without trainable parameters."""
        named = _trainable(model)
        return Optimizer([self.over(model, list(named))], named)

    def over(self, model: nn.Module, names: Sequence[str]) -> torch.optim.Optimizer:
        """torch's AdamW over some parameters of `model`, one group per role."""
        named, kinds = dict(model.named_parameters()), roles(model)
        groups = [
            {
                "params": [named[name] for name in names if kinds[name].kind == kind],
                "lr": self.lr * scale,
                "weight_decay": self.weight_decay if self.decay_all or kind in ("matrix", "head") else 0.0,
            }
            for kind, scale in self._scales().items()
        ]
        fused = all(named[name].device.type in FUSED for name in names)
        kept = [group for group in groups if group["params"]]
        return torch.optim.AdamW(kept, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=fused)

    def _scales(self) -> dict[Kind, float]:
        return {
            "matrix": 1.0,
            "table": self.table_scale,
            "head": self.head_scale,
            "vector": self.vector_scale,
        }


class MuonAdamW(Config):
    """Muon where there is something to orthogonalise, AdamW elsewhere."""

    muon: Muon = Muon()
    adamw: AdamW = AdamW(lr=3e-3, beta1=0.8, eps=1e-10, weight_decay=0.0)

    def build(self, model: nn.Module) -> "Optimizer":
        """Raises `ValueError` for a model without trainable parameters."""
        named, kinds = _trainable(model), roles(model)
        matrices = [(named[name], role.blocks) for name, role in kinds.items() if _is_matrix(role)]
        others = [name for name, role in kinds.items() if not _is_matrix(role)]
        parts = [self.muon.build(matrices)] if matrices else []
        return Optimizer([*parts, self.adamw.over(model, others)] if others else parts, named)


class Optimizer:
    """All optimisers of a run as one. Its state is tensors by parameter name, and the count of steps."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer], named: Mapping[str, nn.Parameter]) -> None:
        self.parts = tuple(parts)
        self.named = dict(named)
        self.steps = 0
        for group in self.param_groups:
            group["full_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def scale_lr(self, factor: float) -> None:
        """Set every learning rate to `factor` times its configured value, for the steps to come."""
        for group in self.param_groups:
            group["lr"] = group["full_lr"] * factor

    def step(self) -> None:
        for part in self.parts:
            part.step()
        self.steps += 1

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """{"steps": int, "state": {parameter name: {entry: Tensor}}}; the tensors are the live ones.

        Learning rates and the like are not in it: they are the config's to say.
        """
        held = {
            name: part.state[p] for part in self.parts for name, p in self.named.items() if p in part.state
        }
        return {"steps": self.steps, "state": {name: dict(entries) for name, entries in held.items()}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over a copy of a saved state.

        Raises `ValueError` if it names a parameter that is not here, or has another shape.
        """
        state: Mapping[str, Mapping[str, Tensor]] = saved["state"]
        for name, entries in state.items():
            self._check(name, entries)
        for part in self.parts:
            self._fill(part, state)
        self.steps = saved["steps"]
        for group in self.param_groups:
            if "steps" in group:
                group["steps"] = self.steps

    def _check(self, name: str, entries: Mapping[str, Tensor]) -> None:
        if name not in self.named:
            raise ValueError(
                f"the optimizer state is for a parameter {name!r}, which this model does not train"
            )
        shape = self.named[name].shape
        for entry, value in entries.items():
            if value.ndim and value.shape != shape:
                raise ValueError(
                    f"the optimizer state {name}.{entry} has shape {tuple(value.shape)}, "
                    f"the parameter has {tuple(shape)}"
                )

    def _fill(self, part: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Hand over by torch's own numbering, which is the order of the groups."""
        names = {parameter: name for name, parameter in self.named.items()}
        ordered = [parameter for group in part.param_groups for parameter in group["params"]]
        numbered = {
            i: {entry: spread_like(parameter, value) for entry, value in state[names[parameter]].items()}
            for i, parameter in enumerate(ordered)
            if names[parameter] in state
        }
        part.load_state_dict(part.state_dict() | {"state": numbered})


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient, so nothing to optimise"
        )
    return named


def _is_matrix(role: Role) -> bool:
    return role.kind == "matrix"


Optimiser = MuonAdamW | AdamW
