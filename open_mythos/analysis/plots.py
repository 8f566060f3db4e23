"""Pictures of a run: arrays in, a matplotlib figure out; `save_png` and `inline_svg` write it down.

    loss_curve           training and held-out loss against tokens, with baselines
    loss_against_loops   held-out loss against the depth at test time, the trained depth marked
    loop_motion          relative step |h_n - h_{n-1}| / |h_n| and norm |h_n| of the state, per loop
    expert_load          load of each expert in each loop, 1 where the balance is perfect
    vital_signs          small charts of what training reports (gradient norm, depth drawn, ...)

Colours are those of Okabe and Ito (2008), told apart with any kind of colour vision. An inline SVG
takes the text colour of the page around it, so that it reads on light and on dark. matplotlib is
imported when a figure is drawn, and no global state of it is touched.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

import numpy as np
from jaxtyping import Float

from open_mythos.whole import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # matplotlib is imported only to draw
    Axes = Figure = object

P = ParamSpec("P")

INK = "#24292f"  # becomes the text colour of the page in an inline SVG
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "font.size": 10,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "open_mythos",
}


class Curve(NamedTuple):
    """One line of a loss curve. `noisy` lines are smoothed, with the raw values behind them."""

    label: str
    x: Float[np.ndarray, "N"]
    y: Float[np.ndarray, "N"]
    noisy: bool = False


class DepthCurve(NamedTuple):
    """Held-out loss of one recipe at each number of loops, one row per seed."""

    label: str
    loops: Float[np.ndarray, "N"]
    loss: Float[np.ndarray, "seeds N"]


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in this file's style, whatever the settings of the caller's matplotlib."""

    @wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib as mpl

        with mpl.rc_context({**mpl.rcParamsDefault, **STYLE}):
            return draw(*args, **kwargs)

    return in_style


