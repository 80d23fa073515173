"""Evaluation of a recurrence one step after the other."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from elkax.recurrences.audit import Audit
from elkax.recurrences.prepare import Arguments, flat_step, steps_of
from elkax.recurrences.problem import Problem, leading
from elkax.recurrences.solution import RecurrenceInfo, RecurrenceSolution
from elkax.scan.fallback import where_sound
from elkax.smoothers.iteration import Status


def evaluate_in_sequence(arguments: Arguments) -> RecurrenceSolution:
    """Evaluate a recurrence by `jax.lax.scan`; what was computed is kept, finite or not."""
    flat, unravel = ravel_pytree(arguments.initial)
    xs = steps_of(arguments.inputs, arguments.valid, arguments.length)
    problem = Problem(flat_step(arguments.cell, unravel), flat, xs)
    states, status, prefix = _run(problem)
    zero, none = jnp.zeros((), flat.dtype), jnp.asarray(0)
    unknown = jnp.full(len(states), jnp.nan, flat.dtype)
    info = RecurrenceInfo(status, none, zero + 1, prefix, zero, unknown, none, zero, None)
    return RecurrenceSolution(jax.vmap(unravel)(states), jax.lax.stop_gradient(info))


def give_way(
    problem: Problem, states: Array, status: Array, found: Audit
) -> tuple[Array, Array, Audit]:
    """Evaluate step by step unless the iteration has converged."""
    good = (status == int(Status.CONVERGED)) | (status == int(Status.NONFINITE))

    def sequential() -> tuple[Array, Array, Audit]:
        states, status, prefix = _run(problem)
        nothing = jnp.full_like(found.bound, jnp.nan)
        return states, status, Audit(prefix, jnp.zeros_like(found.residual), nothing, nothing[0])

    return where_sound(good, lambda: (states, status, found), sequential)


def _run(problem: Problem) -> tuple[Array, Array, Array]:
    """Evaluate step by step: states, status, and how many of them are finite."""

    def step(state: Array, x: PyTree) -> tuple[Array, Array]:
        state = problem.step(state, x)
        return state, state

    states = jax.lax.scan(step, problem.initial, problem.inputs)[1]
    finite = jnp.all(jnp.isfinite(states), axis=1)
    status = jnp.where(jnp.all(finite), int(Status.CONVERGED), int(Status.NONFINITE))
    return states, status, leading(finite)
