"""The trajectory that the first iteration linearizes."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.recurrences.in_parallel import evaluate_in_parallel
from elkax.recurrences.method import Method
from elkax.recurrences.plan import Plan
from elkax.recurrences.prepare import Arguments
from elkax.recurrences.problem import ravel_states

# Iterations of a method that gives the first guess.
ROUGH = 10


def check_guess(arguments: Arguments, guess: Any) -> None:
    """Raise a ValueError unless a first guess is one that `evaluate_recurrence` takes."""
    if guess is None or isinstance(guess, Method):
        return
    if isinstance(guess, str):
        if guess not in ("zeros", "inputs"):
            raise ValueError(
                f'guess must be None, "zeros", "inputs", a trajectory or a method, got {guess!r}'
            )
        return
    if jax.tree.structure(guess) != jax.tree.structure(arguments.initial):
        raise ValueError(
            f"guess must be a trajectory like the state, {jax.tree.structure(arguments.initial)}, "
            f"got {jax.tree.structure(guess)}"
        )
    for leaf, one in zip(jax.tree.leaves(guess), jax.tree.leaves(arguments.initial), strict=True):
        if jnp.shape(leaf) != (arguments.length, *one.shape):
            expected = (arguments.length, *one.shape)
            raise ValueError(f"guess must have shape {expected}, got {jnp.shape(leaf)}")


def first_guess(arguments: Arguments, guess: Any, reverse: bool, plan: Plan) -> Array | None:
    """Return a flat trajectory (T, D), None for the initial state at all times.

    Args:
        arguments: the recurrence, turned round if it is to be.
        guess: as `evaluate_recurrence` takes it, checked.
        reverse: whether a trajectory has to be turned round.
        plan: how the recurrence is evaluated.
    """
    if guess is None:
        return None
    if isinstance(guess, Method):
        return _rough(arguments, replace(plan, method=guess))
    dtype = jax.tree.leaves(arguments.initial)[0].dtype
    if isinstance(guess, str):
        problem, _ = arguments.flatten()
        zeros = jnp.zeros((arguments.length, *problem.initial.shape), dtype)
        return zeros if guess == "zeros" else jax.vmap(problem.step)(zeros, problem.inputs)
    guess = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), guess)
    if reverse:
        guess = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), guess)
    return ravel_states(guess)


def _rough(arguments: Arguments, plan: Plan) -> Array:
    """Take a few iterations of a plan."""
    plan = replace(
        plan,
        windows=plan.windows[-1:],
        beside=False,
        max_iters=ROUGH,
        history=False,
        bounded=False,
        sequential_on_failure=False,
    )
    dtype = jax.tree.leaves(arguments.initial)[0].dtype
    limit = jnp.asarray(jnp.sqrt(jnp.finfo(dtype).eps), dtype)
    rough = evaluate_in_parallel(arguments, None, limit, limit, plan=plan)
    return jax.lax.stop_gradient(ravel_states(rough.states))
