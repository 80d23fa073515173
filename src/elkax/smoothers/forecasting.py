"""Forecasts of states and emissions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jax.scipy.stats import norm
from jaxtyping import Array, ArrayLike

from elkax.gaussian.unknown import tolerance
from elkax.scan import Backend
from elkax.smoothers.checks import real_array, series_array
from elkax.smoothers.linear import Initial, Moments, infer_filtered, infer_smoothed, setup
from elkax.smoothers.prepare import Problem, check_count, valid_steps


class Forecast(NamedTuple):
    r"""Moments of the h steps after the data, in the order of dynamax's `forecast`.

    Attributes:
        state_means: $E[z_{T+k} \mid y_{1:T}]$ (h, D).
        state_covariances: (h, D, D).
        emission_means: $E[y_{T+k} \mid y_{1:T}]$ (h, N).
        emission_covariances: (h, N, N), with the measurement error.
    """

    state_means: Array
    state_covariances: Array
    emission_means: Array
    emission_covariances: Array

    def interval(self, level: float = 0.9) -> tuple[Array, Array]:
        """Return the central interval of each emission.

        Args:
            level: probability that it covers, in (0, 1).

        Returns:
            Lower and upper bounds, (h, N) each.

        Raises:
            ValueError: if the level is not in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        variances = jnp.diagonal(self.emission_covariances, axis1=-2, axis2=-1)
        half = norm.ppf(0.5 + level / 2) * jnp.sqrt(variances)
        return self.emission_means - half, self.emission_means + half


def full_cov(problem: Problem) -> Array:
    """Return the emission covariance as (N, N) or (T, N, N)."""
    if not problem.diagonal:
        return problem.cov
    return problem.cov[..., :, None] * jnp.eye(problem.cov.shape[-1], dtype=problem.cov.dtype)


def emission_moments(problem: Problem, states: Moments) -> tuple[Array, Array]:
    r"""Compute $Hm + d$ and $HPH^\top + R$ at every time.

    An emission that depends on what is undetermined of the states has mean NaN and an infinite
    variance; one that does not is as if all were determined.

    Args:
        problem: gives H, d and R.
        states: their moments.

    Returns:
        (T, N) and (T, N, N).
    """
    h = problem.weights
    mean = jnp.einsum("...ij,...j->...i", h, states.mean, precision="highest") + problem.offset
    spread = jnp.einsum("...ij,...jk,...lk->...il", h, states.cov, h, precision="highest")
    unknown = states.unknown
    if unknown is not None:
        seen = jnp.matmul(h, unknown, precision="highest")
        rounding = tolerance(jnp.asarray(problem.model.age))[:, :, None] * jnp.abs(unknown)
        rounding = jnp.matmul(jnp.abs(h), rounding, precision="highest")
        unknown = jnp.where(jnp.abs(seen) <= rounding, 0.0, seen)
    return Moments(mean, spread + full_cov(problem), unknown).shown()


def smoothed_emissions(
    params: ParamsLGSSM, emissions: ArrayLike, inputs: ArrayLike | None = None, **options: Any
) -> tuple[Array, Array]:
    """Compute the moments (T, N) and (T, N, N) of fresh emissions at each time, given all data.

    Arguments and errors as `lgssm_smoother`, and what is undetermined as in `emission_moments`.
    """
    problem, stored = setup(params, emissions, inputs, smoothing=True, **options)
    found = infer_smoothed(problem.model, problem.finite, form=stored, backend=options["backend"])
    return _of_emissions(problem, found.smoothed)


@jax.jit
def _of_emissions(problem: Problem, states: Moments) -> tuple[Array, Array]:
    return emission_moments(problem, states)


@jax.jit
def _states_and_emissions(problem: Problem, states: Moments) -> tuple[Array, ...]:
    return *states.shown(), *emission_moments(problem, states)


def lgssm_forecast(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    num_forecast_timesteps: int,
    inputs: ArrayLike | None = None,
    forecast_inputs: ArrayLike | None = None,
    *,
    backend: Backend | None = None,
    form: str | None = None,
    initial: Initial = None,
    length: ArrayLike | None = None,
) -> Forecast:
    r"""Compute $p(z_{T+k}, y_{T+k} \mid y_{1:T})$ for k = 1, ..., h.

    The filter is run on, with the h emissions missing.

    Args:
        params: dynamax parameters; entries that vary in time need T + h rows.
        emissions: (T, N), NaN where missing.
        num_forecast_timesteps: h >= 1.
        inputs: (T, U).
        forecast_inputs: (h, U), the first for the step into $z_{T+1}$.
        backend: as `lgssm_filter`.
        form: as `lgssm_filter`.
        initial: as `lgssm_filter`.
        length: only the first `length` emissions exist, and the forecast begins right after them.

    Returns:
        State and emission moments; emission bands by its `interval`.

    Raises:
        ValueError: as `lgssm_filter`, if h < 1, or if one of `inputs` and `forecast_inputs` is
            given without the other.
    """
    check_count("num_forecast_timesteps", num_forecast_timesteps)
    emissions = series_array(emissions, params.emissions.weights)
    seen = valid_steps(length, len(emissions))
    start = len(emissions) if length is None else jnp.asarray(length)
    if (inputs is None) != (forecast_inputs is None):
        raise ValueError(
            "inputs and forecast_inputs must be given together, got "
            f"inputs {'missing' if inputs is None else 'given'} and forecast_inputs "
            f"{'missing' if forecast_inputs is None else 'given'}"
        )
    if inputs is not None:
        inputs = real_array("inputs", inputs)
        forecast_inputs = real_array("forecast_inputs", forecast_inputs)
        expected = (num_forecast_timesteps, *inputs.shape[1:])
        if forecast_inputs.shape != expected:
            raise ValueError(
                f"forecast_inputs must have shape {expected}, got {forecast_inputs.shape}"
            )
        inputs = jnp.concatenate((inputs, forecast_inputs))
        inputs = jax.lax.dynamic_update_slice_in_dim(
            inputs, forecast_inputs.astype(inputs.dtype), start, 0
        )
    dtype = jnp.result_type(emissions.dtype, params.initial.mean)
    future = jnp.full((num_forecast_timesteps, emissions.shape[1]), jnp.nan, dtype)
    past = emissions.astype(dtype)
    past = past if seen is None else jnp.where(seen[:, None], past, jnp.nan)
    extended = jnp.concatenate((past, future))
    options = {"backend": backend, "form": form, "initial": initial}
    options["length"] = None if length is None else start + num_forecast_timesteps
    problem, stored = setup(params, extended, inputs, **options)
    found = infer_filtered(problem.model, problem.finite, form=stored, backend=backend)
    parts = _states_and_emissions(problem, found.filtered)
    return Forecast(
        *(
            jax.lax.dynamic_slice_in_dim(jnp.asarray(part), start, num_forecast_timesteps)
            for part in parts
        )
    )
