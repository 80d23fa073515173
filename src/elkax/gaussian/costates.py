"""The filter over a whole sequence, and its costates."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.covariance import Covariance
from elkax.gaussian.kalman import FilterOutput, KalmanFilter, State, find_precision, fold_rows
from elkax.gaussian.markov import GaussMarkov, Transition
from elkax.gaussian.model import Model, constant_part, merge, over_time
from elkax.scan import Backend, lanes, run
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes, transpose
from elkax.scan.layout import in_blocks


class Costates(NamedTuple):
    r"""Derivatives of the log-likelihood with respect to the predicted moments.

    $q_t = \partial\ell/\partial m_{t|t-1}$ and
    $\partial\ell/\partial P_{t|t-1} = \tfrac12(q_tq_t^\top - \Lambda_t)$.

    Attributes:
        vector: $q_t$ (T, D).
        matrix: $\Lambda_t$ (T, D, D), positive semi-definite.
    """

    vector: Array
    matrix: Array


def encode_model(model: Model, form: Any) -> Model:
    """Store the covariances of a model in a form."""
    noise = model.noise
    return model._replace(
        initial_cov=form.encode(model.initial_cov),
        noise=form.encode(noise) if noise.ndim == 2 else from_lanes(form.encode(to_lanes(noise))),
    )


def filter_model(model: Model, form: Any, backend: Backend | None) -> FilterOutput:
    """Run the Kalman filter over a model.

    Args:
        model: covariances themselves, not yet stored in `form`.
        form: how covariances are stored while filtering.
        backend: how to run the recurrence.

    Returns:
        Output of every step, covariances stored in `form`.
    """
    stored = encode_model(model, form)
    size = model.initial_mean.shape[0]
    zero = jnp.zeros_like(model.initial_mean)
    start = (zero, zero, form.exact(jnp.zeros_like(model.initial_cov)))
    kalman = KalmanFilter(constant_part(stored), form)
    xs = over_time(lambda field, rank: field, stored)
    output = run(kalman, start, xs, backend=backend, state_dim=size)[1]
    # The same, without a copy.
    return output._replace(observed=model.observed)


def shift(leaf: Array) -> Array:
    """Give what stands at t - 1, zero at t = 0."""
    return jnp.concatenate((jnp.zeros_like(leaf[:1]), leaf[:-1]))


def before(filtered: FilterOutput) -> State:
    """Give the state that each step starts from, zero before the first."""
    return shift(filtered.mean), shift(filtered.low), shift(filtered.cov)


def next_weights(model: Model) -> Array | None:
    """Give $F_{t+1}$ for every t, None if F is constant; the last one meets a zero costate."""
    return jnp.roll(model.weights, -1, axis=0) if model.weights.ndim == 3 else None


def continues(model: Model) -> Array | None:
    """Tell for every t whether time t + 1 exists, None if there is no padding."""
    return None if model.valid is None else jnp.append(model.valid[1:], False)


def loop_inputs(model: Model, filtered: FilterOutput) -> tuple:
    """Give what `close_loop` takes at t = 0, ..., T - 1; covariances themselves."""
    varying = over_time(lambda field, rank: field, model)
    *_, earlier = before(filtered)
    update = filtered.residual, filtered.variance
    return varying, earlier, update, next_weights(model), continues(model)


def close_loop(fixed: Model, x: tuple) -> Transition:
    r"""Compute the step of the costates from t + 1 to t.

    Its weights are $W_t^\top F_{t+1}^\top$, its offset $e_t$, its covariance $B_t$, as
    `find_costates` has them. Entry by entry, with P before the entry, $g = W^\top h$ and innovation
    v of variance s: $W - Phg^\top/s$, $e + gv/s$ and $B + gg^\top/s$.

    Args:
        fixed: the constant part of the model.
        x: the model at t, the covariance at t - 1, residuals and variances at t, the weights at
            t + 1 if they vary, and whether there is a time t + 1.
    """
    own, cov, (residual, variance), following, goes_on = x
    own = merge(fixed, own)
    cov = KalmanFilter(fixed, Covariance()).predict_cov(own, cov)
    precision = find_precision(own.observed, variance)
    # The filter skips what is singular. Zero times a variance that is not finite stays visible.
    precision, skipped = lanes.align(precision, 1, jnp.multiply(0.0, own.variances), 1)
    precision = jnp.where(jnp.isnan(precision), skipped, precision)

    def update(carry: tuple, entry: tuple) -> tuple[tuple, None]:
        cov, kept, vector, matrix = carry
        h, v, weight = entry
        projection, through = lanes.materialize((matvec(cov, h), matvec(transpose(kept), h)), 1)
        gain, scaled = lanes.scale(projection, weight), lanes.scale(through, weight)
        carry = (
            cov - lanes.outer(gain, projection),
            kept - lanes.outer(gain, through),
            lanes.add(vector, lanes.scale(scaled, v)),
            matrix + lanes.outer(scaled, through),
        )
        return carry, None

    size = cov.shape[0]
    nothing = jnp.zeros_like(cov)
    vector = jnp.zeros((size, *jnp.broadcast_shapes(residual.shape[1:], cov.shape[2:])), cov.dtype)
    start = (cov, lanes.identity(size, cov.shape[2:], cov.dtype), vector, nothing)
    (_, kept, vector, matrix), _ = fold_rows(update, start, (own.rows, residual, precision))
    back = transpose(matmul(fixed.weights if following is None else following, kept))
    if own.valid is not None:
        vector, matrix = jnp.where(own.valid, vector, 0.0), jnp.where(own.valid, matrix, 0.0)
        back = jnp.where(own.valid & goes_on, back, 0.0)
    return Transition(back, vector, matrix)


def find_costates(model: Model, filtered: FilterOutput, backend: Backend | None) -> Costates:
    r"""Run the Bryson-Frazier recurrence.

    With $W_t = I - K_tH_t$, $e_t = H_t^\top S_t^{-1}v_t$ and $B_t = H_t^\top S_t^{-1}H_t$:
    $q_t = e_t + W_t^\top F_{t+1}^\top q_{t+1}$,
    $\Lambda_t = B_t + W_t^\top F_{t+1}^\top\Lambda_{t+1}F_{t+1}W_t$. Only innovation variances
    are divided by, entry by entry.

    Args:
        model: the model, covariances themselves.
        filtered: the filter's output, covariances themselves; residuals and variances count.
        backend: how to run the backward recurrence.

    Returns:
        Costates at t = 0, ..., T - 1.
    """
    size = filtered.mean.shape[-1]

    def transitions(fixed: Model, x: tuple) -> tuple[Transition, None]:
        return close_loop(fixed, x), None

    steps, _ = in_blocks(transitions, constant_part(model), loop_inputs(model, filtered), size)
    start = (jnp.zeros_like(filtered.mean[-1]), jnp.zeros_like(filtered.cov[-1]))
    _, (vector, matrix) = run(
        GaussMarkov(size, Covariance()), start, steps, backend=backend, state_dim=size, reverse=True
    )
    return Costates(vector, matrix)
