"""Expected sufficient statistics of a linear-Gaussian model, laid out as dynamax's M-step wants."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import ParamsLGSSM, PosteriorGSSMSmoothed
from jaxtyping import Array, Float

from elkax.models.completion import Completed
from elkax.smoothers.prepare import Problem


class Left(NamedTuple):
    r"""What a regression leaves of its target: $r = y - Wx$ of the current parameters.

    Beside the moments of y itself, because those of r lose no digits where y is far from zero, and
    because W may vary in time where it is known.

    Attributes:
        cross: $\sum E xr^\top$ (p, q).
        second: $\sum E rr^\top$ (q, q).
    """

    cross: Array
    second: Array


@jax.tree_util.register_pytree_node_class
class Statistics(tuple):
    r"""dynamax's statistics of initial state, dynamics and emissions, and what is left of each.

    Attributes:
        left: a `Left` for each of the three. The initial state counts as a regression on the
            number one, its mean being W.
    """

    left: tuple[Left, Left, Left]

    def __new__(cls, layout: Iterable, left: Iterable = ()) -> "Statistics":
        """Put both together."""
        self = super().__new__(cls, layout)
        self.left = tuple(left)
        return self

    def tree_flatten(self) -> tuple[tuple, None]:
        """Give all arrays."""
        return (tuple(self), self.left), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple) -> "Statistics":
        """Put the arrays back."""
        return cls(*children)


def expected_statistics(
    posterior: PosteriorGSSMSmoothed,
    emissions: Completed,
    inputs: Float[Array, "T U"],
    problem: Problem,
    *,
    has_dynamics_bias: bool,
    has_emissions_bias: bool,
) -> Statistics:
    r"""Sum the expected products that the two regressions of an M-step need.

    Args:
        posterior: smoothed moments of the states.
        emissions: moments of the emissions given what was observed.
        inputs: $u_{1:T}$.
        problem: the current parameters.
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
    spread = emissions.emissions
    emission = (
        _add_to_corner(_product(now, now), jnp.sum(covariances, axis=0)),
        _add_to_corner(_product(now, emissions.means), spread.cross),
        _product(emissions.means, emissions.means) + spread.covariance,
        length,
    )
    left = (
        _left_of_start(posterior, problem),
        _left_of_dynamics(posterior, before, problem),
        _left_of_emissions(means, now, emissions, problem),
    )
    return Statistics((first, dynamics, emission), left)


def left_by(params: ParamsLGSSM, statistics: tuple) -> tuple[Left, Left, Left]:
    r"""Compute what constant parameters leave from statistics in dynamax's layout.

    $\sum E xr^\top = S_{xy} - S_{xx}W^\top$ and
    $\sum E rr^\top = S_{yy} - WS_{xy} - S_{xy}^\top W^\top + WS_{xx}W^\top$.
    """
    (total, second, count), dynamics, emissions = statistics

    def leave(weights: Array, xx: Array, xy: Array, yy: Array) -> Left:
        explained = _times(weights, xy)
        fitted = _times(_times(weights, xx), weights.T)
        return Left(xy - _times(xx, weights.T), yy - explained - explained.T + fitted)

    def matrix(group: Any, size: int) -> Array:
        rows, columns = group.weights.shape
        inputs, bias = group.input_weights, group.bias
        if inputs is None:
            inputs = jnp.zeros((rows, size - columns - (bias is not None)))
        bias = jnp.zeros((rows, 0)) if bias is None else jnp.asarray(bias)[:, None]
        weights = jnp.concatenate((group.weights, inputs, bias), axis=1)
        return jnp.pad(weights, ((0, 0), (0, max(0, size - weights.shape[1]))))[:, :size]

    count = jnp.reshape(jnp.asarray(count, second.dtype), (1, 1))
    return (
        leave(jnp.asarray(params.initial.mean)[:, None], count, total[None], second),
        leave(matrix(params.dynamics, len(dynamics[0])), *dynamics[:3]),
        leave(matrix(params.emissions, len(emissions[0])), *emissions[:3]),
    )


def _left_of_start(posterior: PosteriorGSSMSmoothed, problem: Problem) -> Left:
    change = posterior.smoothed_means[0] - problem.model.initial_mean
    return Left(change[None], posterior.smoothed_covariances[0] + jnp.outer(change, change))


def _left_of_dynamics(posterior: PosteriorGSSMSmoothed, before: Array, problem: Problem) -> Left:
    r"""Sum products of $r_t = z_t - F_tz_{t-1} - c_t$ over t = 2, ..., T."""
    means, covariances = posterior.smoothed_means, posterior.smoothed_covariances
    weights = _from_second(problem.model.weights, 2)
    residual = means[1:] - _from_second(problem.model.offset, 1)
    residual = residual - jnp.einsum("...ij,...j->...i", weights, means[:-1], precision="highest")
    lagged = jnp.asarray(posterior.smoothed_cross_covariances)
    lagged = lagged - means[:-1, :, None] * means[1:, None, :]
    # Cov[z_{t-1}, r_t] and Cov[r_t].
    cross = lagged - _times(covariances[:-1], jnp.swapaxes(weights, -1, -2))
    explained = _times(weights, lagged + cross)
    second = covariances[1:] - 0.5 * (explained + jnp.swapaxes(explained, -1, -2))
    return Left(
        _add_to_corner(_product(before, residual), jnp.sum(cross, axis=0)),
        _product(residual, residual) + jnp.sum(second, axis=0),
    )


def _left_of_emissions(means: Array, now: Array, emissions: Completed, problem: Problem) -> Left:
    r"""Sum products of $r_t = y_t - H_tz_t - c_t$ over all t."""
    fitted = jnp.einsum("...nd,...d->...n", problem.weights, means, precision="highest")
    residual = emissions.means - fitted - problem.offset
    return Left(
        _add_to_corner(_product(now, residual), emissions.errors.cross),
        _product(residual, residual) + emissions.errors.covariance,
    )


def _from_second(x: Array, rank: int) -> Array:
    """Drop the first time step of what varies in time."""
    return x[1:] if x.ndim > rank else x


def _regressors(states: Array, inputs: Array, has_bias: bool) -> Array:
    columns = [states, inputs]
    if has_bias:
        columns.append(jnp.ones((states.shape[0], 1), states.dtype))
    return jnp.concatenate(columns, axis=1)


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _product(a: Array, b: Array) -> Array:
    return _times(a.T, b)


def _add_to_corner(total: Array, part: Array) -> Array:
    """Add to the leading rows and columns."""
    return total.at[: part.shape[0], : part.shape[1]].add(part)
