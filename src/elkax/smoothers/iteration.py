"""The one iteration driver: a step, repeated until it says that it has arrived."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree


class Status(IntEnum):
    """How an iteration ended; `info.status` holds one of these as an integer."""

    CONVERGED = 0
    MAX_ITERS = 1
    NONFINITE = 2
    STALLED = 3
    ILL_CONDITIONED = 4
    SADDLE = 5

    def __str__(self) -> str:
        """Return the word."""
        return self.name.lower()


class Progress(NamedTuple):
    """What a step says about itself, scalars.

    Attributes:
        finite: whether the new state, and what it was judged by, are finite.
        step: size of the step, in the units of the tolerance.
        change: change of the cost, in the units of the tolerance.
        settled: whether rounding hides any further progress.
        stalled: whether no step will get any further.
        record: scalars for the history.
    """

    finite: Array
    step: Array
    change: Array
    settled: Array
    stalled: Array
    record: PyTree


class Tolerance(NamedTuple):
    """Both must hold for an iteration to have converged, unless it has settled.

    Attributes:
        step: largest step.
        change: largest change of the cost.
    """

    step: ArrayLike
    change: ArrayLike


class Outcome(NamedTuple):
    """How an iteration ended.

    Attributes:
        status: a `Status`, as an integer.
        iterations: number of steps taken.
        last: record of the last step, zeros if there was none.
        history: records of all steps, leading axis `history`, NaN after the last; None if not kept.
    """

    status: Array
    iterations: Array
    last: PyTree
    history: PyTree | None


def iterate(
    step: Callable[[PyTree], tuple[PyTree, Progress]],
    state: PyTree,
    *,
    max_iters: ArrayLike,
    tolerance: Tolerance,
    history: int = 0,
    unroll: int | None = None,
) -> tuple[PyTree, Outcome]:
    """Repeat a step until its size and the change of the cost are within tolerance.

    Finiteness is tested first: a step that is not finite ends the iteration, and the state before
    it is returned. Works under `jit`; under `vmap` every sequence stops by itself.

    Args:
        step: state to the next state and its progress.
        state: where to start.
        max_iters: most steps to take; may be traced.
        tolerance: when to stop.
        history: how many records to keep, at least `max_iters`; 0 for none.
        unroll: `max_iters` as a number that is known beforehand, for a loop of that many turns
            which can be differentiated in reverse; None for one that ends when it has arrived.

    Returns:
        The last finite state, and how the iteration ended.
    """
    shapes = jax.eval_shape(step, state)[1].record
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    records = None
    if history:
        records = jax.tree.map(
            lambda leaf: jnp.full((history, *leaf.shape), jnp.nan, _real(leaf.dtype)), shapes
        )
    running = jnp.asarray(-1)
    start = (state, running, jnp.asarray(0), zeros, records)

    def unfinished(carry: tuple) -> Array:
        _, status, count, _, _ = carry
        return (status == running) & (count < max_iters)

    def advance(carry: tuple) -> tuple:
        state, status, count, _, records = carry
        new, progress = step(state)
        within = (progress.step <= tolerance.step) & (progress.change <= tolerance.change)
        arrived = within | progress.settled
        status = jnp.where(progress.stalled, int(Status.STALLED), status)
        status = jnp.where(arrived, int(Status.CONVERGED), status)
        status = jnp.where(progress.finite, status, int(Status.NONFINITE))
        new = jax.tree.map(lambda a, b: jnp.where(progress.finite, a, b), new, state)
        if records is not None:
            records = jax.tree.map(
                lambda kept, leaf: kept.at[count].set(leaf), records, progress.record
            )
        return new, status, count + 1, progress.record, records

    def turn(carry: tuple, _: None) -> tuple[tuple, None]:
        return jax.lax.cond(unfinished(carry), advance, lambda carry: carry, carry), None

    if unroll is None:
        end = jax.lax.while_loop(unfinished, advance, start)
    else:
        end, _ = jax.lax.scan(turn, start, length=unroll)
    state, status, count, last, records = end
    status = jnp.where(status == running, int(Status.MAX_ITERS), status)
    return state, Outcome(status, count, last, records)


def _real(dtype: Any) -> Any:
    """Return a dtype that can hold NaN."""
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
