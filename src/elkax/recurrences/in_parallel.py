r"""Evaluation of a recurrence by iterating on the whole trajectory."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.linearize import Diagonal
from elkax.recurrences.audit import audit, audit_and_correct, to_rounding
from elkax.recurrences.beside import Pair, advance_beside
from elkax.recurrences.blocks import coarsen, refine
from elkax.recurrences.in_sequence import give_way
from elkax.recurrences.newton import advance
from elkax.recurrences.plan import Plan
from elkax.recurrences.point import Options, start_at
from elkax.recurrences.prepare import Arguments, flat_structure
from elkax.recurrences.solution import RecurrenceInfo, RecurrenceSolution
from elkax.recurrences.tangent import Unrolled, solve_linearized
from elkax.smoothers.iteration import Status, Tolerance, iterate


@partial(jax.jit, static_argnames=("plan",))
def evaluate_in_parallel(
    arguments: Arguments,
    guess: Array | None,
    tolerance: Array,
    error_tolerance: Array,
    *,
    plan: Plan,
) -> RecurrenceSolution:
    """Evaluate a recurrence by the iteration of `newton`; see `evaluate_recurrence`.

    Args:
        arguments: the recurrence.
        guess: first trajectory (T, D), None for the initial state at all times.
        tolerance: largest relative residual.
        error_tolerance: largest relative error bound.
        plan: everything else.
    """
    problem, unravel = arguments.flatten()
    length = problem.length
    recurrence, point = problem.as_function()
    fixed = recurrence(*jax.lax.stop_gradient(point))
    kept = flat_structure(plan.method.jacobian, unravel)
    if plan.block > 1 and isinstance(kept, Diagonal):
        # The derivative of one step is not that of a block.
        kept = replace(kept, derivative=None)
    method = replace(plan.method, jacobian=kept)
    plan = plan.on_flat_states(unravel)
    moving = isinstance(plan.gradient, Unrolled)
    still = recurrence(*point) if moving else fixed
    coarse = coarsen(still, plan.block)
    options = Options(
        plan.windows, tolerance, plan.max_iters, plan.backend, plan.history, not moving
    )
    if guess is not None:
        last = jnp.minimum(plan.block * (1 + jnp.arange(coarse.length)), length) - 1
        guess = guess[last]
    start = start_at(coarse, method, guess, options)
    # A turn that finds all of its window converged takes no step.
    turns = plan.max_iters + 1 + (coarse.length - 1) // plan.windows[0]
    if plan.beside:
        start = Pair(start, start)
    end, outcome = iterate(
        partial(advance_beside if plan.beside else advance, coarse, method, options),
        start if moving else jax.lax.stop_gradient(start),
        max_iters=turns,
        tolerance=Tolerance(0.0, 0.0),
        history=turns if plan.history else 0,
        unroll=turns if moving else None,
    )
    if plan.beside:
        end = end.best()
    states = refine(still, coarse, end.guess.whole())
    check = partial(audit, fixed, plan, tolerance, error_tolerance)
    corrections = jnp.asarray(0)
    if plan.refined and plan.bounded and not moving:
        correct = partial(audit_and_correct, *check.args)
        states = jax.lax.stop_gradient(states)
        states, found, corrections = to_rounding(correct, states, outcome.status)
    else:
        found = check(states, outcome.status)
    lost = (found.status == int(Status.NONFINITE)) & (jnp.arange(length) >= found.prefix)
    states = jnp.where(lost[:, None], jnp.nan, states)
    if plan.sequential_on_failure:
        states, found = give_way(still, states, found, check)
    if not moving:
        states = _attach(recurrence, plan)(*point, jax.lax.stop_gradient(states))
    info = RecurrenceInfo(
        status=found.status,
        iterations=end.steps,
        corrections=corrections,
        sweeps=end.evaluations * plan.block / length,
        prefix=found.prefix,
        residual=found.residual,
        error_bound=found.bound,
        resets=end.reach.resets,
        damping=outcome.last.damping,
        history=outcome.history,
    )
    return RecurrenceSolution(jax.vmap(unravel)(states), jax.lax.stop_gradient(info))


def _attach(recurrence: Any, plan: Plan) -> Any:
    """Return the function that gives a trajectory the derivative of the recurrence."""

    @jax.custom_jvp
    def attach(closed: list, flat: Array, xs: PyTree, states: Array) -> Array:
        return states

    @attach.defjvp
    def rule(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        # Again by `attach`, so that second derivatives see the trajectory move.
        states = attach(*primals)

        def steps(closed: list, flat: Array, xs: PyTree) -> Array:
            return recurrence(closed, flat, xs).values(states)

        change = jax.jvp(steps, primals[:3], tangents[:3])[1]
        course = plan.course(recurrence(*primals[:3]), states)
        solve = solve_linearized(plan.gradient, course)
        return states, solve(change)

    return attach
