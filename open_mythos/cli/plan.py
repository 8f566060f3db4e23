"""`mythos plan`: memory, speed, days and cost of training a model on a cluster, before renting it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from open_mythos.analysis.plan import Forecast, Gpu, Mesh
    from open_mythos.model import Model


@dataclass(frozen=True)
class Options:
    """Plan the training of a model: `mythos plan mythos_1t --mesh 512 --tokens 30e9 --mfu 0.4 --gpu h100`.

    Nothing is built but shapes, so a laptop plans for a trillion parameters.
    """

    model: tyro.conf.Positional[str]
    """A model or recipe by name, a folder with config.json, or a JSON file."""

    mesh: str = "8"
    """GPUs, or data x expert parallelism as in 8x64 (expert_parallel=64 on 512 GPUs)."""

    tokens: float = 30e9
    """Tokens to train on."""

    mfu: float = 0.4
    """The share of the GPU's peak that is put to use."""

    gpu: str = "h100"
    """a100, h100, h200, b200, mi300x, l40s, rtx4090."""

    price: float | None = None
    """What one GPU costs for an hour. Default: a guess."""

    length: int = 2048
    """Tokens of a sequence."""

    rows: int = 1
    """Sequences on each GPU at a time."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="mythos plan", args=argv)
    from open_mythos.analysis.plan import GPUS, Mesh, Work, forecast, mesh_that_fits
    from open_mythos.cli.named import model_named
    from open_mythos.train.optim import MuonAdamW

    for name in ("tokens", "length", "rows", "price"):
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} should be above zero and finite, got {value}")
    if options.gpu not in GPUS:
        raise ValueError(f"the GPU {options.gpu!r} is not in the table; it has {', '.join(GPUS)}")
    gpu, model, mesh = GPUS[options.gpu], model_named(options.model), Mesh.spoken(options.mesh)
    gpu = gpu if options.price is None else gpu._replace(hourly=options.price)
    works = [Work(options.length, options.rows, remat, MuonAdamW()) for remat in (False, True)]
    plans = [forecast(model, mesh, work, gpu, options.tokens, options.mfu) for work in works]
    _describe(options, model, mesh)
    _show(plans, gpu)
    if not plans[1].fits:
        print(_advice(mesh_that_fits(model, mesh, works[1], gpu)))
    return 0


def _describe(options: Options, model: Model, mesh: Mesh) -> None:
    from open_mythos.analysis.compute import on_meta, parameters

    counted = parameters(model)
    print(
        f"{options.model}: {counted.total:,} parameters, {counted.active:,} of them for each token, "
        f"{on_meta(model).steps} turns of the loop\n"
        f"{options.tokens:.3g} tokens on {mesh.gpus} x {options.gpu} at {options.mfu:.0%} of their peak, "
        f"{options.rows} x {options.length} tokens on each"
    )


def _show(plans: list[Forecast], gpu: Gpu) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *("all activations kept", "each turn recomputed"))
    for column in table.columns[1:]:
        column.justify = "right"
    for name in plans[0].memory._fields:
        table.add_row(f"{name}, per GPU", *(_size(getattr(plan.memory, name)) for plan in plans))
    table.add_row("memory per GPU", *(_size(plan.memory.total) for plan in plans), style="bold")
    table.add_row(
        f"fits {_size(gpu.memory)}", *("yes" if plan.fits else "no" for plan in plans), end_section=True
    )
    table.add_row("FLOPs per token", *(f"{plan.flops_per_token:.3g}" for plan in plans))
    table.add_row("tokens per second", *(f"{plan.tokens_per_second:,.0f}" for plan in plans))
    table.add_row("days", *(f"{plan.days:,.1f}" for plan in plans), style="bold")
    table.add_row(f"cost at {gpu.hourly:g} per GPU and hour", *(f"{plan.cost:,.0f}" for plan in plans))
    Console().print(table)


def _advice(mesh: Mesh | None) -> str:
    if mesh is None:
        return (
            "It does not fit, also with its routed experts kept apart: what every token passes in the loop\n"
            "is gathered whole. Take larger GPUs, shorter sequences or fewer rows, or cut the matrices too."
        )
    return (
        "It does not fit, since the whole loop is gathered on each GPU. With its experts kept apart it\n"
        f"would: --mesh {mesh.data}x{mesh.expert} here, and expert_parallel={mesh.expert} to train it so."
    )


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
