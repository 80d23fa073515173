"""The filter over a whole sequence, and its costates."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.covariance import Covariance
from elkax.gaussian.kalman import FilterOutput, KalmanFilter, State
from elkax.gaussian.markov import GaussMarkov, Transition
from elkax.gaussian.model import Model, constant_part, merge, over_time
from elkax.scan import Backend, run
from elkax.scan.lanes import from_lanes, materialize, matmul, to_lanes, transpose
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


def before(filtered: FilterOutput) -> State:
    """Give the state that each step starts from, zero before the first."""

    def shift(leaf: Array) -> Array:
        return jnp.concatenate((jnp.zeros_like(leaf[:1]), leaf[:-1]))

    return shift(filtered.mean), shift(filtered.low), shift(filtered.cov)


def next_weights(model: Model) -> Array | None:
    """Give $F_{t+1}$ for every t, None if F is constant; the last one meets a zero costate."""
    return jnp.roll(model.weights, -1, axis=0) if model.weights.ndim == 3 else None


def continues(model: Model) -> Array | None:
    """Tell for every t whether time t + 1 exists, None if there is no padding."""
    return None if model.valid is None else jnp.append(model.valid[1:], False)


def find_costates(model: Model, filtered: FilterOutput, backend: Backend | None) -> Costates:
    r"""Run the Bryson-Frazier recurrence.

    With $W_t = I - K_tH_t$, $e_t = H_t^\top S_t^{-1}v_t$ and $B_t = H_t^\top S_t^{-1}H_t$:
    $q_t = e_t + W_t^\top F_{t+1}^\top q_{t+1}$,
    $\Lambda_t = B_t + W_t^\top F_{t+1}^\top\Lambda_{t+1}F_{t+1}W_t$. Only innovation covariances
    are inverted, entry by entry. $W, e, B$ are the summary of the update alone, for all t at
    once.

    Args:
        model: the model, covariances themselves.
        filtered: the filter's output, covariances themselves.
        backend: how to run the backward recurrence.

    Returns:
        Costates at t = 0, ..., T - 1.
    """
    size = filtered.mean.shape[-1]
    form = Covariance()

    def transitions(fixed: Model, x: tuple) -> tuple[Transition, None]:
        own, state, following, goes_on = x
        kalman = KalmanFilter(fixed, form)
        own = merge(fixed, own)
        mean, low, cov = kalman.predict(own, state)
        empty = kalman.identity(cov.shape[2:], mean.dtype)
        empty = empty._replace(b=mean, low=low, c=cov, eta=jnp.zeros_like(mean))
        update = kalman.observe(empty, own)
        following = fixed.weights if following is None else following
        back = transpose(matmul(following, materialize(update.a)))
        vector, matrix = update.eta, update.j
        if own.valid is not None:
            vector, matrix = jnp.where(own.valid, vector, 0.0), jnp.where(own.valid, matrix, 0.0)
            back = jnp.where(own.valid & goes_on, back, 0.0)
        return Transition(back, vector, matrix), None

    varying = over_time(lambda field, rank: field, model)
    xs = (varying, before(filtered), next_weights(model), continues(model))
    steps, _ = in_blocks(transitions, constant_part(model), xs, size)
    start = (jnp.zeros_like(filtered.mean[-1]), jnp.zeros_like(filtered.cov[-1]))
    _, (vector, matrix) = run(
        GaussMarkov(size, form), start, steps, backend=backend, state_dim=size, reverse=True
    )
    return Costates(vector, matrix)
