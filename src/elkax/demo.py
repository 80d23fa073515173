"""The main job in one command: fit, smooth and forecast the Nile, and draw the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jaxtyping import Array, Float

import elkax
from elkax.datasets import Series, load_nile
from elkax.plotting import Band, ForecastPanel, gaussian_band, plot_smoothed_forecast

_VARIANCES = ("emission variance", "level variance")
# What Durbin & Koopman (2012), Sec. 2.10, print for the two.
_BOOK_VARIANCES = np.array([15099.0, 1469.1])
# Two of the five blocks of twenty years: 1891-1910 and 1931-1950.
_HELD_OUT = (slice(20, 40), slice(60, 80))


class _Fit(NamedTuple):
    """A fitted model; variances are in squared units of the series, in the order `_VARIANCES`."""

    params: ParamsLGSSM
    variances: np.ndarray
    standard_errors: np.ndarray
    log_likelihood: float
    book_log_likelihood: float
    ending: str


class _Analysis(NamedTuple):
    """What a fitted model says about a series: its level, its values, and its future values."""

    level: Band
    values: Band
    forecast: Band


def run_demo(output: Path, *, horizon: int = 10, level: float = 0.9) -> int:
    r"""Fit a local level to the Nile by maximum likelihood, smooth, forecast, hold out, draw.

    The model is $y_t = z_t + \varepsilon_t$, $z_t = z_{t-1} + w_t$ with
    $\varepsilon_t \sim N(0, \sigma^2_\varepsilon)$, $w_t \sim N(0, \sigma^2_w)$ and an exactly
    diffuse $z_1$. Prints estimates and forecasts, and saves one picture. Computes in float64,
    whatever the flags of the process are, and leaves them as they are.

    Args:
        output: file of the picture; its suffix is the format.
        horizon: number of years to forecast, at least 1.
        level: probability inside the bands, in (0, 1).

    Returns:
        The exit status: 0, or 2 if the picture cannot be written where it should go. Without
        matplotlib there is no picture, a line that says so, and status 0.

    References:
        Durbin & Koopman (2012), "Time series analysis by state space methods", Ch. 2.
    """
    started = time.perf_counter()
    # Looked at before the work, so that a slip in the path costs no time.
    if output.is_dir():
        return _cannot_write(output, "it is a folder")
    if not output.parent.is_dir():
        return _cannot_write(output, f"there is no folder {output.parent}")
    series = load_nile()
    kept = series.values.copy()
    for years in _HELD_OUT:
        kept[years] = np.nan
    with jax.enable_x64(True):
        fit = _fit(series.values)
        full = _analyse(fit, series.times, series.values, horizon, level)
        gapped = _analyse(fit, series.times, kept, horizon, level)
    band_name = f"{100 * level:g} % band"
    _print_fit(series, fit)
    _print_band(f"Smoothed level, {band_name}, every ninth year", full.level, step=9)
    _print_band(f"Forecast flow, {band_name}", full.forecast)
    _print_held_out(series, kept, gapped.values, band_name)
    try:
        figure = plot_smoothed_forecast(
            _panels(series, kept, full, gapped),
            title=_title(series, fit),
            time_label="Year",
            value_label=r"Flow per year ($10^8$ m$^3$)",
            smoothed_label=f"Smoothed level, {band_name}",
            forecast_label=f"Forecast flow, {band_name}",
        )
    except ImportError as error:
        print(f"\nNo picture: {error}")
    else:
        try:
            figure.savefig(output)
        except (OSError, ValueError) as error:
            return _cannot_write(output, str(error))
        print(f"\nPicture saved to {output}")
    print(f"Took {time.perf_counter() - started:.1f} s")
    return 0


def _cannot_write(output: Path, reason: str) -> int:
    print(f"elkax demo: error: cannot write the picture to {output}: {reason}", file=sys.stderr)
    return 2


def _build(log_variances: Float[Array, "2"]) -> ParamsLGSSM:
    """Build the model from the logarithms of its variances, in the order `_VARIANCES`."""
    emission_variance, level_variance = jnp.exp(log_variances)
    return elkax.local_level(level_variance, emission_variance)


def _fit(values: np.ndarray) -> _Fit:
    """Maximise the exact diffuse log-likelihood."""
    emissions = jnp.asarray(values)[:, None]
    start = jnp.log(jnp.full(2, np.var(values) / 2))
    fit = elkax.maximum_likelihood(_build, start, emissions)
    ending = "converged" if fit.converged else "NOT converged"
    book = _build(jnp.log(_BOOK_VARIANCES))
    return _Fit(
        params=fit.params,
        variances=np.exp(fit.estimate),
        standard_errors=np.asarray(elkax.transform_errors(jnp.exp, fit.estimate, fit.covariance)),
        log_likelihood=float(fit.log_likelihood),
        book_log_likelihood=float(elkax.lgssm_marginal_log_prob(book, emissions)),
        ending=f"{ending} in {fit.iterations} iterations",
    )


def _analyse(
    fit: _Fit, times: np.ndarray, values: np.ndarray, horizon: int, probability: float
) -> _Analysis:
    """Smooth the level and forecast the values, in bands that hold the given probability."""
    emissions = jnp.asarray(values)[:, None]
    posterior = elkax.lgssm_smoother(fit.params, emissions)
    means = np.asarray(posterior.smoothed_means)[:, 0]
    variances = np.asarray(posterior.smoothed_covariances)[:, 0, 0]
    emission_variance = fit.variances[0]
    forecast = elkax.lgssm_forecast(fit.params, emissions, horizon)
    lower, upper = (np.asarray(limit)[:, 0] for limit in forecast.interval(probability))
    later = times[-1] + np.arange(1, horizon + 1)
    return _Analysis(
        level=gaussian_band(times, means, np.sqrt(variances), probability),
        values=gaussian_band(times, means, np.sqrt(variances + emission_variance), probability),
        forecast=Band(later, np.asarray(forecast.emission_means)[:, 0], lower, upper),
    )


def _print_fit(series: Series, fit: _Fit) -> None:
    print(f"{series.name}, {series.times[0]}-{series.times[-1]}, in {series.unit}")
    print(f"Local level, exact diffuse start, maximum likelihood ({fit.ending})\n")
    print(f"{'':18}{'estimate':>12}{'std. error':>12}{'Durbin & Koopman':>18}")
    rows = zip(_VARIANCES, fit.variances, fit.standard_errors, _BOOK_VARIANCES, strict=True)
    for name, estimate, standard_error, book in rows:
        print(f"{name:18}{estimate:12.1f}{standard_error:12.1f}{book:18.1f}")
    likelihoods = f"{fit.log_likelihood:12.6f}{'':12}{fit.book_log_likelihood:18.6f}"
    print(f"{'log-likelihood':18}{likelihoods}")


def _print_band(heading: str, band: Band, step: int = 1) -> None:
    print(f"\n{heading}")
    for year, *curve in list(zip(*band, strict=True))[::step]:
        print(f"{year:6}{curve[0]:10.1f}   [{curve[1]:.1f}, {curve[2]:.1f}]")


def _print_held_out(series: Series, kept: np.ndarray, predicted: Band, band_name: str) -> None:
    """Print how many of the removed values lie in the band that the kept ones predict."""
    removed = np.isnan(kept)
    inside = (predicted.lower <= series.values) & (series.values <= predicted.upper)
    print(
        f"\nWith {_held_out_years(series.times)} held out, {np.sum(inside & removed)} of the "
        f"{np.sum(removed)} removed flows lie in the {band_name} of their prediction"
    )


def _held_out_years(times: np.ndarray) -> str:
    return " and ".join(f"{times[years][0]}-{times[years][-1]}" for years in _HELD_OUT)


def _panels(
    series: Series, kept: np.ndarray, full: _Analysis, gapped: _Analysis
) -> Sequence[ForecastPanel]:
    times, values = series.times, series.values
    nothing = np.full_like(values, np.nan)
    removed = np.where(np.isnan(kept), values, np.nan)
    return (
        ForecastPanel("All years", times, values, nothing, full.level, full.forecast),
        ForecastPanel(
            f"{_held_out_years(times)} held out, same variances",
            times,
            kept,
            removed,
            gapped.level,
            gapped.forecast,
        ),
    )


def _title(series: Series, fit: _Fit) -> str:
    symbols = (r"\sigma^2_\varepsilon", r"\sigma^2_w")
    estimates = ", ".join(
        f"${symbol}$ = {variance:,.0f} (s.e. {standard_error:,.0f})"
        for symbol, variance, standard_error in zip(
            symbols, fit.variances, fit.standard_errors, strict=True
        )
    )
    return f"{series.name}: local level, {estimates}"
