"""The table of the variants in the README: counted from the models, written as Markdown."""

from collections.abc import Iterable

from open_mythos.analysis.compute import cache_bytes, flops, parameters
from open_mythos.model import Model
from open_mythos.nn.cache import PerLoop, Shared

HEADS = (
    "variant",
    "parameters",
    "active per token",
    "loops",
    "FLOPs per token and loop",
    "FLOPs per token, all loops",
    "cache per token",
    "cache, loops share",
)


def markdown(models: Iterable[tuple[str, Model]]) -> str:
    """One row per model. FLOPs are of the forward pass without the part of attention that grows with the
    context; cache bytes are for bfloat16, with a slot per loop and with one slot for all loops."""
    lines = [f"| {' | '.join(HEADS)} |", f"|---|{'---:|' * (len(HEADS) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(_row(name, model))} |" for name, model in models)])


def _row(name: str, model: Model) -> list[str]:
    counted, work = parameters(model), flops(model)
    loops = model.loop.schedule.mean_steps if model.loop is not None else 0
    return [
        name,
        f"{counted.total:,}",
        f"{counted.active:,}",
        str(loops),
        _giga(work.per_loop),
        _giga(work.token(model.loop.route.turns(loops) if model.loop is not None else 0)),
        f"{cache_bytes(model, PerLoop()):,} B",
        f"{cache_bytes(model, Shared()):,} B",
    ]


def _giga(count: float) -> str:
    return f"{count / 1e9:,.2f} G"
