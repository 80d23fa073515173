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

from elkax.gaussian import Covariance, Form, Model, SquareRoot
from elkax.gaussian.decorrelation import uncorrelate
from elkax.gaussian.effects import combine_columns, estimate, over_effects, spread
from elkax.gaussian.filtering import filter_model
from elkax.gaussian.output import FilterOutput, log_density
from elkax.gaussian.score import filter_moments, log_likelihood, with_derivative_of
from elkax.gaussian.sharing import share_mask
from elkax.gaussian.smoothing import Smoothed, smooth
from elkax.gaussian.unknown import log_rotation, never_seen
from elkax.scan import Backend
from elkax.scan.lanes import from_lanes, to_lanes
from elkax.smoothers.checks import check_observed
from elkax.smoothers.initial import ExactDiffuse, Stationary
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
        return FilterSmoother(filtered, smooth(model, filtered, Covariance(), backend))

    def in_form(model: Model) -> FilterSmoother:
        turning = isinstance(form, SquareRoot)
        filtered = filter_model(model, form, backend, turning=turning)
        smoothed = smooth(model, filtered, form, backend)
        cov = from_lanes(form.decode(to_lanes(filtered.cov)))
        return FilterSmoother(filtered._replace(cov=cov, turn=None), smoothed)

    if isinstance(form, Covariance):
        return in_form(model)
    return with_derivative_of(by_costates, in_form, model)


def setup(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None,
    *,
    backend: Backend | None,
    form: str | None,
    initial: Initial,
    length: ArrayLike | None = None,
    needs_data: bool = True,
    smoothing: bool = False,
) -> tuple[Problem, Form]:
    """Check all arguments that the inference functions share and prepare the problem.

    A diffuse start in the parameters and one by `initial` add up.
    """
    check_backend(backend)
    if initial is not None and not isinstance(initial, Stationary | ExactDiffuse):
        raise TypeError(
            f"initial must be None, elkax.Stationary() or elkax.ExactDiffuse(), got {initial!r}"
        )
    problem = prepare(params, emissions, inputs, length=length)
    diffuse = problem.diffuse
    if isinstance(initial, ExactDiffuse):
        named = initial.mask(len(diffuse))
        diffuse = tuple(a or b for a, b in zip(diffuse, named, strict=True))
    if isinstance(initial, Stationary):
        problem = replace(problem, model=initial.resolve(problem.model), diffuse=())
        problem = replace(problem, too_far=frozenset())
    elif any(diffuse):
        if all(diffuse) and needs_data:
            check_observed(problem.emissions, problem.model.valid)
        model = ExactDiffuse(diffuse).resolve(problem.model)
        problem = replace(problem, model=model, diffuse=diffuse)
    stored = find_form(
        form,
        problem.emissions.dtype,
        exact_entries=problem.exact_entries,
        too_far=("smooth" if smoothing else "filter") in problem.too_far,
    )
    return problem, stored


class Moments(NamedTuple):
    r"""Moments of the states, of which directions may be undetermined.

    Attributes:
        mean: (T, D).
        cov: (T, D, D).
        unknown: (T, D, d), zero in what is determined; None if all of it is.
    """

    mean: Array
    cov: Array
    unknown: Array | None

    def is_unknown(self) -> Array:
        """Tell which states are undetermined (T, D)."""
        if self.unknown is None:
            return jnp.zeros(self.mean.shape, bool)
        return jnp.any(self.unknown != 0, axis=-1)

    def shown(self) -> tuple[Array, Array]:
        """Give means and covariances: of an undetermined state NaN, with infinite variance."""
        if self.unknown is None:
            return self.mean, self.cov
        hidden = self.is_unknown()
        eye = jnp.eye(self.mean.shape[-1], dtype=bool)
        cov = jnp.where(hidden[:, :, None] | hidden[:, None, :], jnp.nan, self.cov)
        return (
            jnp.where(hidden, jnp.nan, self.mean),
            jnp.where(eye & hidden[:, :, None], jnp.inf, cov),
        )


