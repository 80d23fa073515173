"""Regression component: covariates as emission weights that change with time."""

import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jax.typing import ArrayLike
from jaxtyping import Num

from elkax.models.component import (
    Numbers,
    component,
    concrete,
    floating_dtype,
    initial_state,
    variances,
)
from elkax.smoothers.checks import real_array


def regression(
    covariates: Num[ArrayLike, "T K"],
    coefficient_variance: Numbers = 0.0,
    emission_variance: ArrayLike = 0.0,
    initial_variance: Numbers | None = None,
    *,
    initial_mean: Numbers | None = None,
) -> ParamsLGSSM:
    r"""Build a regression whose coefficients are states, constant or random walks.

    $$y_t = x_t^\top \beta_t + \varepsilon_t,\quad \varepsilon_t \sim N(0, \sigma^2_\varepsilon);
      \qquad \beta_t = \beta_{t-1} + \zeta_t,\quad \zeta_t \sim N(0, \mathrm{diag}(q))$$

    A forecast needs the future covariates: build the parameters with the rows of the observed and
    of the future time steps.

    Args:
        covariates: $x_{1:T}$; row t belongs to $y_t$. There is no intercept unless a column of ones
            (or a level) gives one.
        coefficient_variance: $q$, scalar or (K,); zero for constant coefficients.
        emission_variance: $\sigma^2_\varepsilon$, scalar.
        initial_variance: variances of $\beta_1$, scalar or (K,); exactly diffuse, with no prior
            knowledge in whatever units, if None, and where infinite.
        initial_mean: mean of $\beta_1$: None for zero, a scalar, or (K,). Only with
            `initial_variance`.

    Returns:
        Parameters with K states $\beta_t$ and emission weights of shape (T, 1, K).

    Raises:
        ValueError: if `covariates` is not a matrix with at least one row and column, or is known
            not to be finite, on other wrong shapes, a variance known to be negative, or a mean
            given for a diffuse start.
        TypeError: if `covariates` does not hold real numbers.

    References:
        Durbin & Koopman (2012), "Time Series Analysis by State Space Methods", Sec. 3.6.
    """
    covariates = real_array("covariates", covariates)
    dtype = floating_dtype(
        covariates, coefficient_variance, emission_variance, initial_variance, initial_mean
    )
    rows = covariates.astype(dtype)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"covariates must be of shape (T, K), neither zero, got {rows.shape}")
    known = concrete(covariates)
    if known is not None and not np.isfinite(known).all():
        t, k = np.argwhere(~np.isfinite(known))[0]
        raise ValueError(
            f"covariates must be finite, got {known[t, k]} at time index {t}, column {k}; where y "
            "is missing too any number will do, for instance 0"
        )
    size = rows.shape[1]
    return component(
        initial=initial_state(initial_mean, initial_variance, dtype, size),
        weights=np.eye(size),
        cov=jnp.diag(variances("coefficient_variance", coefficient_variance, dtype, size)),
        emission_weights=rows[:, None, :],
        emission_variance=variances("emission_variance", emission_variance, dtype),
    )
