"""Small real series that come with the package, for examples and tests."""

from elkax.datasets.series import Series, load_co2, load_nile, load_sunspots

__all__ = ["Series", "load_co2", "load_nile", "load_sunspots"]
