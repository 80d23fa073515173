r"""Trajectories of least cost: their conditions, exact Hessian, derivatives, and Laplace's value.

With multipliers $\lambda_t$ of the steps and $\mu_t$ of the emissions the MAP cost is the
stationary value of

$$\mathcal L = \sum_t \lambda_t^\top(z_t - f(z_{t-1})) - \tfrac12\lambda_t^\top Q_t\lambda_t
  + \mu_t^\top(y_t - h(z_t)) - \tfrac12\mu_t^\top R_t\mu_t - \log p(y_t \mid z_t),$$

$f(z_0) = m_0$ and $Q_1 = P_0$, where an emission is either Gaussian or has a log-density. Nothing
is inverted, so singular covariances are ordinary. The Hessian K of $\mathcal L$ in
$(\lambda, z, \mu)$ is block-tridiagonal, and $|\det K| = |H|\prod_t|Q_t||R_t|$ with H the exact
Hessian of the cost in z, second derivatives of f and h included.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from elkax.linearize import Datum, Taylor, hessian
from elkax.linearize.emissions import MomentEmission, Residual
from elkax.smoothers.prepare import real_array
from elkax.smoothers.system import Data, NonlinearParams, System, prepare_system

_product = partial(jnp.matmul, precision="highest")


class Point(NamedTuple):
    r"""A trajectory with its multipliers.

    Attributes:
        state: $z$ (T, D).
        dynamics: $\lambda$ (T, D).
        emission: $\mu$ (T, K), K = 0 for a log-density.
    """

    state: Array
    dynamics: Array
    emission: Array


class Blocks(NamedTuple):
    r"""The blocks of K, leading axis T.

    Attributes:
        weights: $F_t$ (D, D), the derivative of the step into $z_t$, zero at first.
        noise: $Q_t$ (D, D).
        curvature: second derivative of $\mathcal L$ in $z_t$ (D, D).
        rows: $-H_t$ (K, D).
        errors: $R_t$ (K, K), the identity where missing.
    """

    weights: Array
    noise: Array
    curvature: Array
    rows: Array
    errors: Array


class Functions(NamedTuple):
    """The functions of a model that the cost depends on.

    Attributes:
        advance: (state, inputs) to the next state.
        misfit: (datum, state) to the residual (K,), zero where missing, and the negative
            log-density.
    """

    advance: Callable[[Array, PyTree | None], Array]
    misfit: Callable[[Datum, Array], tuple[Array, Array]]


def _functions(system: System) -> Functions:
    def misfit(datum: Datum, state: Array) -> tuple[Array, Array]:
        residual, extra = system.emission.misfit(Taylor(), datum, state, None)
        if not system.emission.quadratic:
            return residual[:0], extra
        return jnp.where(datum.observed, residual, 0.0), extra

    return Functions(system.advance, misfit)


def _noise(data: Data) -> Array:
    """Return $P_0, Q_2, ..., Q_T$, (T, D, D)."""
    noise = jnp.broadcast_to(data.noise, (len(data.values), *data.noise.shape[-2:]))
    return noise.at[0].set(data.initial_cov)


def _errors(data: Data, size: int) -> Array:
    """Return $R$ (T, K, K), the identity where missing."""
    if size == 0:
        return jnp.zeros((len(data.values), 0, 0), data.noise.dtype)
    noise = data.each().noise
    assert noise is not None
    eye = jnp.eye(size, dtype=noise.dtype)
    full = noise if noise.ndim == 3 else noise[:, :, None] * eye
    return jnp.where(data.observed[:, :, None] & data.observed[:, None], full, eye)


def _dynamics_errors(functions: Functions, data: Data, states: Array) -> Array:
    predicted = jax.vmap(functions.advance)(states[:-1], data.later_inputs())
    return states - jnp.concatenate((data.initial_mean[None], predicted))


def _lagrangian(functions: Functions, data: Data, point: Point) -> Array:
    states, duals, emission_duals = point
    residual, extra = data.map_data(functions.misfit, states)

    def half_square(matrix: Array, x: Array) -> Array:
        return 0.5 * jnp.einsum("ti,tij,tj->", x, matrix, x, precision="highest")

    value = jnp.sum(duals * _dynamics_errors(functions, data, states))
    value = value - half_square(_noise(data), duals) + jnp.sum(emission_duals * residual)
    errors = _errors(data, residual.shape[1])
    return value - half_square(errors, emission_duals) + jnp.sum(extra)


def _weights(functions: Functions, data: Data, states: Array) -> Array:
    """Return $F_t$ (T, D, D), the derivative of the step into $z_t$, zero at first."""
    weights = jax.vmap(jax.jacfwd(functions.advance))(states[:-1], data.later_inputs())
    return jnp.concatenate((jnp.zeros((1, *weights.shape[1:]), weights.dtype), weights))


def _rows(functions: Functions, data: Data, states: Array) -> tuple[Array, Array]:
    """Return the derivatives of residuals (T, K, D) and negative log-densities (T, D)."""
    return data.map_data(jax.jacfwd(functions.misfit, argnums=1), states)


def _gradient(functions: Functions, data: Data, point: Point) -> Point:
    r"""Differentiate $\mathcal L$, by forward mode."""
    states, duals, emission_duals = point
    residual, _ = data.map_data(functions.misfit, states)
    rows, slopes = _rows(functions, data, states)
    # F_{t+1} at t; the last one meets a zero.
    following = jnp.roll(_weights(functions, data, states), -1, axis=0)
    after = jnp.roll(duals, -1, axis=0)

    def times(matrices: Array, x: Array) -> Array:
        return jnp.einsum("tij,tj->ti", matrices, x, precision="highest")

    return Point(
        duals - times(following.mT, after) + times(rows.mT, emission_duals) + slopes,
        _dynamics_errors(functions, data, states) - times(_noise(data), duals),
        residual - times(_errors(data, residual.shape[1]), emission_duals),
    )


def _blocks(functions: Functions, data: Data, point: Point) -> Blocks:
    states, duals, emission_duals = point

    def step(state: Array, dual: Array, inputs: PyTree | None) -> Array:
        return -hessian(lambda z: jnp.vdot(dual, functions.advance(z, inputs)))(state)

    def emission(datum: Datum, state: Array, dual: Array) -> Array:
        def cost(z: Array) -> Array:
            residual, extra = functions.misfit(datum, z)
            return jnp.vdot(dual, residual) + extra

        return hessian(cost)(state)

    of_steps = jax.vmap(step)(states[:-1], duals[1:], data.later_inputs())
    curvature = data.map_data(emission, states, emission_duals)
    rows, _ = _rows(functions, data, states)
    return Blocks(
        weights=_weights(functions, data, states),
        noise=_noise(data),
        curvature=curvature.at[:-1].add(of_steps),
        rows=rows,
        errors=_errors(data, rows.shape[1]),
    )


def _pivots(blocks: Blocks) -> Array:
    r"""Eliminate forward in time: the pivots of K, (T, 2D + K, 2D + K).

    The pivot at t has $-(Q_t + F_tZ_{t-1}F_t^\top)$ in place of $-Q_t$, Z being the state's block
    of the inverse of the pivot before: a Kalman filter with the exact curvature.
    """
    size = blocks.noise.shape[-1]
    eye = jnp.eye(size, dtype=blocks.noise.dtype)

    def eliminate(before: Array, block: Blocks) -> tuple[Array, Array]:
        predicted = block.noise + _product(_product(block.weights, before), block.weights.T)
        apart = jnp.zeros((size, len(block.errors)), eye.dtype)
        pivot = jnp.block(
            [
                [-predicted, eye, apart],
                [eye, block.curvature, block.rows.T],
                [apart.T, block.rows, -block.errors],
            ]
        )
        return jnp.linalg.inv(pivot)[size : 2 * size, size : 2 * size], pivot

    return jax.lax.scan(eliminate, jnp.zeros_like(eye), blocks)[1]


def _solve(blocks: Blocks, pivots: Array, point: Point) -> Point:
    """Solve Kx = b for b of the shape of a point, by a pass forward and one backward."""
    size = blocks.noise.shape[-1]
    b = jnp.concatenate((point.dynamics, point.state, point.emission), axis=1)
    # F_{t+1} at t; the last one meets a zero.
    following = jnp.roll(blocks.weights, -1, axis=0)

    def forward(before: Array, x: tuple) -> tuple[Array, Array]:
        b, weights, pivot = x
        b = b.at[:size].add(_product(weights, before))
        return jnp.linalg.solve(pivot, b)[size : 2 * size], b

    def backward(after: Array, x: tuple) -> tuple[Array, Array]:
        b, weights, pivot = x
        b = b.at[size : 2 * size].add(_product(weights.T, after))
        solved = jnp.linalg.solve(pivot, b)
        return solved[:size], solved

    start = jnp.zeros(size, b.dtype)
    _, b = jax.lax.scan(forward, start, (b, blocks.weights, pivots))
    _, x = jax.lax.scan(backward, start, (b, following, pivots), reverse=True)
    return Point(x[:, size : 2 * size], x[:, :size], x[:, 2 * size :])


def _complete(functions: Functions, data: Data, means: Array, num_errors: int) -> Point:
    """Find the multipliers of a trajectory of least cost."""
    zero = jnp.zeros((len(means), num_errors), means.dtype)
    point = Point(means, jnp.zeros_like(means), zero)
    # The conditions are linear in the multipliers, and any curvature will do where z solves them.
    change = _newton(functions, data, point, _gradient(functions, data, point))
    return Point(means, -change.dynamics, -change.emission)


def _newton(functions: Functions, data: Data, point: Point, gradient: Point) -> Point:
    """Multiply a gradient with the inverse of the Hessian."""
    blocks = _blocks(functions, data, point)
    return _solve(blocks, _pivots(blocks), gradient)


def _num_errors(system: System, data: Data) -> int:
    return data.values.shape[1] if system.emission.quadratic else 0


def at_least_cost(system: System, data: Data, means: Array) -> Array:
    r"""Return a trajectory of least cost, with its derivative in the parameters of the model.

    $\mathrm dx = -K^{-1}\,\mathrm d_\theta\nabla\mathcal L$, the implicit function theorem with the
    exact Hessian; parameters are the arrays of the model and what its functions close over. Right
    to first order in what the iteration left of the gradient.

    Args:
        system: functions of the model.
        data: arrays of the model.
        means: $z$ (T, D), which solves the conditions.

    References:
        Kristensen et al. (2016), Journal of Statistical Software 70(5).
    """
    num_errors = _num_errors(system, data)
    datum = jax.tree.map(lambda leaf: leaf[0], data.each())
    functions = _functions(system)
    # A rule for derivatives must be given what the functions close over. Their derivatives are not
    # traced before somebody asks for them.
    advance, of_advance = jax.closure_convert(functions.advance, means[0], datum.inputs)
    misfit, of_misfit = jax.closure_convert(functions.misfit, datum, means[0])

    def opened(closed: tuple) -> Functions:
        of_advance, of_misfit = closed
        return Functions(
            lambda state, inputs: advance(state, inputs, *of_advance),
            lambda datum, state: misfit(datum, state, *of_misfit),
        )

    @jax.custom_jvp
    def value(data: Data, closed: tuple, means: Array) -> Array:
        del data, closed
        return means

    @value.defjvp
    def _jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        data, closed, means = primals
        now = opened(closed)
        point = _complete(now, data, means, num_errors)

        def gradient(data: Data, closed: tuple) -> Point:
            return _gradient(opened(closed), data, point)

        _, change = jax.jvp(gradient, primals[:2], tangents[:2])
        return means, -_newton(now, data, point, change).state

    return value(data, (of_advance, of_misfit), means)


@jax.custom_jvp
def at_fixed_point(
    depends_on: list[Array], means: Array, covs: Array | None
) -> tuple[Array, Array | None]:
    """Return the end of an iteration that minimises no cost, and refuse to differentiate it."""
    del depends_on
    return means, covs


@at_fixed_point.defjvp
def _at_fixed_point_jvp(primals: tuple, tangents: tuple) -> None:
    raise NotImplementedError(
        "iterated_smoother has derivatives only where it minimises the MAP cost: with the "
        "linearizer Taylor() and emissions of ParamsNLGSSM or ParamsDistributionSSM"
    )


def minimises(system: System) -> bool:
    """Tell whether a fixed point of the Taylor smoother is a trajectory of least cost."""
    return not isinstance(system.emission, MomentEmission)


def laplace_log_prob(
    params: NonlinearParams,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    *,
    trajectory: ArrayLike,
    residual: Residual | None = None,
) -> Array:
    r"""Approximate $\log p(y_{1:T})$ by Laplace's method about the MAP trajectory.

    $\log p(y, z^*) + \tfrac{TD}2\log 2\pi - \tfrac12\log|H|$, where H is the Hessian of
    $-\log p(y, z)$ at $z^*$, second derivatives of f and h included. Exact for linear models. With
    the trajectory of `iterated_smoother`, which carries its own derivative, the gradient is that
    of the whole, $z^*$ moving with the parameters.

    Args:
        params: dynamax's `ParamsNLGSSM`, or `ParamsDistributionSSM`.
        emissions: $y$ (T, N), NaN where missing; integers and bools are taken as numbers.
        inputs: $u$ (T, U), or a pytree of arrays with leading axis T.
        trajectory: $z^*$ (T, D), from `iterated_smoother` with `Taylor()`, converged.
        residual: as in `iterated_smoother`.

    Returns:
        A scalar; NaN where the Hessian is not positive definite. Singular covariances are
        ordinary. Cost O(T (D + N)^3), sequential in time.

    Raises:
        ValueError: on shapes that do not fit.
        TypeError: on functions of another signature, or `ParamsGGSSM`, whose emission covariance
            moves with the state and is no part of the MAP cost.

    References:
        Tierney & Kadane (1986), JASA 81; Kristensen et al. (2016), Journal of Statistical
        Software 70(5).
    """
    system, data = prepare_system(params, emissions, inputs, residual=residual)
    if not minimises(system):
        raise TypeError(
            "params must be ParamsNLGSSM or ParamsDistributionSSM for Laplace's method, got "
            f"{type(params).__name__}"
        )
    means = real_array("trajectory", trajectory)
    expected = (len(data.values), *data.initial_mean.shape)
    if means.shape != expected:
        raise ValueError(f"trajectory must be (T, D) = {expected}, got shape {means.shape}")
    return _laplace(system, data, means.astype(data.initial_mean.dtype))


@partial(jax.jit, static_argnames=("system",))
def _laplace(system: System, data: Data, means: Array) -> Array:
    r"""Evaluate $-\mathcal L - \tfrac12\log|\det K| - \tfrac n2\log 2\pi$, n Gaussian entries."""
    functions = _functions(system)
    point = _complete(functions, data, means, _num_errors(system, data))
    pivots = _pivots(_blocks(functions, data, point))
    log_dets = jnp.linalg.slogdet(pivots)[1]
    # One negative eigenvalue for every multiplier says that the Hessian on the constraints is
    # positive; scaling changes no sign.
    fixed = jax.lax.stop_gradient(pivots)
    scale = jax.lax.rsqrt(jnp.max(jnp.abs(fixed), axis=-1))
    negative = jnp.sum(jnp.linalg.eigvalsh(fixed * scale[:, :, None] * scale[:, None]) < 0)
    num_multipliers = point.dynamics.size + point.emission.size
    num_gaussian = jnp.sum(data.observed) if system.emission.quadratic else 0
    value = -_lagrangian(functions, data, point) - 0.5 * jnp.sum(log_dets)
    value = value - 0.5 * num_gaussian * jnp.log(2 * jnp.pi)
    # A factor and not a choice, which would have the derivative zero.
    return value * jnp.where(negative == num_multipliers, 1.0, jnp.nan)
