"""The M-step of a linear-Gaussian model of which some parameters are known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from dynamax.parameters import ParameterProperties
from jaxtyping import Array, Float

from elkax.models.expectation import Left, Statistics, left_by

# How many axes each entry has that does not vary in time; R is the exception, see `varies`.
RANKS = {"mean": 1, "weights": 2, "input_weights": 2, "bias": 1, "cov": 2}


def maximise(
    params: ParamsLGSSM,
    props: ParamsLGSSM,
    batch_stats: tuple,
    *,
    biases: tuple[bool, bool],
    diffuse: tuple[bool, ...] = (),
) -> ParamsLGSSM:
    r"""Maximise the expected log-likelihood over the trainable parameters, given the others.

    Each of initial state, dynamics and emissions is a regression $y_t = Wx_t + N(0, \Sigma)$. With
    r what the current W leaves, the columns of W that are learned move by
    $S_{rx}S_{xx}^{-1}$ over these columns, and $\Sigma$ is the mean of $E rr^\top$ at the new W, or
    its diagonal if variances alone are given. Directions in which $S_{xx}$ is singular stay as
    they are, and so does a variance that is exactly zero.

    Args:
        params: the parameters that the statistics were computed with.
        props: which are trainable.
        batch_stats: statistics of `e_step` with a leading batch axis, or dynamax's.
        biases: whether the regressors of dynamics and emissions end with a one.
        diffuse: which states start exactly diffuse; their initial moments stay as they are.

    Raises:
        ValueError: if a trainable parameter varies in time, or depends on a covariance that does.
    """
    free = trainable(params, props)
    _check_constant(params, free)
    total = jax.tree.map(lambda each: jnp.sum(each, axis=0), batch_stats)
    left = total.left if isinstance(total, Statistics) else _left_by(params, total, free)
    initial, dynamics, emissions = total
    return ParamsLGSSM(
        initial=_start(params.initial, free, left[0], initial[2], diffuse),
        dynamics=_regression("dynamics", params, free, dynamics, left[1], biases[0]),
        emissions=_regression("emissions", params, free, emissions, left[2], biases[1]),
    )


def trainable(params: ParamsLGSSM, props: ParamsLGSSM) -> frozenset[tuple[str, str]]:
    """Name the parameters that hold numbers and are trainable, as (group, name).

    Raises:
        TypeError: if one of them has no properties.
    """
    names = []
    for group, values in params._asdict().items():
        for name, value in values._asdict().items():
            prop = getattr(getattr(props, group), name)
            if value is None:
                continue
            if not isinstance(prop, ParameterProperties):
                raise TypeError(
                    f"props.{group}.{name} must be dynamax's ParameterProperties, got {prop!r}"
                )
            if prop.trainable and np.size(value):
                names.append((group, name))
    return frozenset(names)


def varies(params: ParamsLGSSM, group: str, name: str) -> bool:
    """Tell whether a parameter, an array, has a time axis."""
    value = getattr(getattr(params, group), name)
    if value is None:
        return False
    if (group, name) == ("emissions", "cov"):
        # (N,), (N, N), (T, N) or (T, N, N).
        size = value.shape[-1]
        return value.ndim == 3 or (value.ndim == 2 and value.shape != (size, size))
    return value.ndim > RANKS[name]


def _check_constant(params: ParamsLGSSM, free: frozenset[tuple[str, str]]) -> None:
    """Raise if what is to be learned cannot be found from sums over time."""
    for group, name in sorted(free):
        shape = getattr(getattr(params, group), name).shape
        if varies(params, group, name):
            raise ValueError(
                f"params.{group}.{name} varies in time, shape {shape}, and fit_em learns constant "
                f"parameters only: freeze it with props.{group}.{name}.trainable = False, or learn "
                "it by fit_sgd"
            )
        if group != "initial" and name != "cov" and varies(params, group, "cov"):
            raise ValueError(
                f"params.{group}.cov varies in time, and then fit_em cannot learn params.{group}."
                f"{name}: freeze it with props.{group}.{name}.trainable = False, or use fit_sgd"
            )


def _left_by(
    params: ParamsLGSSM, statistics: tuple, free: frozenset[tuple[str, str]]
) -> tuple[Left, Left, Left]:
    """Compute what the parameters leave from statistics in dynamax's layout."""
    for group in ("dynamics", "emissions"):
        for name in ("weights", "input_weights", "bias"):
            if varies(params, group, name) and free:
                raise ValueError(
                    f"params.{group}.{name} varies in time: m_step then needs the statistics that "
                    "e_step of this class returns, got dynamax's"
                )
    return left_by(params, statistics)


