"""Innovations and smoothed disturbances, for checking a model."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jaxtyping import Array, ArrayLike

from elkax.gaussian import FilterOutput, Form, Model
from elkax.gaussian.costates import Costates, find_costates
from elkax.gaussian.decorrelation import uncorrelate
from elkax.gaussian.effects import combine_columns, estimate, over_effects, spread
from elkax.gaussian.factor import unit_ldl
from elkax.gaussian.score import filter_moments
from elkax.gaussian.unknown import propagate
from elkax.scan import Backend
from elkax.scan.lanes import from_lanes, to_lanes
from elkax.smoothers.forecasting import emission_moments, full_cov
from elkax.smoothers.linear import Initial, Moments, infer_smoothed, setup
from elkax.smoothers.prepare import Problem

# GPUs would otherwise multiply in TF32.
_product = partial(jnp.matmul, precision="highest")


class Innovations(NamedTuple):
    r"""One-step-ahead prediction errors.

    Attributes:
        means: $E[y_t \mid y_{1:t-1}]$ (T, N).
        covariances: $S_t$ (T, N, N).
        innovations: $v_t = y_t - E[y_t \mid y_{1:t-1}]$ (T, N), NaN where missing.
        standardized: $L_t^{-1}v_t$ (T, N) with $L_tL_t^\top$ the observed block of $S_t$, NaN
            where missing; independent standard normal if the model is right.
    """

    means: Array
    covariances: Array
    innovations: Array
    standardized: Array


class Disturbances(NamedTuple):
    r"""Moments of the disturbances given all data.

    Attributes:
        dynamics_means: $E[w_t \mid y_{1:T}]$ (T, D), $w_t$ the noise of the step into $z_t$ and
            $w_1 = z_1 - m_0$.
        dynamics_covariances: $\mathrm{Cov}[w_t \mid y_{1:T}]$ (T, D, D).
        emission_means: $E[\epsilon_t \mid y_{1:T}]$ (T, N).
        emission_covariances: $\mathrm{Cov}[\epsilon_t \mid y_{1:T}]$ (T, N, N).
    """

    dynamics_means: Array
    dynamics_covariances: Array
    emission_means: Array
    emission_covariances: Array


def lgssm_innovations(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None = None,
    *,
    backend: Backend | None = None,
    form: str | None = None,
    initial: Initial = None,
    length: ArrayLike | None = None,
) -> Innovations:
    """Compute one-step-ahead prediction errors, raw and standardized.

    Arguments and errors as `lgssm_filter`. With `ExactDiffuse()` everything is NaN at the times
    that the earlier data do not yet predict.

    Returns:
        Predictions, their covariances and the two kinds of errors; index t is the emission t.

    References:
        Durbin & Koopman (2012), Sec. 2.12 and 7.5.
    """
    problem, stored = setup(
        params, emissions, inputs, backend=backend, form=form, initial=initial, length=length
    )
    return _innovations(problem, form=stored, backend=backend)


@partial(jax.jit, static_argnames=("form", "backend"))
def _innovations(problem: Problem, *, form: Form, backend: Backend | None) -> Innovations:
    """Predict from filtered moments."""
    model = problem.model
    filtered = filter_moments(model, form, backend)
    mean, cov = filtered.mean[:-1], filtered.cov[:-1]
    weights, offset, noise = (
        part[1:] if part.ndim > rank else part
        for part, rank in ((model.weights, 2), (model.offset, 1), (model.noise, 2))
    )
    mean = jnp.einsum("...ij,...j->...i", weights, mean, precision="highest") + offset
    cov = jnp.einsum("...ij,...jk,...lk->...il", weights, cov, weights, precision="highest") + noise
    unknown = None
    if model.unknown is not None:
        size = mean.shape[-1]
        later = jax.vmap(propagate, in_axes=(0 if weights.ndim == 3 else None, 0))
        earlier = jnp.asarray(filtered.unknown)[:-1]
        unknown = jnp.concatenate((model.unknown[None], later(weights, earlier)[0]))[:, :size]
    states = Moments(
        jnp.concatenate((model.initial_mean[None], mean)),
        jnp.concatenate((model.initial_cov[None], cov)),
        unknown,
    )
    means, covs = emission_moments(problem, states)
    innovations = problem.emissions - means
    positive = filtered.variance > 0
    white = filtered.residual * jax.lax.rsqrt(jnp.where(positive, filtered.variance, 1.0))
    white = jnp.where(positive & model.observed, white, jnp.nan)
    return Innovations(means, covs, innovations, white)


def lgssm_disturbances(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None = None,
    *,
    backend: Backend | None = None,
    form: str | None = None,
    initial: Initial = None,
    length: ArrayLike | None = None,
) -> Disturbances:
    r"""Compute the moments of all disturbances given all data.

    $E[w_t] = Q_tq_t$ and $\mathrm{Cov}[w_t] = Q_t - Q_t\Lambda_tQ_t$ from the costates, which
    inverts no state covariance; $\epsilon_t = y_t - H_tz_t - d_t$ from the smoothed states.
    Divided by their standard deviations over time they are the auxiliary residuals that show
    outliers (emission) and breaks (dynamics).

    Arguments and errors as `lgssm_filter`.

    Returns:
        Means and covariances, index t as the emissions.

    References:
        Koopman (1993), Biometrika 80(1); Durbin & Koopman (2012), Sec. 4.5.
    """
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
    options = {"form": stored, "backend": backend}
    smoothed = infer_smoothed(problem.model, problem.finite, **options).smoothed
    dynamics = _dynamics_disturbances(problem.model, **options)
    first_mean, first_cov = smoothed.shown()
    means = dynamics[0].at[0].set(first_mean[0] - problem.model.initial_mean)
    covs = dynamics[1].at[0].set(first_cov[0])
    return Disturbances(means, covs, *_emission_disturbances(problem, smoothed))


@partial(jax.jit, static_argnames=("form", "backend"))
def _dynamics_disturbances(
    model: Model, *, form: Form, backend: Backend | None
) -> tuple[Array, Array]:
    def solve(model: Model) -> tuple[FilterOutput, Costates]:
        filtered = filter_moments(model, form, backend)
        return filtered, find_costates(model, filtered, backend)

    model = uncorrelate(model)
    noise = jnp.broadcast_to(model.noise, (model.first.shape[0], *model.noise.shape[-2:]))

    def moments(q: Array, matrix: Array) -> tuple[Array, Array]:
        mean = jnp.einsum("tij,...tj->...ti", noise, q, precision="highest")
        return mean, noise - _product(_product(noise, matrix), noise)

    if model.unknown is None:
        _, costates = solve(model)
        return moments(*costates)
    filtered, costates = over_effects(solve, model)
    effect, _ = estimate(model, filtered)
    mean, cov = moments(costates.vector, costates.matrix[0])
    return combine_columns(mean, effect)[0], cov + spread(mean, effect)


@jax.jit
def _emission_disturbances(problem: Problem, states: Moments) -> tuple[Array, Array]:
    r"""Give the moments of $\epsilon_t$; a missing entry follows from the observed ones.

    With $M = R_{\cdot o}R_{oo}^{-1}$: $M\hat\epsilon_o$ and
    $R - MR_{o\cdot} + MH_oPH_o^\top M^\top$.
    """
    cov = full_cov(problem)
    length = problem.emissions.shape[0]
    cov = jnp.broadcast_to(cov, (length, *cov.shape[-2:]))
    seen = ~jnp.isnan(problem.emissions)
    fitted, within = emission_moments(problem, states)
    within = within - cov
    residual = jnp.where(seen, problem.emissions - fitted, 0.0)
    both = seen[:, :, None] & seen[:, None, :]
    eye = jnp.eye(cov.shape[-1], dtype=cov.dtype)
    inverse, pivots = unit_ldl(to_lanes(jnp.where(both, cov, eye)))
    positive = pivots > 0
    weight = jnp.where(positive, 1.0 / jnp.where(positive, pivots, 1.0), 0.0)
    # An entry without error of its own tells nothing about the errors of the others.
    inverse, weight = from_lanes(inverse), from_lanes(weight)
    precision = _product(jnp.swapaxes(inverse, -1, -2), weight[:, :, None] * inverse)
    carry = _product(jnp.where(seen[:, None, :], cov, 0.0), precision)
    carry = jnp.where(seen[:, None, :], carry, 0.0)
    carry = jnp.where(seen[:, :, None], eye, carry)
    mean = jnp.einsum("tij,tj->ti", carry, residual, precision="highest")
    seen_spread = jnp.where(both, within, 0.0)
    seen_cov = jnp.where(seen[:, None, :], cov, 0.0)
    own = cov - _product(carry, jnp.swapaxes(seen_cov, -1, -2))
    own = jnp.where(seen[:, :, None] | seen[:, None, :], 0.0, own)
    within = own + _product(_product(carry, seen_spread), jnp.swapaxes(carry, -1, -2))
    # An entry without measurement error has none, not even a rounded one.
    noisy = jnp.diagonal(cov, axis1=-2, axis2=-1) != 0
    within = jnp.where(noisy[:, :, None] & noisy[:, None, :], within, 0.0)
    return jnp.where(noisy, mean, 0.0), within
