"""The filter one emission at a time, in constant memory."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jaxtyping import Array, ArrayLike

from elkax.gaussian import Form, KalmanFilter, Model
from elkax.gaussian.decorrelation import uncorrelate
from elkax.gaussian.filtering import encode_model
from elkax.gaussian.model import constant_part, merge, over_time
from elkax.gaussian.output import State, log_density
from elkax.gaussian.unknown import start
from elkax.smoothers.checks import real_array
from elkax.smoothers.initial import changed_rows, without_rounding
from elkax.smoothers.linear import poison
from elkax.smoothers.prepare import Problem, check_symmetric, diffuse_mask, find_form, prepare


class OnlineState(NamedTuple):
    r"""The posterior of the state after the emissions so far.

    Attributes:
        mean: $E[z_t \mid y_{1:t}]$ (D,); the prior mean before the first emission.
        covariance: its covariance (D, D), or with `form="square_root"` the lower factor.
        marginal_loglik: $\log p(y_{1:t})$.
        time: number of emissions taken in, an integer scalar.
        low: (D,) what rounding left out of the mean.
        factor_low: (D, D) what rounding left out of the factor, (D, 0) if that is not known.
        error: (D, D) the size of what rounding left in the covariance, in the units of the form.
        unknown: (D + d, d) directions of which nothing is known yet, see `elkax.gaussian.unknown`;
            None if there never were any. A state whose row of the first D is not zero has no mean
            and no variance yet, whatever stands there.
    """

    mean: Array
    covariance: Array
    marginal_loglik: Array
    time: Array
    low: Array
    factor_low: Array
    error: Array
    unknown: Array | None = None


def lgssm_online_start(params: ParamsLGSSM, *, form: str | None = None) -> OnlineState:
    """Return the state before the first emission.

    Of states that are diffuse in `params.initial` nothing is known until the emissions tell: see
    `OnlineState.unknown`.

    Args:
        params: dynamax parameters.
        form: as `lgssm_filter`, the same in every `lgssm_online_step`.

    Raises:
        ValueError: on an initial covariance that is not symmetric or does not fit the mean.
    """
    mean, cov = jnp.asarray(params.initial.mean), jnp.asarray(params.initial.cov)
    if mean.ndim != 1 or cov.shape != (*mean.shape, *mean.shape):
        raise ValueError(
            f"params.initial must hold mean (D,) and cov (D, D), got {mean.shape} and {cov.shape}"
        )
    size, dtype = len(mean), jnp.result_type(mean, cov, jnp.float32)
    stored = find_form(form, dtype)
    mask = diffuse_mask(params.initial)
    unknown = None
    if any(mask):
        hidden = np.array(mask)
        mean = jnp.where(hidden, 0.0, mean)
        cov = jnp.where(hidden[:, None] | hidden, 0.0, cov)
        unknown = start(jnp.eye(size, dtype=dtype)[:, hidden])
    check_symmetric("params.initial.cov", cov)
    cov = stored.exact(stored.encode(cov.astype(dtype)))
    zero = jnp.zeros((), dtype)
    return OnlineState(
        mean.astype(dtype),
        cov[:, :size],
        zero,
        jnp.zeros((), jnp.int32),
        jnp.zeros(mean.shape, dtype),
        cov[:, size:],
        jnp.zeros((size, size), dtype),
        unknown,
    )


def lgssm_online_step(
    params: ParamsLGSSM,
    state: OnlineState,
    emission: ArrayLike,
    input: ArrayLike | None = None,
    *,
    form: str | None = None,
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
    stored = find_form(form, state.mean.dtype)
    emission = real_array("emission", emission)
    if emission.ndim != 1:
        raise ValueError(f"emission must be (N,), got shape {emission.shape}")
    inputs = None if input is None else real_array("input", input)[None]
    now = _at(params, state.time, emission.shape[0])
    problem = prepare(now, emission[None], inputs, continues=True)
    return _take_in(problem, state, form=stored)


@partial(jax.jit, static_argnames="form")
def _take_in(problem: Problem, state: OnlineState, *, form: Form) -> OnlineState:
    """Predict and update."""
    first = state.time == 0
    size = len(state.mean)
    unknown, start = state.unknown, None
    if unknown is not None:
        # In the units of the states at first; then it is the state that holds them.
        start = unknown
        unknown = unknown.at[:size].multiply(jnp.where(first, 0.0, 1.0))
    model = _here(encode_model(uncorrelate(problem.model), form))._replace(
        initial_mean=state.mean,
        initial_cov=state.covariance,
        first=first.astype(state.mean.dtype),
    )
    if start is not None:
        weights = without_rounding(model.weights)
        age = state.time * changed_rows(weights)
        model = model._replace(weights=weights, unknown=start, age=age)
    cov = jnp.concatenate((state.covariance, state.factor_low), axis=1)
    before = State(
        jnp.where(first, 0.0, state.mean),
        state.low,
        jnp.where(first, 0.0, cov),
        state.error,
        unknown,
    )
    after, output = KalmanFilter(model, form).step(before, Model(*([None] * len(model))))
    density = poison(log_density(output), problem.finite)
    return OnlineState(
        after.mean,
        after.cov[:, :size],
        state.marginal_loglik + density,
        state.time + 1,
        after.low,
        after.cov[:, size:],
        after.error,
        after.unknown,
    )


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
