"""Guesses that a step has thrown away: which they are, and how far a step reaches afterwards.

States that are not finite, or far outside of what the recurrence has produced so far and far from
satisfying it, end the *active* part of a window; the guesses behind it are restarted from its last
state. Without damping the active part shrinks then, and grows again while all goes well.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from elkax.recurrences.problem import sizes
from elkax.recurrences.step import View

# A state this many times larger than any before it, and off by half of its size, is lost.
FAR = 2.0
# One so many times larger than what the recurrence produces is lost without being evaluated.
EXPLODED = 1e3
# What becomes of the active part after a restart, and in every iteration without one.
SHRINK, GROW = 0.6, 1.1
# So many iterations without a restart are needed before all of a long trajectory is tried again.
CALM = 100


class Scale(NamedTuple):
    """How large states are.

    Attributes:
        known: largest entry of a state that has converged, or of the initial one.
        usual: largest entry that the recurrence has produced from the first guesses.
    """

    known: Array
    usual: Array


class Reach(NamedTuple):
    """How far the steps reach.

    Attributes:
        width: largest length of the active part.
        resets: how often guesses were restarted.
        calm: number of iterations since then.
        holding: whether guesses behind the active part follow its last state.
    """

    width: Array
    resets: Array
    calm: Array
    holding: Array


def find_lost(
    view: View, scale: Scale, prefix: Array, first: Array, *, patient: bool = False
) -> Array:
    """Return the index of the first state behind the prefix that is lost, T or more if none is.

    Args:
        view: the window.
        scale: how large states are.
        prefix: number of converged states.
        first: whether these are the first guesses, whose size says nothing.
        patient: whether only states that are not finite are lost.
    """
    size = sizes(view.states)
    off = sizes(view.values - view.states)
    usual = jnp.where(first, jnp.inf, jnp.maximum(scale.usual, scale.known))
    far = (size > FAR * usual) & (off > 0.5 * size) & (not patient)
    bad = (far | ~jnp.isfinite(off)) & (view.index > prefix)
    # The first state of the active part is found without its guess.
    return jnp.maximum(view.first(bad), prefix + 1)


def measure(scale: Scale, view: View, prefix: Array, first: Array) -> Scale:
    """Add what is seen in a window; see `find_lost`."""
    produced = sizes(view.values)
    produced = jnp.max(jnp.where(jnp.isfinite(produced), produced, 0.0))
    exact = jnp.max(jnp.where(view.index < prefix, sizes(view.states), 0.0))
    return Scale(
        known=jnp.maximum(scale.known, exact), usual=jnp.where(first, produced, scale.usual)
    )


def lengthen(reach: Reach, length: int, most: int | None) -> Reach:
    """Reach further after an iteration: over all T states, or by a little after a restart.

    Args:
        reach: before the iteration.
        length: T.
        most: longest active part after a restart; None if its length stays what it is.
    """
    calm = reach.calm + 1
    if most is None:
        return reach._replace(calm=calm)
    longer = jnp.minimum((GROW * reach.width).astype(int) + 1, most)
    trusting = (reach.resets == 0) | (calm >= CALM)
    return reach._replace(width=jnp.where(trusting, length, longer), calm=calm)


def shorten(reach: Reach, lost: Array, good: Array, most: int | None) -> Reach:
    """Reach less far where guesses were lost behind so many `good` states; see `lengthen`."""
    width = reach.width
    if most is not None:
        width = jnp.where(lost, jnp.clip((SHRINK * good).astype(int), 2, most), width)
    return reach._replace(
        width=width, calm=jnp.where(lost, 0, reach.calm), holding=reach.holding | lost
    )
