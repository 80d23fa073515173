"""What the evaluation of a recurrence returns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.recurrences.point import Record
from elkax.recurrences.problem import leading
from elkax.smoothers.iteration import Status


class RecurrenceInfo(NamedTuple):
    r"""How the evaluation of a recurrence ended, readable under `jit`.

    Attributes:
        status: a `Status` as an integer: 0 converged, 1 max_iters, 2 nonfinite, 3 stalled,
            4 ill_conditioned (the residual is within its tolerance, the error bound is not). States
            found one after the other are converged if they are finite.
        iterations: number of linear problems solved until the residuals were within tolerance, one
            scan each.
        corrections: number of Newton steps after them, by which residuals fell to rounding; they
            are taken unless a `tolerance` is named or there is no bound.
        sweeps: evaluations of the cell in the iterations, divided by T.
        prefix: number of states at the beginning that have converged.
        residual: largest entry of $|s_t - f(s_{t-1}, x_t)|$, relative to the largest entry of a
            state up to t.
        error_bound: (T,) first-order bound on the entries of the error of $s_t$, among them what
            another rounding of f, by its own size, would change. NaN where it was not asked for:
            with an infinite `error_tolerance`, and with none where the states were found one after
            the other. These are those of `jax.lax.scan`, which in chaos says nothing about their
            error.
        resets: how often guesses of the tail were restarted.
        damping: largest $\lambda$ of the last iteration.
        history: `Record` whose leading axis holds every evaluation of the trajectory, at first that
            of the guess, NaN after the last; None if not kept.
    """

    status: Array
    iterations: Array
    corrections: Array
    sweeps: Array
    prefix: Array
    residual: Array
    error_bound: Array
    resets: Array
    damping: Array
    history: Record | None


class RecurrenceSolution(NamedTuple):
    """A trajectory, and how its evaluation ended.

    Attributes:
        states: $s_{1:T}$, the pytree of the state with leading axis T.
        info: how the evaluation ended.
    """

    states: PyTree
    info: RecurrenceInfo


def in_one_pass(
    status: Array, prefix: Array, residual: Array, error_bound: Array
) -> RecurrenceInfo:
    """Say how states were found that took no iteration; arguments as the fields."""
    zero, none = jnp.zeros_like(residual), jnp.asarray(0)
    return RecurrenceInfo(
        status=status,
        iterations=none,
        corrections=none,
        sweeps=zero + 1,
        prefix=prefix,
        residual=residual,
        error_bound=error_bound,
        resets=none,
        damping=zero,
        history=None,
    )


def if_finite(states: PyTree, length: int, *, reverse: bool = False) -> RecurrenceInfo:
    """Say of states (T, ...) that were found in one pass, without an audit, if they are finite."""
    numbers = [leaf for leaf in jax.tree.leaves(states) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    finite = jnp.ones(length, bool)
    for leaf in numbers:
        finite &= jnp.all(jnp.isfinite(leaf.reshape((length, -1))), axis=1)
    status = status_of(finite)
    prefix = leading(jnp.flip(finite) if reverse else finite)
    return in_one_pass(status, prefix, jnp.zeros(()), jnp.full(length, jnp.nan))


def status_of(finite: Array) -> Array:
    """Return the status of states that were found in one pass."""
    return jnp.where(jnp.all(finite), int(Status.CONVERGED), int(Status.NONFINITE))