@styled
def loss_curve(
    curves: Sequence[Curve],
    baselines: Mapping[str, float],
    *,
    x_label: str = "tokens seen",
    y_label: str = "loss (bits per byte)",
) -> Figure:
    """Loss (log scale) against progress, in the units of the labels; baselines are dashed lines."""
    figure, (axes,) = _canvas()
    for curve, colour in zip(curves, COLOURS, strict=False):
        x, y = _finite(curve.x, curve.y)
        if curve.noisy:
            axes.plot(*_thin(x, y), color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(*_thin(x, _smooth(y)), color=colour, label=curve.label)
        else:
            axes.plot(x, y, color=colour, label=curve.label, marker="o", markersize=4)
    _plain_log(axes)
    for place, (name, value) in enumerate(baselines.items()):
        _level(axes, value, f"{name}: {value:.2f}", place)
    _short_numbers(axes)
    axes.set(xlabel=x_label, ylabel=y_label)
    if len(curves) > 1:
        axes.legend(loc="upper right")
    return figure


@styled
def loss_against_loops(
    curves: Sequence[DepthCurve],
    trained_loops: float | None = None,
    *,
    y_label: str = "held-out loss (bits per byte)",
) -> Figure:
    """Loss against loops at test time, log scales; the line is the mean over seeds, the band their range."""
    figure, (axes,) = _canvas()
    for curve, colour in zip(curves, COLOURS, strict=False):
        mean = curve.loss.mean(axis=0)
        axes.plot(curve.loops, mean, color=colour, marker="o", markersize=4, label=curve.label)
        if len(curve.loss) > 1:
            axes.fill_between(
                curve.loops,
                curve.loss.min(axis=0),
                curve.loss.max(axis=0),
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
    axes.set_xscale("log", base=2)
    _whole_ticks(axes, np.unique(np.concatenate([curve.loops for curve in curves])))
    _plain_log(axes)
    axes.set(xlabel="loops at test time", ylabel=y_label)
    if trained_loops is not None:
        _mark_trained(axes, trained_loops)
    if len(curves) == 1:
        _name_ends(axes, curves[0], trained_loops)
    else:
        axes.legend(loc="upper right")
    return figure


@styled
def loop_motion(
    relative_step: Float[np.ndarray, "N"],
    state_norm: Float[np.ndarray, "N2"],
    trained_loops: float | None = None,
) -> Figure:
    """How far each loop moves the state (log scale), and how large the state is after it."""
    figure, (left, right) = _canvas(columns=2, size=(8.4, 3.2))
    _per_loop(left, relative_step, COLOURS[0], trained_loops)
    _plain_log(left)
    left.set(xlabel="loop", ylabel="relative step $|h_n - h_{n-1}| / |h_n|$")
    _per_loop(right, state_norm, COLOURS[1], trained_loops)
    right.set(xlabel="loop", ylabel="state norm $|h_n|$")
    right.set_ylim(0, 1.1 * np.nanmax(state_norm, initial=1e-9))
    return figure


@styled
def expert_load(load: Float[np.ndarray, "N E"]) -> Figure:
    """Load of each expert (columns) in each loop (rows), counts or fractions, drawn over an even share."""
    figure, (axes,) = _canvas(size=(6.8, 0.9 + min(3.2, max(1.4, 0.25 * len(load)))))
    even = np.nan_to_num(load / np.maximum(load.mean(axis=1, keepdims=True), 1e-12))
    loops, experts = np.arange(len(load)) + 0.5, np.arange(load.shape[1]) - 0.5
    edges = np.append(loops, len(load) + 0.5), np.append(experts, load.shape[1] - 0.5)
    top = max(2.0, float(even.max(initial=2.0)))
    image = axes.pcolormesh(
        edges[1], edges[0], even, cmap="PuOr_r", norm=_around_one(top), rasterized=even.size > 4096
    )
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set(xlabel="expert", ylabel="loop")
    _whole_numbers(axes.xaxis, axes.yaxis)
    bar = figure.colorbar(image, ax=axes, label="load / even share", pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


@styled
def vital_signs(
    x: Float[np.ndarray, "N"], signs: Mapping[str, Float[np.ndarray, "N"]], *, x_label: str = "step"
) -> Figure:
    """One small chart per named series, on a common axis."""
    columns = min(3, len(signs))
    rows = -(-len(signs) // columns)
    figure, panels = _canvas(columns, rows, size=(2.8 * columns, 2.1 * rows))
    for panel in panels[len(signs) :]:
        panel.set_axis_off()
    for panel, (name, values) in zip(panels, signs.items(), strict=False):
        at, y = _finite(x, values)
        panel.plot(*_thin(at, y), color=COLOURS[0], alpha=0.3, linewidth=0.8)
        panel.plot(*_thin(at, _smooth(y)), color=COLOURS[0], linewidth=1.6)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel(x_label, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.locator_params(nbins=4)
        _short_numbers(panel)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure on white, 160 dots per inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    write_whole(path, buffer.getvalue())


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """Markup for an HTML page in the ink of its text; `name` tells its ids from those of other figures."""
    import html

    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().partition("<svg")[2]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' xmlns(:xlink)?="[^"]*"', "", svg
    )  # HTML knows them; a page that names no address is easier to trust
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return f'<svg role="img" aria-label="{html.escape(title)}"' + svg.replace(INK, "currentColor")


def _canvas(
    columns: int = 1, rows: int = 1, size: tuple[float, float] = (6.8, 3.6)
) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def _per_loop(axes: Axes, values: Float[np.ndarray, "N"], colour: str, trained_loops: float | None) -> None:
    axes.plot(np.arange(1, len(values) + 1), values, color=colour, marker="o", markersize=3.5)
    _whole_numbers(axes.xaxis)
    if trained_loops is not None:
        _mark_trained(axes, trained_loops)


def _mark_trained(axes: Axes, loops: float) -> None:
    axes.axvline(loops, color=INK, linestyle=(0, (4, 3)), linewidth=1, alpha=0.7)
    axes.annotate(
        f"trained: {loops:g}", (loops, 1), (0, 2), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="center", va="bottom", fontsize=9,
    )  # fmt: skip


def _name_ends(axes: Axes, curve: DepthCurve, trained_loops: float | None) -> None:
    """Write the loss beside the first point, the one at the trained depth, and the last."""
    mean = curve.loss.mean(axis=0)
    chosen = {0, len(mean) - 1} | set(np.flatnonzero(curve.loops == trained_loops).tolist())
    for i in sorted(chosen):
        axes.annotate(
            f"{mean[i]:.3f}",
            (curve.loops[i], mean[i]),
            (4, 6),
            textcoords="offset points",
            fontsize=9,
            clip_on=False,
        )


def _level(axes: Axes, value: float, label: str, place: int) -> None:
    """A dashed line; labels stand side by side, so that close levels do not hide each other's."""
    axes.axhline(value, color=INK, linestyle=(0, (2, 2)), linewidth=1, alpha=0.6)
    axes.annotate(
        label, (1 - 0.18 * (place % 5), value), (0, 2), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="bottom", fontsize=8.5,
    )  # fmt: skip


def _plain_log(axes: Axes) -> None:
    """A log scale with a few plainly written numbers; within one decade matplotlib would write 1.2 x 10^0."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if axes.dataLim.y1 <= 0:  # as where the state never moved
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(MaxNLocator(6) if high < 12 * low else LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))


def _whole_ticks(axes: Axes, values: Float[np.ndarray, "N"]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    apart: list[float] = []
    for value in sorted(
        values, key=lambda v: (v not in (values[0], values[-1]), not np.log2(v).is_integer())
    ):
        if all(max(value / other, other / value) >= 1.18 for other in apart):
            apart.append(float(value))
    axes.xaxis.set_major_locator(FixedLocator(apart))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))


def _whole_numbers(*axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for one in axis:
        one.set_major_locator(MaxNLocator(10, integer=True))


def _short_numbers(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _around_one(top: float) -> Any:
    """Colours whose middle is an even share, whose ends are nothing and the heaviest load."""
    from matplotlib.colors import TwoSlopeNorm

    return TwoSlopeNorm(1.0, vmin=0.0, vmax=top)


def _finite(
    x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"]
) -> tuple[Float[np.ndarray, "M"], Float[np.ndarray, "M"]]:
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def _smooth(y: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Mean over a centred window of a fortieth of the run, narrower at the ends."""
    window = np.ones(1 + 2 * (len(y) // 80))
    if len(y) < len(window):
        return y
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


def _thin(
    x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"], most: int = 800
) -> tuple[Float[np.ndarray, "M"], Float[np.ndarray, "M"]]:
    """At most so many points, evenly picked: a page need not carry a million."""
    chosen = np.unique(np.linspace(0, len(x) - 1, min(most, len(x))).astype(int)) if len(x) else slice(0)
    return x[chosen], y[chosen]
