r"""What a trajectory is worth: its residual, and how far it may be from the exact one."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.recurrences.problem import Problem, fit, leading, sizes
from elkax.recurrences.tangent import Implicit, Unrolled
from elkax.smoothers.iteration import Status

# Random roundings that are carried along, and how many standard deviations a bound is.
PROBES, DEVIATIONS = 4, 8.0
# So many roundings are as good as a residual gets.
SETTLED = 10.0


class Audit(NamedTuple):
    """What a trajectory is worth.

    Attributes:
        status: a `Status` as an integer; ill-conditioned where it would be converged, but the
            largest bound, relative as the residual, is above tolerance.
        prefix: number of states at the beginning whose residuals are within tolerance.
        residual: largest residual, relative to the largest entry of a state up to that time.
        bound: (T,) bound on the entries of the error; NaN if not asked for.
    """

    status: Array
    prefix: Array
    residual: Array
    bound: Array


def audit(
    problem: Problem,
    plan: Any,
    tolerance: Array,
    error_tolerance: Array,
    states: Array,
    status: Array,
) -> Audit:
    """Judge a trajectory; see `audit_and_correct`."""
    return audit_and_correct(problem, plan, tolerance, error_tolerance, states, status)[0]


def audit_and_correct(
    problem: Problem,
    plan: Any,
    tolerance: Array,
    error_tolerance: Array,
    states: Array,
    status: Array,
) -> tuple[Audit, Array]:
    r"""Judge a trajectory by its residuals $r_t = f(s_{t-1}, x_t) - s_t$.

    To first order its error is the solution of $e_t = J_te_{t-1} + r_t$. Rounding of f adds what
    nobody knows: a few random residuals of its size are carried through the same recurrence, and
    several of their standard deviations are added.

    Args:
        problem: the recurrence.
        plan: whether a bound is asked for, and how linear problems are solved.
        tolerance: largest relative residual of a converged state.
        error_tolerance: largest relative bound.
        states: the trajectory (T, D).
        status: how its evaluation ended.

    Returns:
        What it is worth, and the trajectory less its error to first order: Newton's next. The same
        again if there is no bound.
    """
    states = jax.lax.stop_gradient(states)
    values = problem.values(states)
    found = fit(values, states, jnp.max(jnp.abs(problem.initial)), tolerance)
    prefix, residual = leading(found.good), jnp.max(found.relative)
    if not plan.bounded:
        nothing = jnp.full(len(states), jnp.nan, states.dtype)
        return Audit(status, prefix, residual, nothing), states
    gradient = Implicit() if isinstance(plan.gradient, Unrolled) else plan.gradient
    # A bound needs no digits.
    solve = gradient.tangent(plan.course(problem, states).shallow())
    signs = jax.random.rademacher(jax.random.key(0), (PROBES, *states.shape), states.dtype)
    eps = jnp.finfo(states.dtype).eps
    roundings = 2 * eps * sizes(values)[:, None] * signs
    rest = values - states
    errors = jax.vmap(solve)(jnp.concatenate((rest[None], roundings)))
    spread = jnp.sqrt(jnp.sum(errors[1:] ** 2, axis=(0, 2)) / PROBES)
    # Twice, for what is not of first order.
    bound = 2.0 * sizes(errors[0]) + DEVIATIONS * spread
    worst = jnp.max(jnp.where(bound == 0, 0.0, bound / found.scale))
    wide = (status == int(Status.CONVERGED)) & ~(worst <= error_tolerance)
    status = jnp.where(wide, int(Status.ILL_CONDITIONED), status)
    # Where the state before does not change this is f, to the last digit.
    return Audit(status, prefix, residual, bound), values + (errors[0] - rest)


def to_rounding(
    check: Callable[[Array, Array], tuple[Audit, Array]], states: Array, status: Array
) -> tuple[Array, Audit, Array]:
    """Take Newton's next steps from a converged trajectory while each halves the residual.

    Args:
        check: `audit_and_correct`, of states and a status.
        states: the trajectory (T, D).
        status: how its evaluation ended.

    Returns:
        The last trajectory that was better, its audit, and the number of steps.
    """
    enough = SETTLED * jnp.finfo(states.dtype).eps
    shapes = jax.eval_shape(check, states, status)[0]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(carry: tuple) -> tuple:
        states, found, new, count, _ = carry
        judged, newer = check(new, status)
        better = (count == 0) | (judged.residual <= 0.5 * found.residual)
        states, found = jax.tree.map(partial(jnp.where, better), (new, judged), (states, found))
        more = better & (judged.residual > enough) & (status == int(Status.CONVERGED))
        return states, found, newer, count + better, more

    start = (states, nothing, states, jnp.asarray(0), jnp.asarray(True))
    states, found, _, count, _ = jax.lax.while_loop(lambda carry: carry[-1], body, start)
    return states, found, count - 1
