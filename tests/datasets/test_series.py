import numpy as np
import pytest
import statsmodels.api as sm

from elkax.datasets import load_co2, load_nile, load_sunspots


@pytest.mark.parametrize(
    ("load", "module", "column", "first", "last"),
    [
        (load_nile, sm.datasets.nile, "volume", 1871, 1970),
        (load_sunspots, sm.datasets.sunspots, "SUNACTIVITY", 1700, 2008),
    ],
    ids=["nile", "sunspots"],
)
def test_annual_series_equal_statsmodels(load, module, column, first, last):
    series = load()
    np.testing.assert_array_equal(series.values, module.load_pandas().data[column])
    np.testing.assert_array_equal(series.times, np.arange(first, last + 1))
    assert series.values.dtype == np.float64


@pytest.mark.parametrize("frequency", ["weekly", "monthly"])
def test_co2_equals_statsmodels_resampled(frequency):
    # statsmodels dates the same weeks; "MS" is the start of the calendar month.
    expected = sm.datasets.co2.load_pandas().data["co2"]
    if frequency == "monthly":
        expected = expected.resample("MS").mean()
    series = load_co2(frequency)
    np.testing.assert_array_equal(series.times, expected.index.to_numpy("datetime64[D]"))
    # Sums of at most five numbers in another order: a few roundings apart.
    np.testing.assert_allclose(series.values, expected, rtol=1e-14)
    assert series.times.dtype == "datetime64[D]"
    assert series.values.dtype == np.float64


def test_co2_keeps_its_gaps():
    weekly, monthly = load_co2(), load_co2("monthly")
    assert np.isnan(weekly.values).sum() == 59
    assert np.isnan(monthly.values).sum() == 5
    assert np.all(np.diff(weekly.times) == np.timedelta64(7, "D"))


def test_unknown_frequency_is_refused(unchecked):
    with pytest.raises(ValueError, match="'weekly' or 'monthly', got 'daily'"):
        load_co2("daily")
