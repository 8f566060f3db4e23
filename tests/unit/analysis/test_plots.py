"""Each picture shows its data in its units, from one point to very many, and leaves matplotlib as it was."""

import matplotlib as mpl
import numpy as np
import pytest

from open_mythos.analysis import plots

LOOPS = np.arange(1.0, 17.0)
LOSS = 1.2 + 2 * np.exp(-LOOPS)


def drawn(axes):
    return [line.get_ydata() for line in axes.get_lines()]


def test_the_loss_curve_shows_both_lines_and_the_baselines():
    x = np.linspace(0, 1e6, 500)
    y = 1 + 5 / (1 + np.arange(500.0))
    y[7] = np.nan
    given = [plots.Curve("training", x, y, noisy=True), plots.Curve("held out", x[::100], y[::100])]
    (axes,) = plots.loss_curve(given, {"gzip -9": 1.96}).axes
    lines = drawn(axes)
    assert np.array_equal(lines[0], np.delete(y, 7))
    assert np.array_equal(lines[2], y[::100])
    assert list(lines[3]) == [1.96, 1.96]
    assert axes.get_xlabel() == "tokens seen"
    assert axes.get_ylabel() == "loss (bits per byte)"
    assert [text.get_text() for text in axes.texts] == ["gzip -9: 1.96"]


def test_the_band_is_the_range_over_seeds_and_the_line_their_mean():
    seeds = np.stack([LOSS - 0.1, LOSS, LOSS + 0.1])
    curves = [plots.DepthCurve("a", LOOPS, seeds), plots.DepthCurve("b", LOOPS, LOSS[None] + 1)]
    (axes,) = plots.loss_against_loops(curves, 4.0).axes
    assert np.allclose(drawn(axes)[0], LOSS)
    corners = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert corners.max() == pytest.approx(LOSS[0] + 0.1)
    assert corners.min() == pytest.approx(LOSS[-1] - 0.1)
    assert len(axes.collections) == 1
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"a", "b"}


def test_a_lone_curve_names_its_ends_and_the_trained_depth():
    (axes,) = plots.loss_against_loops([plots.DepthCurve("a", LOOPS, LOSS[None])], 4.0).axes
    words = {text.get_text() for text in axes.texts}
    assert words == {"trained: 4", f"{LOSS[0]:.3f}", f"{LOSS[3]:.3f}", f"{LOSS[-1]:.3f}"}
    assert {1, 2, 4, 8, 16} <= set(axes.get_xticks())


def test_expert_load_is_drawn_over_an_even_share():
    axes, bar = plots.expert_load(np.array([[1.0, 3.0], [0.0, 0.0]])).axes
    assert np.allclose(axes.collections[0].get_array(), [[0.5, 1.5], [0, 0]])
    assert bar.get_ylabel() == "load / even share"


@pytest.mark.parametrize("n", [1, 2, 3, 50_000])
def test_any_length_can_be_drawn_and_saved(tmp_path, n):
    x, y = np.arange(n, dtype=float), np.ones(n)
    figures = [
        plots.loss_curve([plots.Curve("training", x, y, noisy=True)], {}),
        plots.vital_signs(x, {"gradient norm": y, "rho": y, "lr": y, "loops": y}),
        plots.loop_motion(y[:20], y[:20], 4.0),
    ]
    for i, figure in enumerate(figures):
        plots.save_png(figure, tmp_path / "plots" / f"{i}.png")
        assert (tmp_path / "plots" / f"{i}.png").read_bytes().startswith(b"\x89PNG")
        assert len(plots.inline_svg(figure, "f", "t")) < 300_000


def test_the_same_data_gives_the_same_markup():
    first, second = (plots.inline_svg(plots.loop_motion(LOSS, LOSS, 4.0), "m", "a <b>") for _ in range(2))
    assert first == second
    assert first.startswith('<svg role="img" aria-label="a &lt;b&gt;"')
    assert plots.INK not in first


def test_the_settings_of_matplotlib_are_neither_used_nor_changed(monkeypatch):
    monkeypatch.setitem(mpl.rcParams, "axes.grid", False)
    monkeypatch.setitem(mpl.rcParams, "font.size", 33)
    before = dict(mpl.rcParams)
    (axes,) = plots.loss_curve([plots.Curve("training", LOOPS, LOSS)], {}).axes
    assert axes.xaxis.label.get_size() < 20
    assert dict(mpl.rcParams) == before
