"""The sequential nonlinear filter: linearize where the filter is, and go on from there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian import FilterOutput, Form, KalmanFilter, Model
from elkax.gaussian.costates import encode_model, shift
from elkax.gaussian.kalman import log_density
from elkax.gaussian.model import RANKS, constant_part, over_time
from elkax.gaussian.smoothing import Smoothed, smooth
from elkax.linearize import Affine, Linearizer, Observation, Taylor
from elkax.scan import Backend
from elkax.scan.lanes import from_lanes, matvec, to_lanes
from elkax.scan.layout import in_blocks
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

    def one(carry: tuple, x: tuple) -> tuple[tuple, tuple]:
        mean, stored = carry
        datum, inputs, noise = x

        def take_in(at_mean: Array, at_stored: Array) -> tuple[FilterOutput, Observation]:
            at_cov = form.decode(at_stored) if uses else None
            observation = system.emission.observe(linearizer, datum, at_mean, at_cov)
            observation, _ = uncorrelated(observation)
            return _update(form, mean, stored, observation), observation

        output, observation = take_in(mean, stored)
        density = log_density(output) + observation.log_scale
        if num_iter > 1:

            def again(_: Array, carry: tuple) -> tuple:
                output, _ = carry
                return take_in(output.mean, output.cov)

            output, observation = jax.lax.fori_loop(1, num_iter, again, (output, observation))
        cov = form.decode(output.cov) if uses else None
        affine = linearizer(lambda state: system.advance(state, inputs), output.mean, cov)
        noise = data.noise if noise is None else noise
        noise = form.encode(noise if affine.cov is None else noise + affine.cov)
        ahead = matvec(affine.weights, output.mean) + affine.offset
        ahead_stored = form.predict(affine.weights, output.cov, noise)
        kept = (output, density, observation, affine, ahead, form.decode(ahead_stored))
        return (ahead, ahead_stored), kept

    xs = (
        data.each(),
        None if data.inputs is None else data.inputs[following],
        data.noise[following] if varying else None,
    )
    start = (data.initial_mean, form.encode(data.initial_cov))
    _, kept = jax.lax.scan(one, start, xs)
    output, density, observation, affine, ahead, ahead_cov = kept
    steps = jax.tree.map(lambda leaf: leaf[:-1], affine)
    linearized = assemble(data, Affine(*steps), Observation(*map(to_lanes, observation)))
    return Filtered(linearized, output, density, ahead, ahead_cov)


def _update(form: Form, mean: Array, stored: Array, observation: Observation) -> FilterOutput:
    """Condition stored moments on one observation: a filter step that predicts no change."""
    size = mean.shape[0]
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
    return kalman.step((mean, jnp.zeros_like(mean), stored), model)[1]


def smooth_filtered(filtered: Filtered, form: Form, backend: Backend | None) -> Smoothed:
    """Smooth what the nonlinear filter gave, linearized as it was."""
    return smooth(filtered.linearized.model, filtered.output, form, backend)


def smooth_moments(
    system: System,
    data: Data,
    means: Array,
    covs: Array,
    form: Form,
    backend: Backend | None,
) -> Smoothed:
    """Smooth filtered moments (T, D) and (T, D, D), steps and emissions expanded about them.

    Innovations, of which the moments say nothing, are those of a filter step from each of them.
    """
    model = linearize(system, data, Taylor(), means, None).model
    predicted = from_lanes(matvec(to_lanes(model.weights[1:]), to_lanes(means[:-1])))
    predicted = jnp.concatenate((data.initial_mean[None], predicted + model.offset[1:]))
    stored = from_lanes(form.encode(to_lanes(covs)))
    encoded = encode_model(model, form)

    def step(fixed: Model, x: tuple[Model, Array, Array]) -> tuple[FilterOutput, None]:
        own, mean, cov = x
        return KalmanFilter(fixed, form).step((mean, jnp.zeros_like(mean), cov), own)[1], None

    varying = over_time(lambda field, rank: field, encoded)
    earlier = (shift(part) for part in (means, stored))
    output, _ = in_blocks(step, constant_part(encoded), (varying, *earlier), means.shape[-1])
    output = output._replace(
        mean=means, low=jnp.zeros_like(means), cov=stored, correction=means - predicted
    )
    return smooth(model, output, form, backend)


def decode(stored: Array, form: Form) -> Array:
    """Decode covariances with a leading time axis."""
    return from_lanes(form.decode(to_lanes(stored)))
