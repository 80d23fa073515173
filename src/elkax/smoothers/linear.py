"""Kalman filter, smoother and likelihood of linear-Gaussian state-space models."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import (
    ParamsLGSSM,
    PosteriorGSSMFiltered,
    PosteriorGSSMSmoothed,
)
from jaxtyping import Array, ArrayLike

from elkax.gaussian import Covariance, Form, Model
from elkax.gaussian.costates import filter_model
from elkax.gaussian.decorrelation import uncorrelate
from elkax.gaussian.kalman import FilterOutput, log_density
from elkax.gaussian.score import filter_moments, log_likelihood, with_derivative_of
from elkax.gaussian.sharing import share_mask
from elkax.gaussian.smoothing import Smoothed, bryson_frazier, smooth
from elkax.scan import Backend
from elkax.scan.lanes import from_lanes, to_lanes
from elkax.smoothers.initial import ExactDiffuse, Stationary, estimate_diffuse, integrate
from elkax.smoothers.prepare import Problem, check_backend, find_form, prepare

Initial = Stationary | ExactDiffuse | None


class FilterSmoother(NamedTuple):
    """A filtered and smoothed model, covariances themselves."""

    filtered: FilterOutput
    smoothed: Smoothed


def filter_and_smooth(model: Model, form: Any, backend: Backend | None) -> FilterSmoother:
    """Filter and smooth a model whose covariances are themselves; see `filter_model`, `smooth`.

    Differentiated as the covariance-form filter and Bryson-Frazier smoother, which solve with no
    state covariance.
    """
    model = uncorrelate(model)

    def by_costates(model: Model) -> FilterSmoother:
        filtered = filter_model(model, Covariance(), backend)
        return FilterSmoother(filtered, bryson_frazier(model, filtered, Covariance(), backend))

    def in_form(model: Model) -> FilterSmoother:
        filtered = filter_model(model, form, backend)
        smoothed = smooth(model, filtered, form, backend)
        cov = from_lanes(form.decode(to_lanes(filtered.cov)))
        return FilterSmoother(filtered._replace(cov=cov), smoothed)

    return with_derivative_of(by_costates, in_form, model)


def setup(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None,
    *,
    backend: Backend | None,
    form: str,
    initial: Initial,
    length: ArrayLike | None = None,
) -> tuple[Problem, Form]:
    """Check all arguments that the inference functions share and prepare the problem."""
    check_backend(backend)
    stored = find_form(form)
    if initial is not None and not isinstance(initial, Stationary | ExactDiffuse):
        raise TypeError(
            f"initial must be None, elkax.Stationary() or elkax.ExactDiffuse(), got {initial!r}"
        )
    problem = prepare(params, emissions, inputs, length=length)
    if initial is not None:
        problem = replace(problem, model=initial.resolve(problem.model))
    return problem, stored


def assemble_posterior(
    value: Array, mean: Array, cov: Array, smoothed: Smoothed
) -> PosteriorGSSMSmoothed:
    """Put filtered and smoothed moments into dynamax's posterior."""
    cross = smoothed.lagged + smoothed.mean[:-1, :, None] * smoothed.mean[1:, None, :]
    return PosteriorGSSMSmoothed(value, mean, cov, smoothed.mean, smoothed.cov, cross)


def poison(value: Array, finite: Array) -> Array:
    """Return NaN if a parameter is not finite, even one that no observation depends on."""
    return jnp.where(finite, value, jnp.nan)


@partial(jax.jit, static_argnames=("form", "backend", "initial"))
def _filter(
    model: Model, finite: Array, *, form: Form, backend: Backend | None, initial: Initial
) -> PosteriorGSSMFiltered:
    def solve(model: Model) -> tuple[Array, Array, Array]:
        if not isinstance(initial, ExactDiffuse):
            filtered = filter_moments(model, form, backend)
            return jnp.sum(log_density(filtered)), filtered.mean, filtered.cov
        columns = initial.run(lambda m: filter_moments(m, form, backend), model)
        effect, value = estimate_diffuse(columns)
        return value, *integrate(columns.mean, columns.cov[0], effect.mean, effect.cov)

    value, mean, cov = share_mask(solve, model)
    return PosteriorGSSMFiltered(poison(value, finite), mean, cov)


@partial(jax.jit, static_argnames=("form", "backend", "initial"))
def _smoother(
    model: Model, finite: Array, *, form: Form, backend: Backend | None, initial: Initial
) -> PosteriorGSSMSmoothed:
    def solve(model: Model) -> PosteriorGSSMSmoothed:
        if not isinstance(initial, ExactDiffuse):
            filtered, smoothed = filter_and_smooth(model, form, backend)
            value = jnp.sum(log_density(filtered))
            return assemble_posterior(value, filtered.mean, filtered.cov, smoothed)
        columns, given = initial.run(lambda m: filter_and_smooth(m, form, backend), model)
        effect, value = estimate_diffuse(columns)
        mean, cov = integrate(columns.mean, columns.cov[0], effect.mean, effect.cov)
        last = effect.mean[-1], effect.cov[-1]
        _, lagged = integrate(given.mean[:, :-1], given.lagged[0], *last, other=given.mean[1:, 1:])
        smoothed = Smoothed(*integrate(given.mean, given.cov[0], *last), lagged)
        return assemble_posterior(value, mean, cov, smoothed)

    posterior = share_mask(solve, model)
    return posterior._replace(marginal_loglik=poison(posterior.marginal_loglik, finite))


