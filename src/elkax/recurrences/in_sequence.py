"""Evaluation of a recurrence one step after the other."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.recurrences.audit import Audit, audit
from elkax.recurrences.plan import Plan
from elkax.recurrences.prepare import Arguments, clean
from elkax.recurrences.problem import Problem, leading
from elkax.recurrences.solution import RecurrenceSolution, if_finite, in_one_pass, status_of
from elkax.scan.fallback import where_sound
from elkax.smoothers.iteration import Status


@partial(jax.jit, static_argnames=("plan",))
def evaluate_in_sequence(
    arguments: Arguments, tolerance: Array, error_tolerance: Array, *, plan: Plan
) -> RecurrenceSolution:
    """Evaluate a recurrence by `jax.lax.scan`; what was computed is kept, finite or not.

    Args:
        arguments: the recurrence.
        tolerance: largest relative residual of a state that counts as converged in the audit.
        error_tolerance: largest relative error bound.
        plan: whether there is an audit, and how its linear problems are solved.
    """
    problem, unravel = arguments.flatten()
    states, status, prefix = _run(problem)
    zero = jnp.zeros((), states.dtype)
    found = Audit(status, prefix, zero, jnp.full(len(states), jnp.nan, states.dtype))
    if plan.bounded:
        recurrence, point = problem.as_function()
        fixed = recurrence(*jax.lax.stop_gradient(point))
        found = audit(
            fixed, plan.on_flat_states(unravel), tolerance, error_tolerance, states, status
        )
    info = in_one_pass(found.status, found.prefix, found.residual, found.bound)
    return RecurrenceSolution(jax.vmap(unravel)(states), jax.lax.stop_gradient(info))


@jax.jit
def evaluate_any_types(arguments: Arguments) -> RecurrenceSolution:
    """Evaluate a recurrence by `jax.lax.scan`, its state of any types."""

    def step(state: PyTree, x: tuple) -> tuple[PyTree, PyTree]:
        state = arguments.advance(state, *x)
        return state, state

    inputs = clean(arguments.inputs, arguments.valid), arguments.valid
    states = jax.lax.scan(step, arguments.initial, inputs, arguments.length)[1]
    return RecurrenceSolution(states, if_finite(states, arguments.length))


def give_way(
    problem: Problem, states: Array, found: Audit, check: Callable[[Array, Array], Audit]
) -> tuple[Array, Audit]:
    """Evaluate step by step unless the iteration has converged.

    Args:
        problem: the recurrence.
        states: what the iteration has found.
        found: its audit.
        check: the audit of states and a status.
    """
    good = (found.status == int(Status.CONVERGED)) | (found.status == int(Status.NONFINITE))

    def sequential() -> tuple[Array, Audit]:
        states, status, _ = _run(problem)
        return states, check(states, status)

    return where_sound(good, lambda: (states, found), sequential)


def _run(problem: Problem) -> tuple[Array, Array, Array]:
    """Evaluate step by step: states, status, and how many of them are finite."""
    states = problem.run()
    finite = jnp.all(jnp.isfinite(states), axis=1)
    return states, status_of(finite), leading(finite)