def _start(
    initial: Any,
    free: frozenset[tuple[str, str]],
    left: Left,
    count: Array,
    diffuse: tuple[bool, ...],
) -> Any:
    """Move mean and covariance of the initial state, except of diffuse states."""
    proper = ~np.asarray(diffuse or (False,) * initial.mean.shape[0])
    second = left.second / count
    if ("initial", "mean") in free:
        change = left.cross[0] / count
        change = jnp.where(proper & _is_random(initial.cov), change, 0.0)
        explained = jnp.outer(change, left.cross[0] / count - 0.5 * change)
        second = second - explained - explained.T
        initial = initial._replace(mean=initial.mean + change)
    if ("initial", "cov") in free:
        cov = _covariance(second, initial.cov)
        both = proper[:, None] & proper[None]
        initial = initial._replace(cov=jnp.where(both, cov, initial.cov))
    return initial


def _regression(
    group: str,
    params: ParamsLGSSM,
    free: frozenset[tuple[str, str]],
    statistics: tuple,
    left: Left,
    has_bias: bool,
) -> Any:
    """Move the weights and the covariance of dynamics or emissions."""
    values = getattr(params, group)
    xx, count = statistics[0], statistics[3]
    size, states = xx.shape[0], values.weights.shape[-1]
    columns = {"weights": np.arange(states), "input_weights": np.arange(states, size - has_bias)}
    if has_bias:
        columns["bias"] = np.arange(size - 1, size)
    columns = {name: where for name, where in columns.items() if (group, name) in free}
    second = left.second
    if columns:
        chosen = np.concatenate(list(columns.values()))
        part = xx[np.ix_(chosen, chosen)]
        change = _solve(part, left.cross[chosen])
        change = jnp.where(_is_random(values.cov), change, 0.0)
        explained = _times(change.T, left.cross[chosen] - 0.5 * _times(part, change))
        second = second - explained - explained.T
        matrix = jnp.zeros_like(left.cross).at[chosen].set(change).T
        for name, where in columns.items():
            value = getattr(values, name)
            moved = value + jnp.reshape(matrix[:, where], value.shape)
            values = values._replace(**{name: moved})
    if (group, "cov") in free:
        # Without a single step, as of one observation for the dynamics, nothing is known.
        some = count > 0
        cov = _covariance(second / jnp.where(some, count, 1), values.cov)
        values = values._replace(cov=jnp.where(some, cov, values.cov))
    return values


def _is_random(cov: Array) -> Array:
    """Tell which variances are not exactly zero: EM cannot move what has none, but rounding can."""
    return (cov if cov.ndim == 1 else jnp.diagonal(cov)) != 0.0


def _covariance(second: Float[Array, "n n"], old: Array) -> Array:
    """Make a covariance, or variances if the old one holds these, of the mean of the squares."""
    random = _is_random(old)
    if old.ndim == 1:
        return jnp.where(random, jnp.maximum(jnp.diagonal(second), 0.0), 0.0)
    cov = jnp.where(random[:, None] & random[None], 0.5 * (second + second.T), 0.0)
    # In correlations, where no unit makes one variance hide another's rounding.
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(cov), 0.0))
    safe = jnp.where(scale > 0, scale, 1.0)
    values, vectors = jnp.linalg.eigh(cov / (safe[:, None] * safe))
    clipped = _times(vectors * jnp.maximum(values, 0.0), vectors.T) * (scale[:, None] * scale)
    return jnp.where(values[0] < 0, 0.5 * (clipped + clipped.T), cov)


def _solve(a: Float[Array, "p p"], b: Float[Array, "p q"]) -> Float[Array, "p q"]:
    """Solve normal equations; no step in directions in which the matrix is zero to rounding."""
    scale = jnp.sqrt(jnp.diagonal(a))
    never = scale == 0.0
    scale = jnp.where(never, 1.0, scale)
    values, vectors = jnp.linalg.eigh(a / (scale[:, None] * scale))
    known = values > 4 * a.shape[0] * jnp.finfo(a.dtype).eps * values[-1]
    inverse = jnp.where(known, 1.0 / jnp.where(known, values, 1.0), 0.0)
    x = _times(vectors * inverse, _times(vectors.T, b / scale[:, None]))
    return jnp.where(never[:, None], 0.0, x / scale[:, None])


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
