"""`write_report`: one page about a run, finished or not. What was run, how well it does beside what it must
beat, what depth does to it, what it wrote, and the config. Every claim is computed from the run's files
(analysis/record.py says which); what is absent is left out, what is damaged is said.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from open_mythos.analysis import page, plots
from open_mythos.analysis.record import Record
from open_mythos.train.progress import clock_time, printable, short_number
from open_mythos.whole import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is imported only to draw
    Figure = object

FLAT = 0.005  # a change of loss within half a percent is called none
SIGNS = {
    "grad_norm": "gradient norm",
    "loops": "loops drawn",
    "rho": "spectral radius",
    "expert_balance": "fullest expert / mean",
    "tokens_per_second": "tokens per second",
    "lr": "learning rate",
}


class Picture(NamedTuple):
    """A plot, the section it belongs to, and what to look for in it. `draw` gives None where data lacks."""

    name: str
    section: str
    draw: Callable[[Record], Figure | None]
    caption: str


def write_report(run_dir: Path) -> Path:
    """Write report.html and plots/*.png into the folder of a run; returns the path of the page.

    The page replaces an older one in one move. Without matplotlib it says so and has no plots.
    Raises `ValueError` where the folder holds no run.
    """
    record = Record.read(run_dir)
    body = [*_opening(record), *_pictures(record, run_dir / "plots"), *_samples(record), *_closing(record)]
    path = run_dir / "report.html"
    write_whole(path, page.page(f"Run {record.name}", body))
    return path


def _opening(record: Record) -> Iterator[str]:
    yield page.paragraph(_what_was_run(record), "soft")
    for note in record.notes:
        yield page.paragraph(note, "note")
    if numbers := _headline(record):
        yield page.tiles(numbers)
    if record.held_out is not None and record.baselines:
        yield page.heading("Against compressors and other baselines")
        yield page.paragraph(_verdict(record.held_out, record.baselines) + _how_measured(record))
        yield page.table(
            ("", "bits per byte", "model / this"), _baseline_rows(record.held_out, record.baselines)
        )
    if len(record.depth_curve) > 1:
        yield page.heading("What depth does")
        yield page.paragraph(_depth_verdict(record))


def _what_was_run(record: Record) -> str:
    if not record.metrics:
        return "Nothing has been logged yet."
    what = f"{record.config['is']}: " if isinstance(record.config.get("is"), str) else ""
    steps, tokens, seconds = (record.last(name) for name in ("step", "tokens", "time"))
    parts = [f"{steps:,.0f} steps"] if steps is not None else []
    if tokens is not None:
        parts.append(f"{short_number(tokens)} tokens")
    if seconds is not None:
        parts.append(f"{clock_time(seconds)} of training")
    return what + (", ".join(parts) or "no steps") + "."


def _headline(record: Record) -> list[tuple[str, str]]:
    numbers = []
    if record.held_out is not None:
        at = (
            f" at {record.trained_loops:g} loops"
            if record.depth_curve and record.trained_loops is not None
            else ""
        )
        numbers.append((f"{record.held_out:.3f}", f"bits per byte, held out{at}"))
    numbers += [
        (f"{value:.3f}", f"bits per byte, {name}") for name, value in list(record.baselines.items())[:2]
    ]
    loss = record.series("loss")
    loss = loss[np.isfinite(loss)][-20:]
    if loss.size:
        numbers.append((f"{loss.mean():.3f}", f"nats per token in training (last {loss.size} logged)"))
    speed = record.series("tokens_per_second")
    if np.isfinite(speed).any():
        numbers.append((short_number(float(np.nanmedian(speed))), "tokens per second (median)"))
    return numbers


def _verdict(held_out: float, baselines: dict[str, float]) -> str:
    beaten = [name for name, value in baselines.items() if held_out < value]
    others = [name for name in baselines if name not in beaten]
    words = f"The model needs {held_out:.3f} bits for a byte of text that it never saw."
    if beaten:
        words += f" That is less than {_join(beaten)}."
    if others:
        words += f" That is no better than {_join(others)}."
    return (
        f"{words} A compressor starts from nothing; the model has learned, and its weights are not counted."
    )


def _how_measured(record: Record) -> str:
    length, stride = (record.config.get(name) for name in ("length", "eval_stride"))
    if not isinstance(length, int) or not isinstance(stride, int):
        return ""
    return (
        f" It reads rows of {length} tokens, one every {stride}, so it predicts each token from at least "
        f"{length - stride} others."
    )


def _baseline_rows(held_out: float, baselines: dict[str, float]) -> list[tuple[str, str, str]]:
    rows = sorted([("this model", held_out), *baselines.items()], key=lambda row: row[1])
    return [(name, f"{value:.3f}", f"{held_out / value:.2f}") for name, value in rows if value > 0]


def _depth_verdict(record: Record) -> str:
    curve, trained = record.depth_curve, record.trained_loops
    best = min(curve, key=lambda n: curve[n])
    words = f"The best of the depths tried is {best:g} loops ({curve[best]:.3f} bits per byte)."
    if trained is None or trained not in curve:
        return words
    shallowest, deepest = min(curve), max(curve)
    if deepest > trained:
        change = curve[deepest] / curve[trained] - 1
        words += f" At {deepest:g} loops, {deepest / trained:.3g} times the trained depth, the loss is"
        words += f" {_compared(change)} at the trained {trained:g}"
        words += f" ({curve[deepest]:.3f} and {curve[trained]:.3f})."
    if shallowest < trained:
        words += f" With only {shallowest:g} it is {curve[shallowest]:.3f}."
    return words


def _compared(change: float) -> str:
    if abs(change) <= FLAT:
        return "within half a percent of that"
    return f"{abs(change):.1%} {'higher' if change > 0 else 'lower'} than"


def _pictures(record: Record, folder: Path) -> Iterator[str]:
    section = ""
    for picture in PICTURES:
        try:
            drawn = picture.draw(record)
        except ModuleNotFoundError as error:
            yield page.paragraph(f"No plots: {error}; pip install 'open_mythos[plot]' brings it.", "note")
            return
        if drawn is None:
            continue
        plots.save_png(drawn, folder / f"{picture.name}.png")
        if section != picture.section:
            section = picture.section
            yield page.heading(section)
        yield page.figure(plots.inline_svg(drawn, picture.name, picture.caption), picture.caption)


def _draw_loss(record: Record) -> Figure | None:
    unit, train = _training_loss(record)
    held_out = record.series("eval_bits_per_byte")
    in_bits = unit == "bits per byte"
    given = (
        [plots.Curve("training", _progress(record), train, noisy=True)]
        if np.isfinite(train).sum() > 1
        else []
    )
    if in_bits and np.isfinite(held_out).any():
        given.append(plots.Curve("held out", _progress(record), held_out))
    label = "tokens seen" if _counts_tokens(record) else "step"
    shown = record.baselines if in_bits else {}
    return plots.loss_curve(given, shown, x_label=label, y_label=f"loss ({unit})") if given else None


def _training_loss(record: Record) -> tuple[str, np.ndarray]:
    """In bits per byte where the run knows them or has only held-out loss; else in nats per token."""
    bits, nats = record.series("bits_per_byte"), record.series("loss")
    if np.isfinite(bits).any() or not np.isfinite(nats).any():
        return "bits per byte", bits
    return "nats per token", nats


def _draw_loops(record: Record) -> Figure | None:
    curve = record.depth_curve
    if len(curve) < 2:
        return None
    loops, loss = np.array(list(curve)), np.array(list(curve.values()))
    return plots.loss_against_loops([plots.DepthCurve("this run", loops, loss[None])], record.trained_loops)


def _draw_motion(record: Record) -> Figure | None:
    step, norm = record.swept("relative_step"), record.swept("state_norm")
    if not np.isfinite(step).any() or not np.isfinite(norm).any():
        return None
    return plots.loop_motion(step, norm, record.trained_loops)


def _draw_load(record: Record) -> Figure | None:
    return None if record.expert_load is None else plots.expert_load(record.expert_load)


def _draw_signs(record: Record) -> Figure | None:
    signs = {words: record.series(name) for name, words in SIGNS.items()}
    signs = {words: values for words, values in signs.items() if np.isfinite(values).sum() > 1}
    return plots.vital_signs(record.series("step"), signs) if signs else None


def _progress(record: Record) -> np.ndarray:
    return record.series("tokens" if _counts_tokens(record) else "step")


def _counts_tokens(record: Record) -> bool:
    return bool(record.metrics) and bool(np.isfinite(record.series("tokens")).all())


def _samples(record: Record) -> Iterator[str]:
    texts = record.texts
    if not texts:
        return
    yield page.heading("What it wrote")
    yield page.paragraph("Unedited samples, from early to late in training.", "soft")
    for i in np.unique(np.linspace(0, len(texts) - 1, min(6, len(texts))).astype(int)).tolist():
        step, text = texts[i]
        yield page.paragraph(f"Step {step:,}", "soft") + page.preformatted(printable(text))


def _closing(record: Record) -> Iterator[str]:
    if record.config:
        yield page.heading("Config")
        pretty = page.preformatted(json.dumps(record.config, indent=2))
        yield page.folded("The resolved config, valid as input again", pretty)


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


PICTURES = (
    Picture(
        "loss",
        "Training",
        _draw_loss,
        "A line that still falls at the end would gain from a longer run; a held-out line that rises while "
        "training falls means overfitting. Dashed: baselines on the held-out text.",
    ),
    Picture(
        "loops",
        "Depth",
        _draw_loops,
        "Held-out loss should fall up to the trained depth and stay level beyond it; a rise to the right "
        "says that the loop works only at the depth it was trained for.",
    ),
    Picture(
        "motion",
        "Depth",
        _draw_motion,
        "A relative step that shrinks with every loop says that the state settles; a level one, that it "
        "keeps moving. The norm should level off and not grow.",
    ),
    Picture(
        "expert_load",
        "Experts",
        _draw_load,
        "White is an even share. A column dark in every row is an expert used too much or too little; rows "
        "that differ show experts which serve some loops and not others.",
    ),
    Picture(
        "vital_signs",
        "Vital signs of training",
        _draw_signs,
        "The spectral radius of the injection must stay below 1; spikes in the gradient norm and an expert "
        "balance far above 1 are early signs of trouble.",
    ),
)
