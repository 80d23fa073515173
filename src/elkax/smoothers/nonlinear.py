"""The sequential nonlinear filter: linearize where the filter is, and go on from there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian import Covariance, FilterOutput, Form, KalmanFilter, Model, SquareRoot
from elkax.gaussian.factor import cho_solve, psd_cholesky
from elkax.gaussian.markov import GaussMarkov, Transition
from elkax.gaussian.model import RANKS
from elkax.gaussian.output import State, log_density
from elkax.gaussian.rounding import of_prediction
from elkax.gaussian.smoothing import Smoothed, smooth
from elkax.linearize import Affine, Linearizer, Observation, Taylor
from elkax.scan import Backend, run
from elkax.scan.lanes import from_lanes, identity, matmul, matvec, to_lanes, transpose
from elkax.smoothers.linear import filter_and_smooth
from elkax.smoothers.linearization import Linearized, assemble, linearize, uncorrelated
from elkax.smoothers.system import Data, System


class Filtered(NamedTuple):
    """What the nonlinear filter gives.

    Attributes:
        linearized: the linear-Gaussian model whose Kalman filter takes the same values.
        output: of that filter, covariances stored in the form in use.
        log_density: of each emission given those before it, at its first linearization (T,).
        predicted_mean: of the state at t + 1 given the emissions up to t (T, D).
        predicted_cov: (T, D, D), a covariance itself.
    """

    linearized: Linearized
    output: FilterOutput
    log_density: Array
    predicted_mean: Array
    predicted_cov: Array


def filter_system(
    system: System, data: Data, linearizer: Linearizer, form: Form, num_iter: int = 1
) -> Filtered:
    r"""Filter: f is linearized about the filtered moments, the emission about the predicted ones.

    With `num_iter` more than one the emission is linearized again about the moments that came of
    it; every update starts from the same prediction, so no observation is used twice.

    Args:
        system: functions of the model.
        data: arrays of the model.
        linearizer: how.
        form: how covariances are stored.
        num_iter: linearizations of each emission.

    References:
        Bell & Cathey (1993), IEEE Transactions on Automatic Control 38(2), for the iteration.
    """
    length = data.values.shape[0]
    uses = linearizer.uses_covariance
    varying = data.noise.ndim == 3
    # Time t takes in its emission and then steps on to t + 1; the last step leads nowhere.
    following = jnp.minimum(jnp.arange(length) + 1, length - 1)

    def one(state: State, x: tuple) -> tuple[State, tuple]:
        datum, inputs, noise = x

        def take_in(at_mean: Array, at_stored: Array) -> tuple[State, FilterOutput, Observation]:
            at_cov = form.decode(at_stored) if uses else None
            observation = system.emission.observe(linearizer, datum, at_mean, at_cov)
            observation, _ = uncorrelated(observation)
            return *_update(form, state, observation), observation

        after, output, observation = take_in(state.mean, state.cov)
        density = log_density(output) + observation.log_scale
        if num_iter > 1:

            def again(_: Array, carry: tuple) -> tuple:
                _, output, _ = carry
                return take_in(output.mean, output.cov)

            found = jax.lax.fori_loop(1, num_iter, again, (after, output, observation))
            after, output, observation = found
        cov = form.decode(output.cov) if uses else None
        affine = linearizer(lambda state: system.advance(state, inputs), output.mean, cov)
        noise = data.noise if noise is None else noise
        noise = form.encode(noise if affine.cov is None else noise + affine.cov)
        ahead = matvec(affine.weights, output.mean) + affine.offset
        ahead_stored = form.predict(affine.weights, output.cov, noise)
        error = after.error
        if error is not None:
            error = of_prediction(form, affine.weights, error, output.cov, noise)
        kept = (output, density, observation, affine, ahead, form.decode(ahead_stored))
        return State(ahead, jnp.zeros_like(ahead), ahead_stored, error), kept

    xs = (
        data.each(),
        jax.tree.map(lambda leaf: leaf[following], data.inputs),
        data.noise[following] if varying else None,
    )
    zero, cov = jnp.zeros_like(data.initial_mean), jnp.zeros_like(data.initial_cov)
    error = cov if form.exact_entries else None
    start = State(data.initial_mean, zero, form.encode(data.initial_cov), error)
    _, kept = jax.lax.scan(one, start, xs)
    output, density, observation, affine, ahead, ahead_cov = kept
    steps = jax.tree.map(lambda leaf: leaf[:-1], affine)
    linearized = assemble(data, Affine(*steps), Observation(*map(to_lanes, observation)))
    return Filtered(linearized, output, density, ahead, ahead_cov)


def _update(form: Form, state: State, observation: Observation) -> tuple[State, FilterOutput]:
    """Condition a state on one observation: a filter step that predicts no change."""
    mean, stored, size = state.mean, state.cov, state.mean.shape[0]
    kalman = KalmanFilter(Model(*[None] * len(RANKS)), form)
    model = Model(
        initial_mean=jnp.zeros_like(mean),
        initial_cov=jnp.zeros_like(stored),
        weights=jnp.eye(size, dtype=mean.dtype),
        offset=jnp.zeros_like(mean),
        noise=jnp.zeros_like(stored),
        rows=observation.rows,
        variances=observation.cov,
        values=observation.values,
        observed=observation.observed,
        first=jnp.zeros((), mean.dtype),
    )
    return kalman.step(state, model)


def smooth_filtered(filtered: Filtered, form: Form, backend: Backend | None) -> Smoothed:
    """Smooth what the nonlinear filter gave, linearized as it was.

    A smoother of factors needs to see how they turn, so the linear filter runs once more for it.
    """
    model = filtered.linearized.model
    if isinstance(form, SquareRoot):
        return filter_and_smooth(model, form, backend).smoothed
    return smooth(model, filtered.output, form, backend)


def smooth_moments(
    system: System, data: Data, means: Array, covs: Array, backend: Backend | None
) -> Smoothed:
    r"""Smooth filtered moments (T, D) and (T, D, D), steps expanded about them.

    By Rauch-Tung-Striebel, which needs nothing but these moments: with
    $G_t = P_tF^\top(FP_tF^\top + Q)^+$,
    $\hat z_t = m_t + G_t(\hat z_{t+1} - Fm_t - c)$ and, in Joseph form, covariances
    $(I - G_tF)P_t(I - G_tF)^\top + G_t(Q + \hat P_{t+1})G_t^\top$.
    """
    model = linearize(system, data, Taylor(), means, None).model
    length, size = means.shape
    if length == 1:
        return Smoothed(means, covs, jnp.zeros((0, size, size), covs.dtype))
    noise = jnp.broadcast_to(model.noise, (length, size, size))[1:]
    steps = (to_lanes(model.weights[1:]), to_lanes(covs[:-1]), to_lanes(noise))
    gain, rest = _turn_around(*steps)
    ahead = matvec(steps[0], to_lanes(means[:-1])) + to_lanes(model.offset[1:])
    shift = matvec(gain, to_lanes(means[1:]) - ahead)
    transitions = Transition(*map(from_lanes, (gain, shift, rest)))
    start = (jnp.zeros_like(means[-1]), covs[-1])
    recurrence = GaussMarkov(size, Covariance())
    _, (moved, smoothed) = run(
        recurrence, start, transitions, backend=backend, state_dim=size, reverse=True
    )
    smoothed = jnp.concatenate((smoothed, covs[-1:]))
    lagged = jnp.matmul(transitions.weights, smoothed[1:], precision="highest")
    return Smoothed(means.at[:-1].add(moved), smoothed, lagged)


def _turn_around(weights: Array, cov: Array, noise: Array) -> tuple[Array, Array]:
    r"""Compute $G$ and $(I - GF)P(I - GF)^\top + GQG^\top$ over lanes."""
    cross = matmul(weights, cov)
    predicted = matmul(cross, transpose(weights)) + noise
    gain = transpose(cho_solve(psd_cholesky(predicted), cross))
    eye = identity(len(gain), gain.shape[2:], gain.dtype)
    kept = eye - matmul(gain, weights)
    both = matmul(matmul(kept, cov), transpose(kept))
    return gain, both + matmul(matmul(gain, noise), transpose(gain))


def decode(stored: Array, form: Form) -> Array:
    """Decode covariances with a leading time axis."""
    return from_lanes(form.decode(to_lanes(stored)))
