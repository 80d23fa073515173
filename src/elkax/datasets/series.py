"""Loaders of the univariate series that come with the package."""

from __future__ import annotations

import csv
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import numpy as np


class Series(NamedTuple):
    """A univariate series on a regular grid of T times.

    Attributes:
        times: when, (T,): years as integers, or days as `datetime64[D]`.
        values: what was observed, (T,) in float64, NaN where nothing was.
        name: short name, fit for a title.
        unit: physical unit of the values.
        source: who published the series.
    """

    times: np.ndarray
    values: np.ndarray
    name: str
    unit: str
    source: str


def load_nile() -> Series:
    """Load the annual flow of the Nile at Aswan, 1871 to 1970.

    Returns:
        100 years without gaps; `times` are years.

    References:
        Cobb (1978), "The problem of the Nile", Biometrika 65, 243-251. Durbin & Koopman (2012),
        "Time series analysis by state space methods", Sec. 2.2, fit a local level to it.
    """
    times, values = _read("nile.csv", int)
    return Series(times, values, "Annual flow of the Nile at Aswan", "10^8 m^3", "Cobb (1978)")


def load_sunspots() -> Series:
    """Load the yearly mean number of sunspots, 1700 to 2008.

    Returns:
        309 years without gaps; `times` are years.

    References:
        United States National Geophysical Data Center, yearly sunspot numbers.
    """
    times, values = _read("sunspots.csv", int)
    source = "US National Geophysical Data Center"
    return Series(times, values, "Yearly mean sunspot number", "spots", source)


def load_co2(frequency: Literal["weekly", "monthly"] = "weekly") -> Series:
    """Load the concentration of carbon dioxide in the air at Mauna Loa, 1958 to 2001.

    Gaps stay gaps: a week without a measurement is NaN, and so is a month without a measured week.

    Args:
        frequency: "weekly" for the 2284 weeks as published, each dated by its Saturday, or
            "monthly" for the means of the measured weeks whose date falls in each of 526 months,
            dated by the first day of the month.

    Returns:
        The series in parts per million by volume; `times` are `datetime64[D]`.

    Raises:
        ValueError: if `frequency` is neither of the two.

    References:
        Keeling & Whorf (2004), "Atmospheric CO2 concentrations derived from flask air samples at
        sites in the SIO network", Carbon Dioxide Information Analysis Center.
    """
    if frequency not in ("weekly", "monthly"):
        raise ValueError(f"frequency must be 'weekly' or 'monthly', got {frequency!r}")
    times, values = _read("co2.csv", _day)
    if frequency == "monthly":
        times, values = _monthly_means(times, values)
    name = f"Carbon dioxide at Mauna Loa, {frequency}"
    return Series(times, values, name, "ppmv", "Keeling & Whorf (2004)")


def _read(filename: str, parse_time: Callable[[str], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Read times and values from a two-column file with a header; an empty value is NaN."""
    text = (files("elkax.datasets") / filename).read_text("ascii")
    _, *rows = csv.reader(text.splitlines())
    times = np.array([parse_time(time) for time, _ in rows])
    values = np.array([float(value) if value else np.nan for _, value in rows])
    return times, values


def _day(digits: str) -> np.datetime64:
    """Parse the eight digits yyyymmdd."""
    return np.datetime64(f"{digits[:4]}-{digits[4:6]}-{digits[6:]}", "D")


def _monthly_means(days: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average the measured days of every calendar month, NaN where there is none."""
    months = days.astype("datetime64[M]")
    month = np.timedelta64(1, "M")
    grid = np.arange(months[0], months[-1] + month, month)
    position = (months - grid[0]) // month
    measured = np.isfinite(values)
    counts = np.bincount(position[measured], minlength=grid.size)
    sums = np.bincount(position[measured], values[measured], minlength=grid.size)
    means = np.divide(sums, counts, out=np.full(grid.size, np.nan), where=counts > 0)
    return grid.astype("datetime64[D]"), means
