"""The iterated smoother: where it starts, its loop, and what it returns."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import PosteriorGSSMSmoothed
from jaxtyping import Array, ArrayLike, PyTree

from elkax.gaussian import Form
from elkax.gaussian.output import log_density
from elkax.linearize import Linearizer, Taylor
from elkax.linearize.emissions import Residual
from elkax.scan import Backend
from elkax.scan.lanes import matmul, matvec
from elkax.smoothers.cost import hessian_diagonal, measure
from elkax.smoothers.damping import Damping, LevenbergMarquardt
from elkax.smoothers.descent import Point, Record, Solver, advance
from elkax.smoothers.iteration import Tolerance, iterate
from elkax.smoothers.linear import assemble_posterior, filter_and_smooth
from elkax.smoothers.linearization import Linearized, linearize
from elkax.smoothers.nonlinear import filter_system, smooth_filtered
from elkax.smoothers.prepare import check_backend, check_count, find_form, real_array
from elkax.smoothers.stationarity import at_fixed_point, at_least_cost, minimises
from elkax.smoothers.system import (
    Data,
    NonlinearParams,
    System,
    check_linearizer,
    for_emissions,
    prepare_system,
)


class Info(NamedTuple):
    r"""How an iterated smoother ended, readable under `jit`.

    Attributes:
        status: a `Status` as an integer: 0 converged, 1 max_iters, 2 nonfinite, 3 stalled.
        iterations: number of iterations.
        cost: MAP cost of `trajectory`, less the normalising constants of its Gaussian terms; for
            linearizers that use a covariance, that of the expected functions with it held fixed.
        damping: as `Record`, of the last iteration.
        step: as `Record`, of the last iteration.
        constraint_residual: sum of $|z_t - f(z_{t-1})|$ and $|y_t - h(z_t)|$ in the directions
            that have no noise; zero if every covariance is regular.
        history: a `Record` with leading axis `max_iters`, NaN after the last; None if not kept.
    """

    status: Array
    iterations: Array
    cost: Array
    damping: Array
    step: Array
    constraint_residual: Array
    history: Record | None


class Solution(NamedTuple):
    """Result of an iterated smoother.

    Attributes:
        posterior: of the model linearized about `trajectory`, without damping. The log-likelihood
            is that of this linearization.
        trajectory: the states (T, D) that the iteration ended at.
        info: how it ended.
    """

    posterior: PosteriorGSSMSmoothed
    trajectory: Array
    info: Info


@partial(
    jax.jit,
    static_argnames=("system", "linearizer", "damping", "form", "backend", "history"),
)
def _solve(
    system: System,
    data: Data,
    means: Array,
    covs: Array | None,
    max_iters: Array,
    tolerance: Array,
    *,
    linearizer: Linearizer,
    damping: Damping,
    form: Form,
    backend: Backend | None,
    history: int,
) -> Solution:
    solver = Solver(system, data, linearizer, damping, form, backend)
    hessian = hessian_diagonal(linearize(system, data, linearizer, means, covs))
    zero = jnp.zeros((), means.dtype)
    start = Point(means, covs, damping.start(hessian), zero, jnp.full((), jnp.inf, means.dtype))
    # Derivatives are those of the end, not of the way there.
    start = jax.lax.stop_gradient(start)
    step, closed = jax.closure_convert(partial(advance, solver), start)
    fixed = jax.lax.stop_gradient(closed)
    point, outcome = iterate(
        lambda point: step(point, *fixed),
        start,
        max_iters=max_iters,
        tolerance=Tolerance(tolerance, tolerance),
        history=history,
    )
    if point.covs is None and minimises(system):
        means, covs = at_least_cost(system, data, point.means), None
    else:
        means, covs = at_fixed_point(closed, point.means, point.covs)
    linearized = linearize(system, data, linearizer, means, covs)
    misfit = measure(system, data, linearizer, linearized, means, covs)
    info = Info(
        outcome.status,
        outcome.iterations,
        misfit.cost(),
        outcome.last.damping,
        outcome.last.step,
        misfit.violation(),
        outcome.history,
    )
    return Solution(posterior_of(linearized, form, backend), means, info)


def posterior_of(
    linearized: Linearized, form: Form, backend: Backend | None
) -> PosteriorGSSMSmoothed:
    """Return the posterior of a linearized model, with the log-likelihood that it implies."""
    filtered, smoothed = filter_and_smooth(linearized.model, form, backend)
    value = jnp.sum(log_density(filtered)) + jnp.sum(linearized.log_scale)
    return assemble_posterior(value, filtered.mean, filtered.cov, smoothed)


def iterated_smoother(
    params: NonlinearParams,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    *,
    linearizer: Linearizer = Taylor(),
    damping: Damping = LevenbergMarquardt(),
    max_iters: int = 50,
    tolerance: ArrayLike | None = None,
    start: Any = None,
    residual: Residual | None = None,
    backend: Backend | None = None,
    form: str = "covariance",
    history: bool = False,
) -> Solution:
    r"""Smooth a nonlinear model by linearizing along the trajectory until it stays where it is.

    Each iteration linearizes every step and emission about the last trajectory, adds the damping
    as pseudo-observations, and smooths the linear-Gaussian model, in parallel over time. With
    `Taylor()` this minimises the MAP cost, by Gauss-Newton if undamped; with `SigmaPoints()` it is
    the posterior-linearization smoother, judged by its own fixed point. A step is accepted only if
    it lowers the cost, or, where Q, P0 or R is singular, the cost in their ranges plus a penalty
    on the rest.

    Args:
        params: dynamax's `ParamsNLGSSM` or `ParamsGGSSM`, or `ParamsDistributionSSM`. Functions of
            (z), or of (z, u) if there are inputs; covariances may vary in time, R may be (N,).
        emissions: $y$ (T, N), NaN where missing; integers and bools are taken as numbers.
        inputs: $u$ (T, U), or a pytree of arrays with leading axis T; entry t enters the step into
            $z_t$ and the emission at t.
        linearizer: `Taylor()` or `SigmaPoints(rule)`.
        damping: `LevenbergMarquardt()`, `TrustRegion()`, `LineSearch()`, or none: `GaussNewton()`.
        max_iters: most iterations, 0 or more.
        tolerance: when the step (see `Record`) and the relative change of the cost are this small,
            the iteration has converged. By default the square root of the precision of the dtype.
        start: where to linearize first. None for a pass of the filter and smoother, "prior" for
            the initial mean, with sigma points also the covariance, carried forward by the
            dynamics, a trajectory (T, D), one state (D,) for all times, or a smoothed posterior.
            Sigma points about a trajectory or a state begin as its Taylor expansion.
        residual: $(y, \hat y)$ to their difference, for emissions on a circle.
        backend: how to run over time; chosen by `elkax.scan.choose` if None.
        form: "covariance" or "square_root".
        history: whether to keep cost, damping and step of every iteration.

    Returns:
        Posterior, trajectory and `Info`. If a start is not finite, the initial mean at all times
        takes its place. One iteration costs O(T D^3 + T N D^2) and as many evaluations of f and h
        and their derivatives as the linearizer takes. With `Taylor()` the trajectory at
        convergence, and so the posterior, has the derivative of the implicit function theorem with
        the exact Hessian of the MAP cost, whatever the number of iterations.

    Raises:
        ValueError: on shapes that do not fit, an unknown form or start.
        TypeError: on functions of another signature, a damping, linearizer or backend that is none.
        NotImplementedError: where it is differentiated and does not minimise the MAP cost.

    References:
        Bell (1994), SIAM Journal on Optimization 4(3); García-Fernández, Svensson & Särkkä (2017),
        IEEE TSP 65(2); Särkkä & Svensson (2020), arXiv:2003.12371; Yaghoobi et al. (2021),
        arXiv:2102.00514.
    """
    check_backend(backend)
    stored = find_form(form, float)
    check_strategy(linearizer, damping, max_iters)
    system, data = prepare_system(params, emissions, inputs, residual=residual)
    check_linearizer(linearizer, data)
    stored = for_emissions(stored, system, data)
    means, covs = _find_start(start, system, data, linearizer, stored, backend)
    dtype = means.dtype
    tolerance = jnp.sqrt(jnp.finfo(dtype).eps) if tolerance is None else tolerance
    return _solve(
        system,
        data,
        means,
        covs,
        jnp.asarray(max_iters),
        jnp.asarray(tolerance, dtype),
        linearizer=linearizer,
        damping=damping,
        form=stored,
        backend=backend,
        history=max_iters if history else 0,
    )


def check_strategy(linearizer: Any, damping: Any, max_iters: Any) -> None:
    """Raise unless the options of an iteration are of their kinds."""
    for name, value, kind, example in (
        ("linearizer", linearizer, Linearizer, "Taylor()"),
        ("damping", damping, Damping, "LevenbergMarquardt()"),
    ):
        if isinstance(value, type) or not isinstance(value, kind):
            raise TypeError(f"{name} must be an object such as elkax.{example}, got {value!r}")
    if max_iters != 0:
        check_count("max_iters", max_iters)


@partial(jax.jit, static_argnames=("system", "linearizer", "form", "backend"))
def _filter_start(
    system: System, data: Data, *, linearizer: Linearizer, form: Form, backend: Backend | None
) -> tuple[Array, Array]:
    smoothed = smooth_filtered(filter_system(system, data, linearizer, form), form, backend)
    return smoothed.mean, smoothed.cov


@partial(jax.jit, static_argnames=("system", "linearizer"))
def _prior_start(
    system: System, data: Data, *, linearizer: Linearizer
) -> tuple[Array, Array | None]:
    """Return the moments that a filter without data predicts, only means where these suffice."""
    varying = data.noise.ndim == 3

    def one(moments: tuple, x: tuple) -> tuple[tuple, tuple]:
        (mean, cov), (inputs, noise) = moments, x

        def step(state: Array) -> Array:
            return system.advance(state, inputs)

        if cov is None:
            moments = step(mean), None
        else:
            weights, offset, rest = linearizer(step, mean, cov)
            noise = (data.noise if noise is None else noise) + (0.0 if rest is None else rest)
            cov = matmul(matmul(weights, cov), weights.T) + noise
            moments = matvec(weights, mean) + offset, cov
        return moments, moments

    start = (data.initial_mean, data.initial_cov if linearizer.uses_covariance else None)
    xs = (data.later_inputs(), data.noise[1:] if varying else None)
    _, later = jax.lax.scan(one, start, xs, length=data.values.shape[0] - 1)
    return jax.tree.map(lambda first, rest: jnp.concatenate((first[None], rest)), start, later)


def _find_start(
    start: Any,
    system: System,
    data: Data,
    linearizer: Linearizer,
    form: Form,
    backend: Backend | None,
) -> tuple[Array, Array | None]:
    """Return the first trajectory and, if the linearizer uses them, covariances."""
    shape = (data.values.shape[0], *data.initial_mean.shape)
    dtype = data.initial_mean.dtype
    # Without covariances sigma points begin as a Taylor expansion, their limit.
    covs = jnp.zeros((*shape, shape[1]), dtype)
    if start is None:
        means, covs = _filter_start(system, data, linearizer=linearizer, form=form, backend=backend)
    elif isinstance(start, str):
        if start != "prior":
            raise ValueError(
                f'start must be None, "prior", a trajectory, a state or a posterior, got {start!r}'
            )
        means, prior_covs = _prior_start(system, data, linearizer=linearizer)
        covs = covs if prior_covs is None else prior_covs
    else:
        if isinstance(start, PosteriorGSSMSmoothed):
            covs = real_array("start.smoothed_covariances", start.smoothed_covariances)
            start = start.smoothed_means
        means = real_array("start", start).astype(dtype)
        if means.shape not in (shape, shape[1:]) or covs.shape != (*shape, shape[1]):
            raise ValueError(f"start must be of shape {shape} or {shape[1:]}, got {means.shape}")
        means = jnp.broadcast_to(means, shape)
    finite = jnp.all(jnp.isfinite(means)) & jnp.all(jnp.isfinite(covs))
    means = jnp.where(finite, means, data.initial_mean)
    covs = jnp.where(finite, covs, data.initial_cov).astype(dtype)
    return means, covs if linearizer.uses_covariance else None
