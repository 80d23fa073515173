"""Smoothing of a filtered sequence, one way for each form of covariances."""

from typing import Any, NamedTuple

from jaxtyping import Array

from elkax.gaussian.costates import smooth_by_costates
from elkax.gaussian.covariance import Covariance
from elkax.gaussian.model import Model
from elkax.gaussian.output import FilterOutput
from elkax.gaussian.whitened import smooth_by_factors
from elkax.scan import Backend


class Smoothed(NamedTuple):
    r"""Moments given all observations.

    Attributes:
        mean: $E[z_t \mid y]$ (T, D).
        cov: $\mathrm{Cov}[z_t \mid y]$ (T, D, D).
        lagged: $\mathrm{Cov}[z_t, z_{t+1} \mid y]$ (T - 1, D, D).
    """

    mean: Array
    cov: Array
    lagged: Array


def smooth(model: Model, filtered: FilterOutput, form: Any, backend: Backend | None) -> Smoothed:
    """Smooth a filtered sequence.

    By costates where covariances are stored as themselves, from factor to factor where they are
    factors. Neither solves with a covariance of states, so every rank is ordinary.

    Args:
        model: the model, covariances themselves, leading time axes.
        filtered: what the filter gave for it, covariances stored in `form`.
        form: how covariances are stored.
        backend: how to run the backward recurrence.

    Returns:
        Smoothed moments, covariances themselves.
    """
    if isinstance(form, Covariance):
        return Smoothed(*smooth_by_costates(model, filtered, backend))
    return Smoothed(*smooth_by_factors(model, filtered, form, backend))
