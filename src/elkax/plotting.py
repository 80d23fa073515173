"""Figures of series, uncertainty bands and forecasts; needs the extra `elkax[plot]`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.collections
    import matplotlib.figure
    import matplotlib.image
    import matplotlib.lines

# Blue and vermilion of the Okabe-Ito palette stay apart for colour-blind readers and in grey.
_SMOOTHED_COLOR = "#0072B2"
_FORECAST_COLOR = "#D55E00"
_DATA_COLOR = "0.25"
_REMOVED_COLOR = "0.92"


class Band(NamedTuple):
    """A curve with a lower and an upper limit, each (T,).

    Attributes:
        times: where the curve is known.
        mean: the curve.
        lower: lower limit.
        upper: upper limit.
    """

    times: np.ndarray
    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def gaussian_band(times: ArrayLike, mean: ArrayLike, sd: ArrayLike, level: float = 0.9) -> Band:
    r"""Compute the central Gaussian interval $m_t \pm z\,s_t$ that holds the probability `level`.

    Args:
        times: times, (T,).
        mean: means $m_t$, (T,).
        sd: standard deviations $s_t$, (T,), in the unit of the means.
        level: probability inside the band, in (0, 1).

    Returns:
        The means and the limits.

    Raises:
        ValueError: if `level` is not in (0, 1), or if the shapes are not (T,) for one T.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be a probability between 0 and 1, got {level!r}")
    times, mean, sd = np.asarray(times), np.asarray(mean), np.asarray(sd)
    _require_same_length(times=times, mean=mean, sd=sd)
    half_width = NormalDist().inv_cdf(0.5 + level / 2) * sd
    return Band(times, mean, mean - half_width, mean + half_width)


class ForecastPanel(NamedTuple):
    """What one panel of `plot_smoothed_forecast` shows.

    Attributes:
        title: heading of the panel.
        times: times of the data, (T,), evenly spaced.
        values: what the model was given, (T,), NaN where nothing.
        removed: what was held out of it, (T,), NaN elsewhere; all NaN when nothing was.
        smoothed: smoothed curve over the times of the data.
        forecast: forecast over later times.
    """

    title: str
    times: np.ndarray
    values: np.ndarray
    removed: np.ndarray
    smoothed: Band
    forecast: Band


def plot_series(
    ax: matplotlib.axes.Axes,
    times: ArrayLike,
    values: ArrayLike,
    *,
    label: str | None = None,
    **style: Any,
) -> matplotlib.lines.Line2D:
    """Draw the observed values of a series as points, leaving out the missing ones.

    Args:
        ax: axes to draw on.
        times: times, (T,).
        values: values, (T,), NaN where missing.
        label: name in the legend.
        **style: passed to `Axes.plot`, over the style chosen here.

    Returns:
        The points.

    Raises:
        ValueError: if the shapes are not (T,) for one T.
    """
    times, values = np.asarray(times), np.asarray(values)
    _require_same_length(times=times, values=values)
    defaults = {"marker": "o", "markersize": 3.5, "linestyle": "none", "color": _DATA_COLOR}
    observed = np.isfinite(values)
    (points,) = ax.plot(times[observed], values[observed], label=label, **{**defaults, **style})
    return points


def plot_band(
    ax: matplotlib.axes.Axes,
    times: ArrayLike,
    mean: ArrayLike,
    *,
    sd: ArrayLike | None = None,
    lower: ArrayLike | None = None,
    upper: ArrayLike | None = None,
    level: float = 0.9,
    color: str = _SMOOTHED_COLOR,
    label: str | None = None,
) -> tuple[matplotlib.collections.PolyCollection, matplotlib.lines.Line2D]:
    """Draw a curve and a band around it.

    The band is given by its limits, or is that of `gaussian_band`.

    Args:
        ax: axes to draw on.
        times: times, (T,).
        mean: the curve, (T,).
        sd: standard deviations, (T,), in place of `lower` and `upper`.
        lower: lower limits, (T,).
        upper: upper limits, (T,).
        level: probability inside the band, in (0, 1); used with `sd` only.
        color: of the curve and, paler, of the band.
        label: name of the curve in the legend.

    Returns:
        The band and the curve; as a pair they make one entry of a legend.

    Raises:
        ValueError: if neither `sd` nor both limits are given, or more than that, if `level` is not
            in (0, 1), or if the shapes are not (T,) for one T.
    """
    times, mean = np.asarray(times), np.asarray(mean)
    if sd is not None and lower is None and upper is None:
        _, _, lower, upper = gaussian_band(times, mean, sd, level)
    elif sd is None and lower is not None and upper is not None:
        lower, upper = np.asarray(lower), np.asarray(upper)
        _require_same_length(times=times, mean=mean, lower=lower, upper=upper)
    else:
        limits = {"sd": sd, "lower": lower, "upper": upper}
        given = ", ".join(name for name, limit in limits.items() if limit is not None)
        raise ValueError(f"give either sd, or lower and upper; got {given or 'none of them'}")
    band = ax.fill_between(times, lower, upper, color=color, alpha=0.2, linewidth=0)
    (curve,) = ax.plot(times, mean, color=color, linewidth=1.8, label=label)
    return band, curve


