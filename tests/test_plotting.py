import io
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from elkax.plotting import (
    Band,
    ForecastPanel,
    gaussian_band,
    plot_band,
    plot_series,
    plot_smoothed_forecast,
)

TIMES = np.arange(2001, 2009)
VALUES = np.array([3.0, np.nan, 5.0, np.nan, np.nan, 4.0, 2.0, 1.0])
REMOVED = np.where(np.isnan(VALUES), 4.5, np.nan)


@pytest.fixture
def ax():
    return Figure().subplots()


def panel(removed=REMOVED):
    smoothed = gaussian_band(TIMES, np.zeros(8), np.ones(8))
    forecast = gaussian_band(TIMES[-1] + np.arange(1, 4), np.zeros(3), np.ones(3))
    return ForecastPanel("panel", TIMES, VALUES, removed, smoothed, forecast)


def draw(panels):
    return plot_smoothed_forecast(panels, title="title", time_label="year", value_label="flow (m)")


def test_series_leaves_missing_values_out(ax):
    points = plot_series(ax, TIMES, VALUES, label="data", color="red")
    np.testing.assert_array_equal(points.get_xdata(), [2001, 2003, 2006, 2007, 2008])
    np.testing.assert_array_equal(points.get_ydata(), [3, 5, 4, 2, 1])
    assert points.get_color() == "red"
    assert ax.get_legend_handles_labels()[1] == ["data"]


def test_gaussian_band_holds_its_probability():
    # 1.6448536 is the 95 % quantile of N(0, 1), tabulated to eight figures.
    band = gaussian_band([0, 1], [1.0, 2.0], [1.0, 10.0], 0.9)
    np.testing.assert_allclose(band.upper - band.mean, [1.6448536, 16.448536], rtol=1e-7)
    np.testing.assert_allclose(band.mean - band.lower, [1.6448536, 16.448536], rtol=1e-7)


def test_band_of_sd_equals_band_of_limits(ax):
    mean, sd = np.linspace(0, 1, 8), np.linspace(1, 2, 8)
    limits = gaussian_band(TIMES, mean, sd, 0.5)
    of_sd, _ = plot_band(ax, TIMES, mean, sd=sd, level=0.5)
    of_limits, curve = plot_band(ax, TIMES, mean, lower=limits.lower, upper=limits.upper)
    np.testing.assert_array_equal(of_sd.get_paths()[0].vertices, of_limits.get_paths()[0].vertices)
    np.testing.assert_array_equal(curve.get_ydata(), mean)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "got none of them"),
        ({"lower": VALUES}, "got lower"),
        ({"sd": VALUES, "upper": VALUES}, "got sd, upper"),
        ({"sd": VALUES, "level": 90.0}, "between 0 and 1, got 90"),
        ({"sd": VALUES[1:]}, r"'sd': \(7,\)"),
        ({"lower": VALUES, "upper": VALUES[:, None]}, r"'upper': \(8, 1\)"),
    ],
)
def test_band_refuses_unclear_limits(ax, limits, message):
    with pytest.raises(ValueError, match=message):
        plot_band(ax, TIMES, VALUES, **limits)


def test_series_refuses_lengths_that_differ(ax):
    with pytest.raises(ValueError, match=r"'times': \(8,\), 'values': \(7,\)"):
        plot_series(ax, TIMES, VALUES[1:])


def test_figure_has_one_panel_each_and_one_legend():
    figure = draw([panel(np.full(8, np.nan)), panel()])
    full, gapped = figure.axes
    assert full.get_ylabel() == gapped.get_ylabel() == "flow (m)"
    assert gapped.get_xlabel() == "year"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "Observed",
        "Smoothed level, 90 % band",
        "Forecast, 90 % band",
        "Held out",
    ]
    # Only the second panel shades: 2002 and 2004-2005, half a year beyond on each side.
    assert not full.patches
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in gapped.patches]
    assert spans == [(2001.5, 2002.5), (2003.5, 2005.5)]


def test_figure_saves_without_pyplot():
    stream = io.BytesIO()
    draw([panel()]).savefig(stream, format="png")
    assert stream.getvalue().startswith(b"\x89PNG")


def test_dates_are_times_too():
    days = np.arange("2001-01-06", "2001-03-03", 7, dtype="datetime64[D]")
    band = Band(days, *np.zeros((3, 8)))
    dated = ForecastPanel("weeks", days, VALUES, REMOVED, band, band)
    assert len(draw([dated]).axes[0].patches) == 2


def test_figure_needs_a_panel():
    with pytest.raises(ValueError, match="at least one ForecastPanel"):
        draw([])


def test_missing_matplotlib_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "elkax\[plot\]"'):
        draw([panel()])
