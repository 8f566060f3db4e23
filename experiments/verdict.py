"""What held-out loss against loops says, judged by two rules on the mean over seeds.

falls    every loop up to the trained mean lowers the loss
within   from the trained mean to the last depth measured it stays within 0.5 % of the lowest
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

WITHIN = 0.005
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Verdict(NamedTuple):
    """`rise` is the largest step up between neighbouring depths up to the trained mean, `excess` the largest
    distance above the lowest loss from there on; both as shares of the loss, of the mean over seeds."""

    falls: bool
    rise: float
    within: bool
    excess: float
    excess_of_seeds: list[float]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval (Student's t); a single value has none."""
    if len(values) < 2:
        return mean(values), math.nan
    t = STUDENT.get(len(values) - 1, 1.96)
    return mean(values), t * stdev(values) / math.sqrt(len(values))


def judge(loops: Sequence[int], seeds: Sequence[Sequence[float]], trained: int) -> Verdict:
    """`seeds` holds a row of losses per seed, at the depths `loops`."""
    average = [mean(column) for column in zip(*seeds, strict=True)]
    start = loops.index(trained)
    rise = max((b / a - 1 for a, b in itertools.pairwise(average[: start + 1])), default=-1.0)
    excess = _excess(average, start)
    return Verdict(rise <= 0, rise, excess <= WITHIN, excess, [_excess(row, start) for row in seeds])


def _excess(losses: Sequence[float], start: int) -> float:
    return max(losses[start:]) / min(losses) - 1


def result(title: str, runs: Sequence[dict[str, Any]], trained: int) -> dict[str, Any]:
    loops, seeds = runs[0]["loops"], [run["bits_per_byte"] for run in runs]
    columns = [interval(column) for column in zip(*seeds, strict=True)]
    return {
        "title": title,
        "parameters": runs[0]["parameters"],
        "tokens": runs[0]["tokens"],
        "seconds": [run["seconds"] for run in runs],
        "loops": loops,
        "bits_per_byte": seeds,
        "mean": [m for m, _ in columns],
        "half_interval": [None if math.isnan(h) else h for _, h in columns],
        "verdict": judge(loops, seeds, trained)._asdict(),
        "recipe": runs[0]["recipe"],
    }


def markdown(results: Mapping[str, Any], loops: Sequence[int], settings: dict[str, Any]) -> str:
    heads = ["held-out bits per byte at", *(f"{n}" for n in loops), f"falls to {settings['mean']}", "excess"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for result in results.values():
        pairs = zip(result["mean"], result["half_interval"], strict=True)
        cells = [f"{m:.3f}" + ("" if h is None else f" ± {h:.3f}") for m, h in pairs]
        verdict = result["verdict"]
        falls = "yes" if verdict["falls"] else f"no (+{verdict['rise']:.3%})"
        excess = f"{verdict['excess']:.2%} ({'yes' if verdict['within'] else 'no'})"
        lines.append(f"| {result['title']} | {' | '.join(cells)} | {falls} | {excess} |")
    counts = ", ".join(f"{result['parameters']:,}" for result in results.values())
    return "\n".join(
        [
            *lines,
            "",
            f"Mean over seeds ± half a 95 % interval. Trained mean {settings['mean']} loops, "
            f"{settings['tokens']:,} tokens each; parameters {counts}.",
            f"Excess: the highest loss from {settings['mean']} loops on over the lowest of all; "
            f"(yes) if at most {WITHIN:.1%}.",
        ]
    )
