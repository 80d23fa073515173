"""What a step of the Kalman filter starts from and gives, and what its output says of the data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.square_root import Turn
from elkax.scan import lanes


class State(NamedTuple):
    r"""What a step of the filter starts from.

    Attributes:
        mean: $m$ (D,).
        low: (D,) what rounding left out of it.
        cov: $P$, stored in the form in use, perhaps `exact`.
        error: $E$ (D, D), see `elkax.gaussian.rounding`; None if no entry is without error.
        unknown: $U$ (D + d, d), see `elkax.gaussian.unknown`; None if there never was any.
    """

    mean: Array
    low: Array
    cov: Array
    error: Array | None = None
    unknown: Array | None = None


class FilterOutput(NamedTuple):
    r"""What one step of the filter gives.

    Attributes:
        mean: $m_{t|t}$ (D,), rounded.
        low: (D,) what that rounding left out.
        cov: $P_{t|t}$ (D, D), stored in the form in use.
        gain: (N, D) gains $k_i$ of the entries, 0 where nothing is learned.
        residual: (N,) uncorrelated scalar innovations $v_i$; 0 where missing, where they tell of
            something that was unknown, and where their variance is zero, unless they contradict
            what is known.
        variance: (N,) their variances $s_i$; 1 where missing, 0 where it is zero, and in the
            place of an infinite one $-f^\top f$, see `elkax.gaussian.unknown`.
        observed: (N,) False where missing.
        unknown: $U$ after the step, None if there never was any.
        turn: how the noise of the earlier state turned into this one's, None if not asked for.
    """

    mean: Array
    low: Array
    cov: Array
    gain: Array
    residual: Array
    variance: Array
    observed: Array
    unknown: Array | None = None
    turn: Turn | None = None


def find_precision(observed: Array, variance: Array) -> Array:
    """Compute $1/s_i$ over lanes, 0 where missing or where the variance is zero."""
    observed, variance = lanes.align(observed, 1, variance, 1)
    used = observed & (variance != 0)
    return used / jnp.where(used, variance, 1.0)


def standardize(output: FilterOutput) -> Array:
    r"""Compute $v_i/\sqrt{s_i}$, 0 where missing or without variance; same shape as residuals."""
    zero = output.variance == 0
    return output.residual * jax.lax.rsqrt(jnp.where(zero, 1.0, output.variance)) * ~zero


def log_density(output: FilterOutput, axis: int = -1) -> Array:
    r"""Compute $\log p(y_t \mid y_{1:t-1})$ of the observed entries.

    An entry without variance is left out, as the density on the support of the data has it;
    $-\infty$ where one contradicts what is known.

    Args:
        output: of the filter.
        axis: where the entries of one time are.
    """
    zero = output.variance == 0
    s = jnp.where(zero, 1.0, jnp.abs(output.variance))
    terms = -0.5 * (jnp.log(2 * jnp.pi * s) + jnp.where(zero, 0.0, output.residual) ** 2 / s)
    terms = jnp.where(zero, jnp.where(output.residual == 0, 0.0, -jnp.inf), terms)
    return jnp.sum(jnp.where(output.observed, terms, 0.0), axis=axis)
