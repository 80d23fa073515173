"""One step of the iterated smoother: linearize, damp, smooth, judge."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian import Form, Model
from elkax.linearize import Linearizer
from elkax.scan import Backend
from elkax.smoothers.cost import (
    Misfit,
    hessian_diagonal,
    measure,
    predict_change,
    second_order,
)
from elkax.smoothers.damping import Attempt, Damping
from elkax.smoothers.iteration import Progress
from elkax.smoothers.linear import filter_and_smooth
from elkax.smoothers.linearization import Linearized, damp, linearize
from elkax.smoothers.system import Data, System


class Record(NamedTuple):
    r"""What is kept of an iteration.

    Attributes:
        cost: of the trajectory after it; see `Info`.
        damping: largest precision of a pseudo-observation, relative to that of the posterior.
        step: largest step of a state in its posterior standard deviations, as it would be without
            damping; infinite where that cannot be told. Where the linearizer uses covariances, or
            the largest relative change of one of them, or what the damping makes of it.
        accepted: whether the step was taken.
        constraint_residual: sum of the violations of exact constraints.
    """

    cost: Array
    damping: Array
    step: Array
    accepted: Array
    constraint_residual: Array


class Point(NamedTuple):
    """State of the iteration.

    Attributes:
        means: trajectory (T, D).
        covs: (T, D, D), None unless the linearizer uses them.
        control: state of the damping.
        penalty: weight of the violations in the merit.
        step: size of the last step.
    """

    means: Array
    covs: Array | None
    control: Any
    penalty: Array
    step: Array


class Solver(NamedTuple):
    """What stays the same from one iteration to the next."""

    system: System
    data: Data
    linearizer: Linearizer
    damping: Damping
    form: Form
    backend: Backend | None


def advance(solver: Solver, point: Point) -> tuple[Point, Progress]:
    """Linearize about a trajectory, smooth with damping, and judge the step."""
    system, data, linearizer, damping, form, backend = solver
    means, covs = point.means, point.covs
    linearized = linearize(system, data, linearizer, means, covs)
    before = measure(system, data, linearizer, linearized, means, covs)
    precision = damping.precision(point.control, means)
    curvature = None
    if damping.second_order and not linearizer.uses_covariance:
        curvature = second_order(system, data, linearizer, linearized, means)
    model = _damped(linearized, means, precision, curvature)
    smoothed = filter_and_smooth(model, form, backend).smoothed
    step = smoothed.mean - means
    size, relative = _step_size(step, means, smoothed.cov, precision)
    if precision is not None:
        # Where damping is all there is, nothing is known of an undamped step.
        hessian = hessian_diagonal(linearized)
        share = jnp.where(hessian > 0, precision / jnp.where(hessian > 0, hessian, 1.0), 0.0)
        relative = jnp.maximum(relative, jnp.max(share))
        size = jnp.where(relative < 0.01 / jnp.finfo(means.dtype).eps, size, jnp.inf)
    if covs is not None:
        size = jnp.maximum(size, jnp.maximum(relative, _change_of_covs(covs, smoothed.cov)))
    trial = _try_fractions(solver, linearized, before, point, step, curvature)
    cost = before.cost()
    eps = jnp.finfo(means.dtype).eps * (1.0 + jnp.abs(cost))
    # Beyond rounding: a state is at most as large as its prediction and its error together.
    violated = before.violation() > jnp.finfo(means.dtype).eps * jnp.sum(jnp.abs(means))
    length = jnp.linalg.norm(step)
    attempt = Attempt(trial.merit, trial.predicted, 256 * eps, violated, length)
    verdict = damping.judge(point.control, attempt)
    taken = verdict.choice
    finite = jnp.isfinite(cost) & jnp.all(jnp.isfinite(linearized.model.weights))
    accepted = verdict.accepted & finite
    # What an undamped step would bring.
    worth = (1.0 + relative) * jnp.abs(trial.predicted[0])
    # Slow convergence still shrinks the step; rounding does not.
    settled = (worth <= 0.25 * eps) & (size >= 0.5 * point.step)
    settled = settled | ((worth <= 256 * eps) & (size >= point.step))
    settled = settled & jnp.isfinite(size)
    moved = means + jnp.asarray(damping.fractions, means.dtype)[taken] * step
    new = Point(
        jnp.where(accepted, moved, means),
        None if covs is None else jnp.where(accepted, smoothed.cov, covs),
        verdict.control,
        trial.penalty,
        size,
    )
    fall = jnp.where(accepted, trial.fall[taken], 0.0)
    violation = jnp.where(accepted, trial.violation[taken], before.violation())
    progress = Progress(
        finite=finite & ~(verdict.stalled & ~jnp.isfinite(trial.fall[taken])),
        step=size,
        change=jnp.abs(fall) / (1.0 + jnp.abs(cost)),
        settled=settled,
        stalled=verdict.stalled,
        record=Record(cost - fall, relative, size, accepted, violation),
    )
    return new, progress


class Trial(NamedTuple):
    """What comes of the fractions of a step, leading axis the fractions.

    Attributes:
        fall: of the cost.
        violation: after the step.
        merit: fall of the merit, the cost and the weighted violation.
        predicted: fall of the merit that the linearized model expects.
        penalty: weight of the violation, a scalar.
    """

    fall: Array
    violation: Array
    merit: Array
    predicted: Array
    penalty: Array


def _try_fractions(
    solver: Solver,
    linearized: Linearized,
    before: Misfit,
    point: Point,
    step: Array,
    curvature: Array | None,
) -> Trial:
    """Measure every fraction of a step, and what the linearized model says of it."""
    fractions = jnp.asarray(solver.damping.fractions, step.dtype)
    compare = partial(_compare, solver, linearized, before, point, step)
    fall, predicted, violations = jax.vmap(compare)(fractions)
    if curvature is not None:
        # The part of it that the step could not use counts as well: it is true of the cost.
        bend = jnp.einsum("ti,tij,tj->", step, curvature, step, precision="highest")
        predicted = predicted - 0.5 * fractions**2 * bend
    after, expected = violations[:, 0], violations[:, 1]
    penalty = _raise_penalty(point.penalty, predicted[0], before, expected[0])
    merit = fall + penalty * (before.violation() - after)
    predicted = predicted + penalty * (before.violation() - expected)
    return Trial(fall, after, merit, predicted, penalty)


def _damped(
    linearized: Linearized, means: Array, precision: Array | None, curvature: Array | None
) -> Model:
    """Add damping and curvature to the linearized model, whichever there is."""
    if precision is None and curvature is None:
        return linearized.model
    if curvature is None:
        return damp(linearized.model, means, precision)
    if precision is not None:
        curvature = curvature + precision[:, :, None] * jnp.eye(means.shape[1], dtype=means.dtype)
    return damp(linearized.model, means, curvature)


def _step_size(
    step: Array, means: Array, covs: Array, precision: Array | None
) -> tuple[Array, Array]:
    r"""Return the largest step in posterior standard deviations, and the largest damping.

    A state with the precision h takes the step p and has the variance $v = 1/(h + \pi)$ when it is
    damped by $\pi$. Without damping the step would be $p(h + \pi)/h$, and $\pi/h$ is
    $\pi v/(1 - \pi v)$.
    """
    variances = jnp.diagonal(covs, axis1=1, axis2=2)
    eps = jnp.finfo(step.dtype).eps
    # States that are known exactly are measured against their size.
    floor = jnp.sqrt(eps) * jnp.max(means**2, axis=0)
    share = jnp.zeros_like(step)
    if precision is not None:
        share = jnp.clip(precision * variances, 0.0, 1.0 - eps)
    square = step**2 / jnp.maximum((variances + floor) * (1.0 - share), jnp.finfo(step.dtype).tiny)
    return jnp.sqrt(jnp.max(square)), jnp.max(share / (1.0 - share))


def _change_of_covs(old: Array, new: Array) -> Array:
    """Return the largest change of a covariance, relative to the standard deviations."""
    sd = jnp.sqrt(jnp.maximum(jnp.diagonal(new, axis1=1, axis2=2), 0.0))
    scale = sd[:, :, None] * sd[:, None, :]
    safe = jnp.where(scale > 0, scale, 1.0)
    return jnp.max(jnp.where(scale > 0, jnp.abs(new - old) / safe, 0.0))


def _compare(
    solver: Solver,
    linearized: Linearized,
    before: Misfit,
    point: Point,
    step: Array,
    fraction: Array,
) -> tuple[Array, Array, Array]:
    """Measure a part of a step: fall of the cost, its prediction, and both violations after."""
    part = fraction * step
    after = measure(
        solver.system, solver.data, solver.linearizer, linearized, point.means + part, point.covs
    )
    predicted, violation = predict_change(linearized, point.means, part)
    return before.reduction(after), predicted, jnp.stack((after.violation(), violation))


def _raise_penalty(penalty: Array, predicted: Array, before: Misfit, after: Array) -> Array:
    """Make the penalty large enough for the linearized model to expect a fall of the merit.

    References:
        Nocedal & Wright (2006), Numerical Optimization, eq. 18.36.
    """
    gone = before.violation() - after
    enough = jnp.where(gone > 0, -2.0 * predicted / jnp.where(gone > 0, gone, 1.0), 0.0)
    needed = (predicted < 0) & jnp.isfinite(enough) & (enough > penalty)
    return jnp.where(needed, 1.5 * enough, penalty)