def plot_residuals(
    ax: matplotlib.axes.Axes, residuals: ArrayLike, *, floor: float = 1e-16
) -> matplotlib.image.AxesImage:
    """Draw the residuals of a recurrence over iteration and time, as shades of their logarithm.

    Shows why a method works or does not: a front that converges from the left, a tail that blows
    up, or all of it at once. What was not evaluated is left white.

    Args:
        ax: axes to draw on.
        residuals: (iterations, T), `info.history.residual` of `evaluate_recurrence`.
        floor: smaller ones are drawn as this.

    Returns:
        The image, for a colour bar.

    Raises:
        ValueError: if the residuals are not of that shape.
    """
    residuals = np.asarray(residuals, float)
    if residuals.ndim != 2:
        raise ValueError(f"residuals must be (iterations, T), got shape {residuals.shape}")
    taken = np.flatnonzero(np.any(~np.isnan(residuals), axis=1))
    shown = residuals[: taken[-1] + 1] if taken.size else residuals
    levels = np.log10(np.clip(shown, floor, 1e4))
    image = ax.imshow(
        np.ma.masked_invalid(levels),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="cividis",
        vmin=np.log10(floor),
        vmax=2.0,
        extent=(0.5, shown.shape[1] + 0.5, -0.5, shown.shape[0] - 0.5),
    )
    ax.set_xlabel("time step")
    ax.set_ylabel("iteration")
    return image


def plot_smoothed_forecast(
    panels: Sequence[ForecastPanel],
    *,
    title: str,
    time_label: str,
    value_label: str,
    smoothed_label: str = "Smoothed level, 90 % band",
    forecast_label: str = "Forecast, 90 % band",
) -> matplotlib.figure.Figure:
    """Draw smoothed series and their forecasts, one panel below the other on the same axes.

    Held-out values are hollow, and the stretches they were held out of are shaded.

    Args:
        panels: what each panel shows, at least one.
        title: heading of the figure.
        time_label: name of the time axis.
        value_label: name of the value axes, with the unit.
        smoothed_label: name of the smoothed curves and their bands in the legend.
        forecast_label: name of the forecasts and their bands in the legend.

    Returns:
        The figure, independent of pyplot; its `savefig` writes it to a file.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no panel, or arrays of a panel differ in length.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "elkax[plot]"') from error
    if not panels:
        raise ValueError("panels must hold at least one ForecastPanel, got none")
    figure = Figure(figsize=(9, 1.2 + 3.1 * len(panels)), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    legend = {}
    for ax, panel in zip(axes, panels, strict=True):
        legend |= _draw_panel(ax, panel, smoothed_label, forecast_label)
        ax.set_ylabel(value_label)
    axes[-1].set_xlabel(time_label)
    figure.legend(
        list(legend.values()), list(legend), loc="outside lower center", ncols=4, frameon=False
    )
    return figure


def _draw_panel(
    ax: matplotlib.axes.Axes, panel: ForecastPanel, smoothed_label: str, forecast_label: str
) -> dict[str, Any]:
    """Draw one panel; its legend is left to the figure, as a handle for every label."""
    ax.set_title(panel.title, loc="left", fontsize="medium", color=_DATA_COLOR)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)
    held_out = np.isfinite(panel.removed)
    half_step = (panel.times[1] - panel.times[0]) / 2
    for first, last in _runs(held_out):
        start, end = panel.times[first] - half_step, panel.times[last] + half_step
        ax.axvspan(start, end, color=_REMOVED_COLOR, linewidth=0)
    handles: dict[str, Any] = {"Observed": plot_series(ax, panel.times, panel.values)}
    if held_out.any():
        handles["Held out"] = plot_series(ax, panel.times, panel.removed, markerfacecolor="none")
    for label, color, band in (
        (smoothed_label, _SMOOTHED_COLOR, panel.smoothed),
        (forecast_label, _FORECAST_COLOR, panel.forecast),
    ):
        handles[label] = plot_band(
            ax, band.times, band.mean, lower=band.lower, upper=band.upper, color=color
        )
    return handles


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """List the first and last index of every run of true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(int)))
    return [(int(first), int(last) - 1) for first, last in edges.reshape(-1, 2)]


def _require_same_length(**arrays: np.ndarray) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if any(array.ndim != 1 for array in arrays.values()) or len(set(shapes.values())) > 1:
        raise ValueError(f"expected one-dimensional arrays of one length, got shapes {shapes}")
