"""Draws from the joint distribution and from the posterior of the states."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jaxtyping import Array, ArrayLike, PRNGKeyArray, UInt32

from elkax.gaussian import Form, Model
from elkax.gaussian.decorrelation import uncorrelate
from elkax.gaussian.factor import psd_cholesky
from elkax.scan import Backend, linear_recurrence
from elkax.scan.lanes import from_lanes, matvec, to_lanes
from elkax.smoothers.linear import Initial, filter_and_smooth, setup, smooth_effects, unseen_states
from elkax.smoothers.prepare import Problem, check_backend, check_count, is_concrete

Key = PRNGKeyArray | UInt32[Array, "2"]


def sample_states(key: Key, model: Model, backend: Backend | None) -> Array:
    r"""Draw $z_{1:T}$ from the model, shape (T, D); covariances may be singular."""
    length = model.first.shape[0]
    size = model.initial_mean.shape[0]
    dtype = model.initial_mean.dtype
    draws = jr.normal(key, (length, size), dtype)
    noise = psd_cholesky(model.noise if model.noise.ndim == 2 else to_lanes(model.noise))
    steps = from_lanes(matvec(noise, to_lanes(draws))) + model.offset
    start = model.initial_mean + matvec(psd_cholesky(model.initial_cov), draws[0])
    weights = jnp.broadcast_to(model.weights, (length, size, size)).at[0].set(0.0)
    return linear_recurrence(weights, steps.at[0].set(start), backend=backend)


def lgssm_joint_sample(
    params: ParamsLGSSM,
    key: Key,
    num_timesteps: int,
    inputs: ArrayLike | None = None,
    *,
    backend: Backend | None = None,
    initial: Initial = None,
) -> tuple[Array, Array]:
    r"""Draw states and emissions from $p(z_{1:T}, y_{1:T} \mid u_{1:T})$.

    Args:
        params: dynamax parameters; covariances may be singular.
        key: random key.
        num_timesteps: T >= 1.
        inputs: (T, U).
        backend: how to run over time; chosen by `elkax.scan.choose` if None.
        initial: `Stationary()` in place of the initial distribution.

    Returns:
        States (T, D) and emissions (T, N).

    Raises:
        ValueError: on shapes that do not fit, T < 1, or states that start diffuse: there is nothing
            to draw them from.
    """
    check_backend(backend)
    check_count("num_timesteps", num_timesteps)
    weights = params.emissions.weights
    first = jnp.asarray(weights(0) if callable(weights) else weights)
    if first.ndim < 2:
        raise ValueError(
            f"params.emissions.weights must be (N, D) or (T, N, D), got shape {first.shape}"
        )
    empty = jnp.zeros((num_timesteps, first.shape[-2]), first.dtype)
    problem, _ = setup(
        params, empty, inputs, backend=backend, form=None, initial=initial, needs_data=False
    )
    if problem.model.unknown is not None:
        raise ValueError(
            "a diffuse start has no distribution to draw from; give a proper one (initial_variance="
            f" of the components, or initial=elkax.Stationary()), got diffuse {problem.diffuse}"
        )
    return _draw(key, problem, backend=backend)


@partial(jax.jit, static_argnames="backend")
def _draw(key: Key, problem: Problem, *, backend: Backend | None) -> tuple[Array, Array]:
    """Draw states and emissions."""
    state_key, emission_key = jr.split(key)
    states = sample_states(state_key, problem.model, backend)
    draws = jr.normal(emission_key, problem.emissions.shape, states.dtype)
    cov = problem.cov
    if problem.diagonal:
        errors = jnp.sqrt(cov) * draws
    else:
        factor = psd_cholesky(cov if cov.ndim == 2 else to_lanes(cov))
        errors = from_lanes(matvec(factor, to_lanes(draws)))
    means = jnp.einsum("...ij,...j->...i", problem.weights, states, precision="highest")
    return states, means + problem.offset + errors


def lgssm_posterior_sample(
    key: Key,
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None = None,
    jitter: ArrayLike = 0.0,
    *,
    num_samples: int | None = None,
    backend: Backend | None = None,
    form: str | None = None,
    initial: Initial = None,
    length: ArrayLike | None = None,
) -> Array:
    r"""Draw from $p(z_{1:T} \mid y_{1:T}, u_{1:T})$.

    By mean correction: with $(z^+, y^+)$ drawn from the model,
    $z^+ + E[z \mid y - y^+]$ (with zero offsets and initial mean) is a draw from the posterior.
    All draws share one set of covariances and run in parallel; singular covariances and missing
    data are ordinary.

    Args:
        key: random key.
        params: dynamax parameters.
        emissions: (T, N), NaN where missing.
        inputs: (T, U).
        jitter: variance of independent noise added to every drawn state; no covariance is factored
            that would need it.
        num_samples: how many draws; None for one without a leading axis.
        backend: as `lgssm_filter`.
        form: as `lgssm_filter`.
        initial: as `lgssm_filter`.
        length: as `lgssm_filter`.

    Returns:
        (T, D), or (num_samples, T, D).

    Raises:
        ValueError: as `lgssm_filter`, or if num_samples < 1.

    References:
        Durbin & Koopman (2002), Biometrika 89(3).
    """
    if num_samples is not None:
        check_count("num_samples", num_samples)
    problem, stored = setup(
        params,
        emissions,
        inputs,
        backend=backend,
        form=form,
        initial=initial,
        length=length,
        smoothing=True,
    )
    draws = draw_posterior(
        key,
        problem.model,
        num_samples=num_samples,
        form=stored,
        backend=backend,
    )
    if not (is_concrete(jitter) and jitter == 0):
        noise = jr.normal(jr.fold_in(key, 1), draws.shape, draws.dtype)
        draws = draws + jnp.sqrt(jitter) * noise
    return jnp.where(problem.finite, draws, jnp.nan)


@partial(jax.jit, static_argnames=("num_samples", "form", "backend"))
def draw_posterior(
    key: Key,
    model: Model,
    *,
    num_samples: int | None,
    form: Form,
    backend: Backend | None,
) -> Array:
    """Draw from the posterior of a prepared model: (num_samples, T, D), or (T, D) if None."""
    model = uncorrelate(model)

    def correct(key: Key) -> Array:
        state_key, emission_key = jr.split(key)
        states = sample_states(state_key, model, backend)
        errors = jr.normal(emission_key, model.values.shape, states.dtype)
        values = jnp.einsum("...ij,...j->...i", model.rows, states, precision="highest")
        values = model.values - values - jnp.sqrt(model.variances) * errors
        centred = model._replace(
            values=jnp.where(model.observed, values, 0.0),
            initial_mean=jnp.zeros_like(model.initial_mean),
            offset=jnp.zeros_like(model.offset),
        )
        return states + smoothed_mean(centred, form, backend)

    draws = jax.vmap(correct)(jr.split(key, num_samples or 1))
    if model.unknown is not None:
        draws = jnp.where(unseen_states(model, form, backend), jnp.nan, draws)
    return draws[0] if num_samples is None else draws


def smoothed_mean(model: Model, form: Form, backend: Backend | None) -> Array:
    """Return the smoothed means (T, D), any number where the data leave a state unknown."""
    solve = filter_and_smooth if model.unknown is None else smooth_effects
    return solve(model, form, backend).smoothed.mean
