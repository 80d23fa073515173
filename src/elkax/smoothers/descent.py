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
        quiet: how many steps did not get any shorter since the merit last fell, or, where there is
            none, since one did.
    """

    means: Array
    covs: Array | None
    control: Any
    penalty: Array
    step: Array
    quiet: Array


# After so many quiet steps an iteration has settled, if what is left is rounding and steps are
# short; and after so many it has stalled.
SETTLED, QUIET = 4, 20


class Solver(NamedTuple):
    """What stays the same from one iteration to the next."""

    system: System
    data: Data
    linearizer: Linearizer
    damping: Damping
    form: Form
    backend: Backend | None


def advance(solver: Solver, point: Point) -> tuple[Point, Progress]:
    """Linearize about a trajectory, smooth with damping, and judge the step.

    Where the linearizer uses covariances, there is no merit that falls: every finite step is taken,
    and the damping is told that it was good if it was not longer than the one before.
    """
    system, data, linearizer, damping, form, backend = solver
    means, covs = point.means, point.covs
    eps = jnp.finfo(means.dtype).eps
    linearized = linearize(system, data, linearizer, means, covs)
    before = measure(system, data, linearizer, linearized, means, covs)
    precision = damping.precision(point.control, means)
    curvature = None
    if damping.second_order and covs is None:
        curvature = second_order(system, data, linearizer, linearized, means)
    curved = damping.curved(point.control)
    used = None if curvature is None else jnp.where(curved, curvature, 0.0)
    smoothed = filter_and_smooth(
        _damped(linearized, means, precision, used), form, backend
    ).smoothed
    step = smoothed.mean - means
    variances = jnp.diagonal(smoothed.cov, axis1=1, axis2=2)
    size, moved, share = _step_size(step, means, variances, precision)
    if precision is not None:
        # Where damping is all there is, nothing is known of an undamped step.
        hessian = hessian_diagonal(linearized)
        own = jnp.where(hessian > 0, precision / jnp.where(hessian > 0, hessian, 1.0), 0.0)
        share = jnp.maximum(share, jnp.max(own))
        size = jnp.where(share < 0.01 / eps, size, jnp.inf)
    if covs is None:
        trial = _try_fractions(solver, linearized, before, point, step, curvature, curved)
    else:
        change = _change_of_covs(covs, smoothed.cov)
        size = jnp.maximum(size, jnp.maximum(share, change))
        trial = _by_size(point, size, before.violation())
    attempt = Attempt(
        trial.merit,
        trial.predicted,
        trial.rival,
        trial.rounding,
        # Beyond rounding: a state is at most as large as its prediction and its error together.
        before.violation() > eps * jnp.sum(jnp.abs(means)),
        jnp.linalg.norm(step),
        moved,
        size,
        share,
        jnp.max(variances, axis=0),
    )
    verdict = damping.judge(point.control, attempt)
    taken = verdict.choice
    cost = before.cost()
    finite = jnp.isfinite(cost) & jnp.all(jnp.isfinite(linearized.model.weights))
    accepted = (verdict.accepted if covs is None else jnp.all(jnp.isfinite(step))) & finite
    fall = jnp.where(accepted, trial.fall[taken], 0.0)
    longer = size >= 0.999 * point.step
    if covs is None:
        # What an undamped step would bring; slow convergence still shrinks it, rounding does not.
        worth = (1.0 + share) * jnp.abs(trial.predicted[0])
        least = jnp.maximum(trial.rounding, jnp.sqrt(eps) * worth)
        real = accepted & (trial.merit[taken] > least)
        quiet = jnp.where(real, 0, point.quiet + longer)
        hidden = (worth <= trial.rounding / 16) & (size >= 0.5 * point.step)
        hidden = hidden | ((worth <= trial.rounding) & (quiet >= SETTLED))
        stuck = quiet >= QUIET
    else:
        quiet = jnp.where(longer, point.quiet + 1, 0)
        hidden, stuck = quiet >= SETTLED, False
    fraction = jnp.asarray(damping.fractions, means.dtype)[taken]
    moved_to = means + fraction * step
    new = Point(
        jnp.where(accepted, moved_to, means),
        None if covs is None else jnp.where(accepted, smoothed.cov, covs),
        verdict.control,
        trial.penalty,
        size,
        quiet,
    )
    violation = jnp.where(accepted, trial.violation[taken], before.violation())
    progress = Progress(
        finite=finite & ~(verdict.stalled & ~jnp.isfinite(trial.fall[taken])),
        step=size,
        change=jnp.abs(fall) / (1.0 + jnp.abs(cost)),
        settled=hidden & (size <= eps**0.36),
        stalled=verdict.stalled | stuck,
        record=Record(cost - fall, share, size, accepted, violation),
    )
    return new, progress


class Trial(NamedTuple):
    """What comes of the fractions of a step, leading axis the fractions.

    Attributes:
        fall: of the cost.
        violation: after the step.
        merit: fall of the merit, the cost and the weighted violation.
        predicted: fall of the merit that the linearized model expects.
        rival: the same for the whole step by the model that did not make it; see `Attempt`.
        penalty: weight of the violation, a scalar.
        rounding: what of a fall may be rounding, a scalar.
    """

    fall: Array
    violation: Array
    merit: Array
    predicted: Array
    rival: Array
    penalty: Array
    rounding: Array


def _try_fractions(
    solver: Solver,
    linearized: Linearized,
    before: Misfit,
    point: Point,
    step: Array,
    curvature: Array | None,
    curved: Any,
) -> Trial:
    """Measure every fraction of a step, and what the linearized model says of it.

    Rounding is found by changing every state by two units in its last place, up and down by turns:
    the terms of the cost then differ as if they had been rounded anew.
    """
    fractions = jnp.asarray(solver.damping.fractions, step.dtype)
    means = point.means
    signs = jnp.where(sum(jnp.indices(means.shape)) % 2 == 0, 1.0, -1.0)
    grain = 2.0 * jnp.finfo(step.dtype).eps * signs * means
    parts = jnp.concatenate((fractions[:, None, None] * step, grain[None]))
    compare = partial(_compare, solver, linearized, before, point)
    fall, distance, predicted, violations = jax.vmap(compare)(parts)
    rounding = 2.0 * distance[-1]
    fall, predicted, violations = fall[:-1], predicted[:-1], violations[:-1]
    rival = jnp.full((), jnp.nan, step.dtype)
    if curvature is not None:
        # The part of it that the step could not use counts as well: it is true of the cost.
        bend = 0.5 * jnp.einsum("ti,tij,tj->", step, curvature, step, precision="highest")
        rival = predicted[0] - jnp.where(curved, 0.0, bend)
        predicted = predicted - jnp.where(curved, bend, 0.0) * fractions**2
    after, expected = violations[:, 0], violations[:, 1]
    penalty = _raise_penalty(point.penalty, predicted[0], before, expected[0])
    gone = before.violation() - expected
    merit = fall + penalty * (before.violation() - after)
    return Trial(
        fall, after, merit, predicted + penalty * gone, rival + penalty * gone[0], penalty, rounding
    )


def _by_size(point: Point, size: Array, violation: Array) -> Trial:
    """Say that a step is as good as it was predicted, or, if it is longer, as bad."""
    one = jnp.ones(1, size.dtype)
    zero = jnp.zeros((), size.dtype)
    good = jnp.where(size <= point.step, one, -one)
    return Trial(0.0 * one, violation * one, good, one, zero, point.penalty, zero)


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
    step: Array, means: Array, variances: Array, precision: Array | None
) -> tuple[Array, Array, Array]:
    r"""Return the largest step in posterior standard deviations, without damping and with it.

    A state with the precision h takes the step p and has the variance $v = 1/(h + \pi)$ when it is
    damped by $\pi$. Without damping the step would be $p(h + \pi)/h$, and $\pi/h$ is
    $\pi v/(1 - \pi v)$, the largest of which is returned as well.
    """
    eps, tiny = jnp.finfo(step.dtype).eps, jnp.finfo(step.dtype).tiny
    share = jnp.zeros_like(step)
    if precision is not None:
        share = jnp.clip(precision * variances, 0.0, 1.0 - eps)
    # States that are known almost exactly are measured against what their digits resolve.
    variances = variances + 64.0 * eps * means**2
    moved = jnp.max(step**2 / jnp.maximum(variances, tiny))
    size = jnp.max(step**2 / jnp.maximum(variances * (1.0 - share), tiny))
    return jnp.sqrt(size), jnp.sqrt(moved), jnp.max(share / (1.0 - share))


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
    part: Array,
) -> tuple[Array, Array, Array, Array]:
    """Measure a part of a step: fall of the cost, of its terms, prediction, violations after."""
    after = measure(
        solver.system, solver.data, solver.linearizer, linearized, point.means + part, point.covs
    )
    predicted, violation = predict_change(linearized, point.means, part)
    violations = jnp.stack((after.violation(), violation))
    return before.reduction(after), before.distance(after), predicted, violations


def _raise_penalty(penalty: Array, predicted: Array, before: Misfit, after: Array) -> Array:
    """Make the penalty large enough for the linearized model to expect a fall of the merit.

    References:
        Nocedal & Wright (2006), Numerical Optimization, eq. 18.36.
    """
    gone = before.violation() - after
    enough = jnp.where(gone > 0, -2.0 * predicted / jnp.where(gone > 0, gone, 1.0), 0.0)
    needed = (predicted < 0) & jnp.isfinite(enough) & (enough > penalty)
    return jnp.where(needed, 1.5 * enough, penalty)
