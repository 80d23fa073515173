"""The iterated smoother: where it starts, its loop, and what it returns."""

from collections.abc import Sequence
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
from elkax.smoothers.cost import hessian_diagonal, measure
from elkax.smoothers.damping import Damping, LevenbergMarquardt, LineSearch
from elkax.smoothers.descent import Point, Solver, advance
from elkax.smoothers.info import Info, Starts
from elkax.smoothers.iteration import Status, Tolerance, iterate
from elkax.smoothers.linear import assemble_posterior, filter_and_smooth
from elkax.smoothers.linearization import Linearized, linearize
from elkax.smoothers.prepare import check_backend, check_count, find_form
from elkax.smoothers.start import find_start
from elkax.smoothers.stationarity import (
    at_fixed_point,
    at_least_cost,
    laplace_log_prob,
    minimises,
)
from elkax.smoothers.system import (
    Data,
    NonlinearParams,
    System,
    check_linearizer,
    for_emissions,
    prepare_system,
)
from elkax.smoothers.trust_region import TrustRegion

# High enough for hard sequences; easy ones stop when they have arrived.
MAX_ITERS = 500


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

    def check(
        self,
        params: NonlinearParams,
        emissions: ArrayLike,
        inputs: ArrayLike | None = None,
        *,
        residual: Residual | None = None,
    ) -> Info:
        """Say whether the iteration converged to a minimum, at the cost of `laplace_log_prob`.

        Args:
            params: as for `iterated_smoother`, with `Taylor()`.
            emissions: as there.
            inputs: as there.
            residual: as there.

        Returns:
            `info`, its status "saddle" where it converged and the exact Hessian of the MAP cost is
            not positive definite.
        """
        value = laplace_log_prob(
            params, emissions, inputs, trajectory=self.trajectory, residual=residual
        )
        saddle = self.info.converged & jnp.isnan(value)
        return self.info._replace(status=jnp.where(saddle, int(Status.SADDLE), self.info.status))


@partial(
    jax.jit,
    static_argnames=("system", "linearizer", "damping", "form", "backend", "history"),
)
def _solve(
    system: System,
    data: Data,
    means: Array,
    covs: Array | None,
    *,
    max_iters: Array,
    tolerance: Array,
    linearizer: Linearizer,
    damping: Damping,
    form: Form,
    backend: Backend | None,
    history: int,
) -> Solution:
    solver = Solver(system, data, linearizer, damping, form, backend)
    hessian = hessian_diagonal(linearize(system, data, linearizer, means, covs))
    zero = jnp.zeros((), means.dtype)
    control = damping.start(hessian)
    start = Point(means, covs, control, zero, jnp.full_like(zero, jnp.inf), jnp.asarray(0))
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
    excess = None
    if system.emission.quadratic:
        count = jnp.maximum(jnp.sum(data.observed), 1).astype(means.dtype)
        excess = (2.0 * misfit.cost() - count) / jnp.sqrt(2.0 * count)
    info = Info(
        outcome.status,
        outcome.iterations,
        misfit.cost(),
        outcome.last.damping,
        outcome.last.step,
        misfit.violation(),
        outcome.history,
        excess,
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
    max_iters: int = MAX_ITERS,
    tolerance: ArrayLike | None = None,
    start: Any = None,
    starts: Sequence[Any] | None = None,
    residual: Residual | None = None,
    backend: Backend | None = None,
    form: str = "covariance",
    history: bool = False,
) -> Solution:
    r"""Smooth a nonlinear model by linearizing along the trajectory until it stays where it is.

    Each iteration linearizes every step and emission about the last trajectory, adds the damping
    as pseudo-observations, and smooths the linear-Gaussian model, in parallel over time. With
    `Taylor()` this minimises the MAP cost, by Gauss-Newton if undamped; with `SigmaPoints()` it is
    the posterior-linearization smoother, which minimises nothing: every finite step is taken, and
    damped if the steps get longer. With `Taylor()` a step is accepted only if it lowers the cost by
    more than the rounding of its terms, or, where Q, P0 or R is singular, the cost in their ranges
    plus a penalty on the rest; or if model and cost agree on a change that is less than that.

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
            It has converged as well if rounding hides all progress and steps are short.
        start: where to linearize first. "prior" for the initial mean, with sigma points also the
            covariance, carried forward by the dynamics, a trajectory (T, D), one state (D,) for
            all times, or a smoothed posterior; None for a pass of the filter and smoother, or
            "prior" where that has diverged. Sigma points about a trajectory or a state begin as
            its Taylor expansion.
        starts: several of those in place of `start`. All are tried side by side, and the one that
            ends lowest is returned, those that converged before the others.
        residual: $(y, \hat y)$ to their difference, for emissions on a circle.
        backend: how to run over time; chosen by `elkax.scan.choose` if None.
        form: "covariance" or "square_root".
        history: whether to keep cost, damping and step of every iteration.

    Returns:
        Posterior, trajectory and `Info`. If no start is finite, the initial mean at all times
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
    find = partial(
        find_start, system=system, data=data, linearizer=linearizer, form=stored, backend=backend
    )
    dtype = data.initial_mean.dtype
    tolerance = jnp.sqrt(jnp.finfo(dtype).eps) if tolerance is None else tolerance
    solve = partial(
        _solve,
        system,
        data,
        max_iters=jnp.asarray(max_iters),
        tolerance=jnp.asarray(tolerance, dtype),
        linearizer=linearizer,
        damping=damping,
        form=stored,
        backend=backend,
        history=max_iters if history else 0,
    )
    if starts is None:
        return solve(*find(start))
    if start is not None or isinstance(starts, str) or len(starts) == 0:
        raise ValueError(
            "give either start or starts, a list of at least one of what start takes, got "
            f"start={start!r}, starts={starts!r}"
        )
    found = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(find, starts))
    return _best(jax.vmap(solve)(*found))


def _best(solutions: Solution) -> Solution:
    """Return the solution of least cost, of those that converged if any did."""
    info = solutions.info
    missed = jnp.any(info.converged) & ~info.converged
    cost = jnp.where(jnp.isnan(info.cost) | missed, jnp.inf, info.cost)
    best = jax.tree.map(lambda leaf: leaf[jnp.argmin(cost)], solutions)
    starts = Starts(info.status, info.iterations, info.cost)
    return best._replace(info=best.info._replace(starts=starts))


def check_strategy(linearizer: Any, damping: Any, max_iters: Any) -> None:
    """Raise unless the options of an iteration are of their kinds."""
    for name, value, kind, example in (
        ("linearizer", linearizer, Linearizer, "Taylor()"),
        ("damping", damping, Damping, "LevenbergMarquardt()"),
    ):
        if isinstance(value, type) or not isinstance(value, kind):
            raise TypeError(f"{name} must be an object such as elkax.{example}, got {value!r}")
    if linearizer.uses_covariance and isinstance(damping, LineSearch | TrustRegion):
        raise TypeError(
            f"damping must be elkax.LevenbergMarquardt() or elkax.GaussNewton() with {linearizer}, "
            f"whose fixed point minimises no cost to search along, got {damping}"
        )
    if max_iters != 0:
        check_count("max_iters", max_iters)
