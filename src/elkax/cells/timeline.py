"""The order in which the steps of a sequence are taken."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.scan import linear_recurrence
from elkax.scan.linear_recurrence import column


@dataclass(frozen=True)
class Timeline:
    """Steps t = 1, ..., T of one sequence: some may start anew, and the last may not exist.

    Args:
        count: T.
        resets: (T,) bools, None if there are none.
        length: how many of the steps exist, None if all do.
        reverse: whether the last that exists is the first taken.
    """

    count: int
    resets: Array | None
    length: Array | None
    reverse: bool

    @property
    def valid(self) -> Array | None:
        """Tell which steps exist, (T,); None if all do."""
        return None if self.length is None else jnp.arange(self.count) < self.length

    def recurrence(self, decay: Array, increment: Array, start: Array) -> Array:
        """Solve a linear recurrence; see `linear_recurrence`."""
        return linear_recurrence(
            jnp.broadcast_to(decay, increment.shape),
            increment,
            start,
            resets=self.resets,
            length=self.length,
            reverse=self.reverse,
        )

    def before(self, values: PyTree, start: PyTree) -> PyTree:
        """Return what stands before every step: a value of the step taken before it, or `start`."""
        time = jnp.arange(self.count)
        if self.reverse:
            begins = time >= (self.count if self.length is None else self.length) - 1
        else:
            begins = time == 0
        if self.resets is not None:
            begins |= self.resets

        def shift(leaf: Array, first: Array) -> Array:
            earlier = jnp.roll(leaf, -1 if self.reverse else 1, 0)
            return jnp.where(column(begins, leaf), first, earlier)

        return jax.tree.map(shift, values, start)

    def hold(self, values: PyTree, start: PyTree) -> PyTree:
        """Return values that stay as they are in padding."""
        length, valid = self.length, self.valid
        if length is None or valid is None:
            return values
        some = (length > 0) & (not self.reverse)

        def keep(leaf: Array, first: Array) -> Array:
            last = jnp.where(some, leaf[jnp.maximum(length - 1, 0)], first)
            return jnp.where(column(valid, leaf), leaf, last)

        return jax.tree.map(keep, values, start)