class Inference(NamedTuple):
    """What filter and smoother find.

    Attributes:
        value: log-likelihood.
        filtered: moments given the past and present.
        smoothed: moments given everything, None for a filter.
        lagged: covariances of neighbouring states given everything, None for a filter.
    """

    value: Array
    filtered: Moments
    smoothed: Moments | None = None
    lagged: Array | None = None

    def posterior(self) -> PosteriorGSSMSmoothed:
        """Put everything into dynamax's posterior."""
        value, filtered, smoothed, lagged = self
        assert smoothed is not None and lagged is not None
        if smoothed.unknown is not None:
            hidden = smoothed.is_unknown()
            pairs = hidden[:-1, :, None] | hidden[1:, None, :]
            lagged = jnp.where(pairs, jnp.nan, lagged)
        means = Smoothed(*smoothed.shown(), lagged)
        return assemble_posterior(value, *filtered.shown(), means)


def assemble_posterior(
    value: Array, mean: Array, cov: Array, smoothed: Smoothed
) -> PosteriorGSSMSmoothed:
    """Put filtered and smoothed moments into dynamax's posterior."""
    cross = smoothed.lagged + smoothed.mean[:-1, :, None] * smoothed.mean[1:, None, :]
    return PosteriorGSSMSmoothed(value, mean, cov, smoothed.mean, smoothed.cov, cross)


def poison(value: Array, finite: Array) -> Array:
    """Return NaN if a parameter is not finite, even one that no observation depends on."""
    return jnp.where(finite, value, jnp.nan)


def _filtered(model: Model, form: Form, backend: Backend | None) -> Inference:
    """Filter: the log-likelihood and the moments; in the smoothed ones only what stays unknown."""
    filtered = filter_moments(model, form, backend)
    value = jnp.sum(log_density(filtered))
    mean, cov, unknown = filtered.mean, filtered.cov, filtered.unknown
    if unknown is None:
        return Inference(value, Moments(mean, cov, None))
    size = mean.shape[-1]
    value = value + log_rotation(unknown[-1], jnp.asarray(model.unknown))
    past = Moments(mean, cov, jax.lax.stop_gradient(unknown[:, :size]))
    return Inference(value, past, Moments(mean, cov, never_seen(unknown, jnp.asarray(model.age))))


@partial(jax.jit, static_argnames=("form", "backend"))
def infer_filtered(
    model: Model, finite: Array, *, form: Form, backend: Backend | None
) -> Inference:
    """Filter a prepared model."""
    found = share_mask(lambda m: _filtered(m, form, backend), model)
    return Inference(poison(found.value, finite), found.filtered)


@partial(jax.jit, static_argnames=("form", "backend"))
def infer_smoothed(
    model: Model, finite: Array, *, form: Form, backend: Backend | None
) -> Inference:
    """Filter and smooth a prepared model."""

    def solve(model: Model) -> Inference:
        if model.unknown is None:
            filtered, smoothed = filter_and_smooth(model, form, backend)
            value = jnp.sum(log_density(filtered))
            past = Moments(filtered.mean, filtered.cov, None)
            return Inference(
                value, past, Moments(smoothed.mean, smoothed.cov, None), smoothed.lagged
            )
        past = _filtered(model, form, backend)
        found = smooth_effects(model, form, backend)
        mean, cov, lagged = found.smoothed
        unknown = None if past.smoothed is None else past.smoothed.unknown
        return Inference(found.value, past.filtered, Moments(mean, cov, unknown), lagged)

    found = share_mask(solve, model)
    return found._replace(value=poison(found.value, finite))


class EffectsIntegrated(NamedTuple):
    """Smoothed moments and the log-likelihood, unknown effects integrated out."""

    value: Array
    smoothed: Smoothed


def smooth_effects(model: Model, form: Form, backend: Backend | None) -> EffectsIntegrated:
    """Smooth given unknown effects, and integrate these out.

    Numbers where the data leave a state unknown are no moments of it: see `unseen_states`.
    """
    model = uncorrelate(model)
    columns, given = over_effects(lambda m: filter_and_smooth(m, form, backend), model)
    effect, value = estimate(model, columns)
    mean = combine_columns(given.mean, effect)[0]
    cov = given.cov[0] + spread(given.mean, effect)
    lagged = given.lagged[0] + spread(given.mean[:, :-1], effect, given.mean[:, 1:])
    return EffectsIntegrated(value, Smoothed(mean, cov, lagged))


