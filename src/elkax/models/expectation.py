"""Expected sufficient statistics of a linear-Gaussian model, laid out as dynamax's M-step wants."""

import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import PosteriorGSSMSmoothed
from jaxtyping import Array, Float

from elkax.models.completion import Completed


def expected_statistics(
    posterior: PosteriorGSSMSmoothed,
    emissions: Completed,
    inputs: Float[Array, "T U"],
    *,
    has_dynamics_bias: bool,
    has_emissions_bias: bool,
) -> tuple[tuple, tuple, tuple]:
    r"""Sum the expected products that the two regressions of an M-step need.

    Args:
        posterior: smoothed moments of the states.
        emissions: moments of the emissions given what was observed.
        inputs: $u_{1:T}$.
        has_dynamics_bias: whether the regressors of the dynamics end with a one.
        has_emissions_bias: whether those of the emissions do.

    Returns:
        Initial state $(E z_1, E z_1z_1^\top, 1)$; dynamics, with $x_t = (z_{t-1}, u_t, 1)$ and
        t = 2, ..., T: $(\sum E xx^\top, \sum E xz_t^\top, \sum E z_tz_t^\top, T - 1)$; emissions,
        with $x_t = (z_t, u_t, 1)$ and all t: $(\sum E xx^\top, \sum E xy_t^\top,
        \sum E y_ty_t^\top, T)$.
    """
    means, covariances = posterior.smoothed_means, posterior.smoothed_covariances
    length, state_dim = means.shape
    cross = jnp.asarray(posterior.smoothed_cross_covariances)
    first = (means[0], covariances[0] + jnp.outer(means[0], means[0]), 1)

    before = _regressors(means[:-1], inputs[1:], has_dynamics_bias)
    later = _product(before[:, state_dim:], means[1:])
    dynamics = (
        _add_to_corner(_product(before, before), jnp.sum(covariances[:-1], axis=0)),
        jnp.concatenate((jnp.sum(cross, axis=0), later)),
        _product(means[1:], means[1:]) + jnp.sum(covariances[1:], axis=0),
        length - 1,
    )

    now = _regressors(means, inputs, has_emissions_bias)
    emission = (
        _add_to_corner(_product(now, now), jnp.sum(covariances, axis=0)),
        _add_to_corner(_product(now, emissions.means), emissions.cross),
        _product(emissions.means, emissions.means) + emissions.covariance,
        length,
    )
    return first, dynamics, emission


def _regressors(states: Array, inputs: Array, has_bias: bool) -> Array:
    columns = [states, inputs]
    if has_bias:
        columns.append(jnp.ones((states.shape[0], 1), states.dtype))
    return jnp.concatenate(columns, axis=1)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a.T, b, precision="highest")


def _add_to_corner(total: Array, part: Array) -> Array:
    """Add to the leading rows and columns."""
    return total.at[: part.shape[0], : part.shape[1]].add(part)
