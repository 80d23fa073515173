"""The filter one emission at a time, in constant memory."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jaxtyping import Array, ArrayLike

from elkax.gaussian import Form, KalmanFilter, Model
from elkax.gaussian.costates import encode_model
from elkax.gaussian.decorrelation import uncorrelate
from elkax.gaussian.kalman import log_density
from elkax.gaussian.model import constant_part, merge, over_time
from elkax.smoothers.linear import poison
from elkax.smoothers.prepare import Problem, check_symmetric, find_form, prepare


class OnlineState(NamedTuple):
    r"""The posterior of the state after the emissions so far.

    Attributes:
        mean: $E[z_t \mid y_{1:t}]$ (D,); the prior mean before the first emission.
        covariance: its covariance (D, D), or with `form="square_root"` the lower factor.
        marginal_loglik: $\log p(y_{1:t})$.
        time: number of emissions taken in, an integer scalar.
        low: (D,) what rounding left out of the mean.
        factor_low: (D, D) what rounding left out of the factor, (D, 0) if that is not known.
    """

    mean: Array
    covariance: Array
    marginal_loglik: Array
    time: Array
    low: Array
    factor_low: Array


def lgssm_online_start(params: ParamsLGSSM, *, form: str = "covariance") -> OnlineState:
    """Return the state before the first emission.

    Args:
        params: dynamax parameters.
        form: "covariance" or "square_root", the same in every `lgssm_online_step`.

    Raises:
        ValueError: on an initial covariance that is not symmetric or does not fit the mean.
    """
    stored = find_form(form)
    mean, cov = jnp.asarray(params.initial.mean), jnp.asarray(params.initial.cov)
    if mean.ndim != 1 or cov.shape != (*mean.shape, *mean.shape):
        raise ValueError(
            f"params.initial must hold mean (D,) and cov (D, D), got {mean.shape} and {cov.shape}"
        )
    check_symmetric("params.initial.cov", cov)
    dtype = jnp.result_type(mean, cov, jnp.float32)
    cov = stored.exact(stored.encode(cov.astype(dtype)))
    return OnlineState(
        mean.astype(dtype),
        cov[:, : len(mean)],
        jnp.zeros((), dtype),
        jnp.zeros((), jnp.int32),
        jnp.zeros(mean.shape, dtype),
        cov[:, len(mean) :],
    )


def lgssm_online_step(
    params: ParamsLGSSM,
    state: OnlineState,
    emission: ArrayLike,
    input: ArrayLike | None = None,
    *,
    form: str = "covariance",
) -> OnlineState:
    """Take in one more emission: the same step, and the same numbers, as `lgssm_filter`.

    Args:
        params: dynamax parameters; entries that vary in time are indexed by `state.time`.
        state: what the last step, or `lgssm_online_start`, returned.
        emission: (N,), NaN where missing.
        input: (U,).
        form: as in `lgssm_online_start`.

    Returns:
        The filtered posterior after this emission.

    Raises:
        ValueError: as `lgssm_filter`.
    """
    stored = find_form(form)
    emission = jnp.asarray(emission)
    if emission.ndim != 1:
        raise ValueError(f"emission must be (N,), got shape {emission.shape}")
    inputs = None if input is None else jnp.asarray(input)[None]
    now = _at(params, state.time, emission.shape[0])
    problem = prepare(now, emission[None], inputs, continues=True)
    return _take_in(problem, state, form=stored)


@partial(jax.jit, static_argnames="form")
def _take_in(problem: Problem, state: OnlineState, *, form: Form) -> OnlineState:
    """Predict and update."""
    first = state.time == 0
    model = _here(encode_model(uncorrelate(problem.model), form))._replace(
        initial_mean=state.mean, initial_cov=state.covariance, first=first.astype(state.mean.dtype)
    )
    cov = jnp.concatenate((state.covariance, state.factor_low), axis=1)
    before = jnp.where(first, 0.0, state.mean), state.low, jnp.where(first, 0.0, cov)
    kalman = KalmanFilter(model, form)
    (mean, low, cov), output = kalman.step(before, Model(*([None] * len(model))))
    density = poison(log_density(output), problem.finite)
    size, value = len(mean), state.marginal_loglik + density
    return OnlineState(mean, cov[:, :size], value, state.time + 1, low, cov[:, size:])


def _here(model: Model) -> Model:
    """Drop the time axis of length one."""
    here = over_time(lambda field, rank: field[0], model)
    return merge(constant_part(model), here)


def _at(params: ParamsLGSSM, time: Array, emission_dim: int) -> ParamsLGSSM:
    """Pick the entries of one time, so that none has a time axis."""

    def pick(value: Any, rank: int) -> Any:
        if value is None:
            return None
        value = jnp.asarray(value(time) if callable(value) else value)
        return value[time] if value.ndim > rank else value

    dynamics, emission = params.dynamics, params.emissions
    r = emission.cov(time) if callable(emission.cov) else jnp.asarray(emission.cov)
    varies = r.ndim == 3 or (r.ndim == 2 and r.shape != (emission_dim, emission_dim))
    return params._replace(
        dynamics=type(dynamics)(
            weights=pick(dynamics.weights, 2),
            bias=pick(dynamics.bias, 1),
            input_weights=pick(dynamics.input_weights, 2),
            cov=pick(dynamics.cov, 2),
        ),
        emissions=type(emission)(
            weights=pick(emission.weights, 2),
            bias=pick(emission.bias, 1),
            input_weights=pick(emission.input_weights, 2),
            cov=r[time] if varies else r,
        ),
    )