@partial(jax.jit, static_argnames=("form", "backend", "initial"))
def _marginal_log_prob(
    model: Model, finite: Array, *, form: Form, backend: Backend | None, initial: Initial
) -> Array:
    if not isinstance(initial, ExactDiffuse):
        return poison(log_likelihood(model, form, backend), finite)

    def solve(model: Model) -> Array:
        columns = initial.run(lambda m: filter_moments(m, form, backend), model)
        return estimate_diffuse(columns)[1]

    return poison(share_mask(solve, model), finite)


def lgssm_filter(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None = None,
    *,
    backend: Backend | None = None,
    form: str = "covariance",
    initial: Initial = None,
    length: ArrayLike | None = None,
) -> PosteriorGSSMFiltered:
    r"""Compute $p(z_t \mid y_{1:t}, u_{1:t})$ for every t.

    The model is $z_1 \sim N(m_0, P_0)$, $z_t = F_tz_{t-1} + B_tu_t + b_t + N(0, Q_t)$,
    $y_t = H_tz_t + D_tu_t + d_t + N(0, R_t)$. Singular Q, P0 and R are ordinary inputs.

    Args:
        params: dynamax parameters, D states and N emissions. Each entry is constant, has a
            leading time axis, or is a callable of t; biases and input weights may be None.
            Dynamics entry t belongs to the step into $z_t$, entry 0 is not used. The emission
            covariance may be (N, N), (N,) diagonal, (T, N, N) or (T, N).
        emissions: $y$ (T, N). NaN is missing, whole rows or single entries.
        inputs: $u$ (T, U); `inputs[t]` enters the step into $z_t$ and the emission at t.
        backend: how to run over time; chosen by `elkax.scan.choose` if None.
        form: "covariance", or "square_root" for float32 and badly scaled models.
        initial: `Stationary()` or `ExactDiffuse()` in place of the initial distribution.
        length: only the first `length` time steps exist; what follows is padding, where the last
            posterior is repeated. For ragged batches under `vmap`.

    Returns:
        Log-likelihood, filtered means (T, D) and covariances (T, D, D). The log-likelihood is NaN
        if a parameter is not finite or an innovation covariance is singular. Cost O(T D^3 + T N
        D^2), memory O(T D^2).

    Raises:
        ValueError: on shapes that do not fit, T = 0, covariances that are not symmetric, missing
            inputs, an unknown form.
        TypeError: on arrays without real numbers, or a backend that is none.

    References:
        Särkkä & García-Fernández (2021), arXiv:1905.13002; Durbin & Koopman (2012), Ch. 4 and 6.
    """
    problem, stored = setup(
        params, emissions, inputs, backend=backend, form=form, initial=initial, length=length
    )
    return _filter(problem.model, problem.finite, form=stored, backend=backend, initial=initial)


def lgssm_smoother(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None = None,
    *,
    backend: Backend | None = None,
    form: str = "covariance",
    initial: Initial = None,
    length: ArrayLike | None = None,
) -> PosteriorGSSMSmoothed:
    r"""Compute $p(z_t \mid y_{1:T}, u_{1:T})$ for every t.

    Arguments, errors and cost as `lgssm_filter`. By Rauch-Tung-Striebel in Joseph form, or by
    Bryson-Frazier where a predicted covariance is singular.

    Returns:
        What `lgssm_filter` gives, smoothed means (T, D) and covariances (T, D, D), and
        `smoothed_cross_covariances` (T - 1, D, D), which is as in dynamax the second moment
        $E[z_tz_{t+1}^\top \mid y_{1:T}]$.

    References:
        Rauch, Tung & Striebel (1965); Bryson & Frazier (1963); Särkkä & Svensson (2023), Ch. 12.
    """
    problem, stored = setup(
        params, emissions, inputs, backend=backend, form=form, initial=initial, length=length
    )
    return _smoother(problem.model, problem.finite, form=stored, backend=backend, initial=initial)


def lgssm_marginal_log_prob(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None = None,
    *,
    backend: Backend | None = None,
    form: str = "covariance",
    initial: Initial = None,
    length: ArrayLike | None = None,
) -> Array:
    r"""Compute $\log p(y_{1:T} \mid u_{1:T})$ of the observed entries.

    Arguments, errors and cost as `lgssm_filter`. Its derivative is the score of the disturbance
    smoother: one gradient costs about two more passes, is finite at Q = 0 and P0 = 0, and can be
    taken forward, in reverse, and again for the Hessian.

    Returns:
        The log-likelihood, a scalar; NaN if a parameter is not finite or an innovation covariance
        is singular.

    References:
        Koopman & Shephard (1992), Biometrika 79(4).
    """
    problem, stored = setup(
        params, emissions, inputs, backend=backend, form=form, initial=initial, length=length
    )
    return _marginal_log_prob(
        problem.model, problem.finite, form=stored, backend=backend, initial=initial
    )
