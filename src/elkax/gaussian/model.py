"""A linear-Gaussian model and its data, constant and time-varying parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array


class Model(NamedTuple):
    r"""A linear-Gaussian model with uncorrelated measurement errors and its data.

    $z_0 \sim N(m_0, P_0)$, $z_t = F_tz_{t-1} + c_t + N(0, Q_t)$,
    $y_{ti} = h_{ti}^\top z_t + N(0, r_{ti})$ for t = 0, ..., T - 1. A field with a leading time
    axis varies in time, one without is the same at all times; index 0 of F, c and Q is not used.

    Attributes:
        initial_mean: $m_0$ (D,).
        initial_cov: $P_0$ (D, D), stored in the form in use.
        weights: $F$, (D, D) or (T, D, D).
        offset: $c$, (D,) or (T, D).
        noise: $Q$, (D, D) or (T, D, D), stored in the form in use.
        rows: $H$, (N, D) or (T, N, D).
        variances: $r$, (N,) or (T, N).
        values: $y$ (T, N) less its offsets; any finite number where missing.
        observed: (T, N), False where missing.
        first: (T,), 1 at t = 0 and 0 later, a real number.
        valid: (T,), False in padding, where nothing happens; None if there is none.
        correlated: $R$, (N, N) or (T, N, N), in place of `variances`, which is then None; to be
            resolved by `uncorrelate` before anything is run.
        unknown: $U$ (D + d, d): $z_0$ is $N(m_0, P_0)$ plus the first D rows times effects of which
            nothing is known; below them the identity. None if there are none.
        age: (T, D) in how many steps up to t F has changed each state, a real number; None without
            `unknown`.
    """

    initial_mean: Array
    initial_cov: Array
    weights: Array
    offset: Array
    noise: Array
    rows: Array
    variances: Array | None
    values: Array
    observed: Array
    first: Array
    valid: Array | None = None
    correlated: Array | None = None
    unknown: Array | None = None
    age: Array | None = None


# Number of axes of each field without time.
RANKS = (1, 2, 2, 1, 2, 2, 1, 1, 1, 0, 0, 2, 2, 1)
# Fields that no covariance depends on.
MEANS_AND_DATA = ("initial_mean", "offset", "values")


def over_time(function: Callable[[Any, int], Any], model: Model) -> Model:
    """Apply `function(field, rank)` to the fields that vary in time; the others become None."""
    return Model(
        *(
            function(field, rank) if field is not None and field.ndim > rank else None
            for field, rank in zip(model, RANKS, strict=True)
        )
    )


def constant_part(model: Model) -> Model:
    """Keep the fields that are the same at all times; the others become None."""
    return Model(
        *(
            field if field is not None and field.ndim == rank else None
            for field, rank in zip(model, RANKS, strict=True)
        )
    )


def merge(fixed: Model, varying: Model) -> Model:
    """Put the constant and the time-varying fields together."""
    return Model(*(f if v is None else v for f, v in zip(fixed, varying, strict=True)))