def unseen_states(model: Model, form: Form, backend: Backend | None) -> Array:
    """Tell which states all data leave unknown (T, D), for a model with unknown effects."""
    states = _filtered(model, form, backend).smoothed
    assert states is not None
    return states.is_unknown()


@partial(jax.jit, static_argnames=("form", "backend"))
def _marginal_log_prob(
    model: Model, finite: Array, *, form: Form, backend: Backend | None
) -> Array:
    return poison(log_likelihood(model, form, backend), finite)


@jax.jit
def _shown(moments: Moments) -> tuple[Array, Array]:
    return moments.shown()


@jax.jit
def _posterior(found: Inference) -> PosteriorGSSMSmoothed:
    return found.posterior()


def lgssm_filter(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None = None,
    *,
    backend: Backend | None = None,
    form: str | None = None,
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
        form: "covariance", or "square_root" for badly scaled models; if None, square roots in types
            of few digits such as float32, and where the prior variance of a measurement is seen to
            be far larger than its noise (7e7 times to filter, 1e3 times to smooth), else
            covariances. Inside `jit` or `grad`, where parameters cannot be looked at, name it.
        initial: `Stationary()` in place of the initial distribution, or `ExactDiffuse()` for states
            of which nothing is known, beside those that are diffuse in the parameters.
        length: only the first `length` time steps exist; what follows is padding, where the last
            posterior is repeated. For ragged batches under `vmap`.

    Returns:
        Log-likelihood, filtered means (T, D) and covariances (T, D, D). The log-likelihood is NaN
        if a parameter is not finite. An emission without error (R = 0) of what is known exactly is
        left out of it, or makes it $-\infty$ where it contradicts that: R = 0 is no point to search
        across. A state of which nothing is known has mean and covariances NaN and an infinite
        variance. Cost O(T D^3 + T N D^2), memory O(T D^2).

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
    found = infer_filtered(problem.model, problem.finite, form=stored, backend=backend)
    return PosteriorGSSMFiltered(found.value, *_shown(found.filtered))


def lgssm_smoother(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None = None,
    *,
    backend: Backend | None = None,
    form: str | None = None,
    initial: Initial = None,
    length: ArrayLike | None = None,
) -> PosteriorGSSMSmoothed:
    r"""Compute $p(z_t \mid y_{1:T}, u_{1:T})$ for every t.

    Arguments, errors and cost as `lgssm_filter`. In covariance form by Bryson-Frazier, in
    square-root form by rotations of factors; neither solves with a covariance of states, so every
    rank of Q, R and P0 is ordinary.

    Returns:
        What `lgssm_filter` gives, smoothed means (T, D) and covariances (T, D, D), and
        `smoothed_cross_covariances` (T - 1, D, D), which is as in dynamax the second moment
        $E[z_tz_{t+1}^\top \mid y_{1:T}]$.

    References:
        Bryson & Frazier (1963); Durbin & Koopman (2012), Ch. 4 and 6.
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
    found = infer_smoothed(problem.model, problem.finite, form=stored, backend=backend)
    return _posterior(found)


def lgssm_marginal_log_prob(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None = None,
    *,
    backend: Backend | None = None,
    form: str | None = None,
    initial: Initial = None,
    length: ArrayLike | None = None,
) -> Array:
    r"""Compute $\log p(y_{1:T} \mid u_{1:T})$ of the observed entries.

    Arguments, errors and cost as `lgssm_filter`. Its derivative is the score of the disturbance
    smoother: one gradient costs about two more passes, is finite at Q = 0 and P0 = 0, and can be
    taken forward, in reverse, and again for the Hessian.

    Returns:
        The log-likelihood, a scalar, as `lgssm_filter` has it; where it is $-\infty$ its derivative
        is zero.

    References:
        Koopman & Shephard (1992), Biometrika 79(4).
    """
    problem, stored = setup(
        params, emissions, inputs, backend=backend, form=form, initial=initial, length=length
    )
    return _marginal_log_prob(problem.model, problem.finite, form=stored, backend=backend)
