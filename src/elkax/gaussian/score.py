"""The log-likelihood and its derivative, the score."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.covariance import Covariance
from elkax.gaussian.kalman import (
    RANKS,
    FilterOutput,
    KalmanFilter,
    Model,
    constant_part,
    over_time,
)
from elkax.gaussian.smoothing import find_costates, steps_in_lanes
from elkax.scan import Backend, run
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes, transpose


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
    start = (jnp.zeros_like(model.initial_mean), jnp.zeros_like(model.initial_cov))
    kalman = KalmanFilter(constant_part(stored), form)
    xs = over_time(lambda field, rank: field, stored)
    return run(kalman, start, xs, backend=backend, state_dim=size)[1]


def encode_model(model: Model, form: Any) -> Model:
    """Store the covariances of a model in a form."""
    noise = model.noise
    return model._replace(
        initial_cov=form.encode(model.initial_cov),
        noise=form.encode(noise) if noise.ndim == 2 else from_lanes(form.encode(to_lanes(noise))),
    )


def covariance_derivative(function: Any) -> Any:
    """Let a function of (model, form, backend) be differentiated in covariance form.

    The derivative of a QR or Cholesky factor does not exist where a covariance is singular; that
    of the moments does. The function keeps its values in any form, and takes its derivative from
    its own covariance form at the same point.

    Args:
        function: `(model, form, backend) -> moments`, equal for every form up to rounding.
    """

    def wrapped(model: Model, form: Any, backend: Backend | None) -> Any:
        if isinstance(form, Covariance):
            return function(model, form, backend)

        @jax.custom_jvp
        def moments(model: Model) -> Any:
            return function(model, form, backend)

        @moments.defjvp
        def _jvp(primals: tuple[Model], tangents: tuple[Model]) -> tuple[Any, Any]:
            _, change = jax.jvp(
                lambda m: wrapped(m, Covariance(), backend), primals, tangents
            )
            return moments(*primals), change

        return moments(model)

    return wrapped


@covariance_derivative
def filter_moments(model: Model, form: Any, backend: Backend | None) -> FilterOutput:
    """Run the Kalman filter and decode its covariances; arguments as `filter_model`."""
    filtered = filter_model(model, form, backend)
    return filtered._replace(cov=from_lanes(form.decode(to_lanes(filtered.cov))))


def log_likelihood(model: Model, form: Any, backend: Backend | None) -> Array:
    r"""Sum the innovation log-densities, with the score as derivative.

    The score needs one filter, one backward pass for the costates $(q_t, \Lambda_t)$, and the
    derivative of each step by itself, for all t at once:
    $\partial\ell/\partial\theta = \sum_t \partial(m_{t|t}, P_{t|t}, \ell_t)/\partial\theta \cdot
    (F^\top q_{t+1}, \tfrac12 F^\top(q_{t+1}q_{t+1}^\top - \Lambda_{t+1})F, 1)$. No factorisation
    is differentiated, so it is finite at Q = 0 and P0 = 0; it can be differentiated again.

    Args:
        model: covariances themselves.
        form: how covariances are stored while filtering.
        backend: how to run the recurrences.

    Returns:
        $\log p(y_{1:T})$ of the observed entries.

    References:
        Koopman & Shephard (1992), Biometrika 79(4); Durbin & Koopman (2012), Sec. 7.3.3.
    """

    @jax.custom_jvp
    def value(model: Model) -> Array:
        return jnp.sum(filter_model(model, form, backend).log_density)

    @value.defjvp
    def _jvp(primals: tuple[Model], tangents: tuple[Model]) -> tuple[Array, Array]:
        (model,), (change,) = primals, tangents
        filtered = filter_moments(model, form, backend)
        gradient = _score(model, filtered, backend)
        terms = [
            jnp.sum(g * d)
            for g, d in zip(gradient, change, strict=True)
            if g is not None and d is not None and d.dtype == g.dtype
        ]
        return jnp.sum(filtered.log_density), jnp.sum(jnp.stack(terms))

    return value(model)


def _score(model: Model, filtered: FilterOutput, backend: Backend | None) -> Model:
    """Differentiate the log-likelihood; None for fields that are not real numbers."""
    costates = find_costates(model, filtered, backend)
    length, size = filtered.mean.shape
    zero = jnp.zeros((1, size), filtered.mean.dtype)
    q = to_lanes(jnp.concatenate((costates.vector[1:], zero)))
    matrix = to_lanes(jnp.concatenate((costates.matrix[1:], jnp.zeros((1, size, size), q.dtype))))
    weights = model.weights
    following = to_lanes(jnp.roll(weights, -1, 0)) if weights.ndim == 3 else weights
    back = transpose(following)
    curvature = 0.5 * (q[:, None] * q[None] - matrix)
    costate = matvec(back, q), matmul(matmul(back, curvature), following)
    mean = to_lanes(jnp.concatenate((zero, filtered.mean[:-1])))
    cov = to_lanes(jnp.concatenate((jnp.zeros_like(filtered.cov[:1]), filtered.cov[:-1])))
    everything = steps_in_lanes(model)
    real = [jnp.issubdtype(f.dtype, jnp.floating) if f is not None else False for f in everything]

    def one_step(fields: list[Array]) -> tuple[Array, Array, Array]:
        given = iter(fields)
        own = Model(*(next(given) if r else f for r, f in zip(real, everything, strict=True)))
        nothing = Model(*([None] * len(own)))
        _, output = KalmanFilter(own, Covariance()).step((mean, cov), nothing)
        return output.mean, output.cov, output.log_density

    fields = [f for f, r in zip(everything, real, strict=True) if r]
    _, pull = jax.vjp(one_step, fields)
    if model.valid is not None:
        costate = jax.tree.map(lambda leaf: jnp.where(_continues(model.valid), leaf, 0.0), costate)
    (pulled,) = pull((*costate, jnp.ones(length, q.dtype)))
    given = iter(pulled)
    gradient = Model(*(next(given) if r else None for r in real))
    return Model(
        *(
            from_lanes(g) if g is not None and field.ndim > rank else g
            for g, field, rank in zip(gradient, model, RANKS, strict=True)
        )
    )


def _continues(valid: Array) -> Array:
    """Tell where the next time step exists too."""
    return valid & jnp.append(valid[1:], False)
