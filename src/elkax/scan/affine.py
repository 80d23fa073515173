"""Affine recurrences as `Scannable`s, dense and diagonal, with and without restarts."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from elkax.scan import lanes


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["size", "diagonal"])
@dataclass(frozen=True)
class Affine:
    r"""The recurrence $h_t = A_t h_{t-1} + b_t$ as a `Scannable`.

    The summary of a block is its own $(A, b)$. Inputs are pairs $(A_t, b_t)$.

    Args:
        size: dimension D of $h$.
        diagonal: whether $A_t$ is given by its diagonal.
    """

    size: int
    diagonal: bool

    def _times(self, a: Array, h: Array) -> Array:
        return lanes.multiply(a, h) if self.diagonal else lanes.matvec(a, h)

    def step(self, state: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        """Advance one step; the output is the new state."""
        a, b = x
        state = lanes.add(self._times(a, state), b)
        return state, state

    def identity(self, lane_shape: tuple[int, ...], dtype: DTypeLike) -> tuple[Array, Array]:
        """Return $A = I$, $b = 0$."""
        zero = jnp.zeros((self.size, *lane_shape), dtype)
        one = jnp.ones_like(zero) if self.diagonal else lanes.identity(self.size, lane_shape, dtype)
        return one, zero

    def combine(self, left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        """Join two blocks: $(A_2A_1, A_2b_1 + b_2)$."""
        a1, b1 = left
        a2, b2 = right
        return a2 * a1 if self.diagonal else lanes.matmul(a2, a1), self._times(a2, b1) + b2

    def absorb(self, summary: tuple[Array, Array], x: tuple[Array, Array]) -> tuple[Array, Array]:
        """Lengthen a block; one step is its own summary."""
        return self.combine(summary, x)

    def apply(self, summary: tuple[Array, Array], state: Array) -> Array:
        """Jump over a block."""
        return self.step(state, summary)[0]

    def sound(self, summary: tuple[Array, Array]) -> bool:
        """Every block has a summary."""
        return True


Cut = tuple[tuple[Array, Array], Bool[Array, "..."]]


@partial(jax.tree_util.register_dataclass, data_fields=["inner"], meta_fields=[])
@dataclass(frozen=True)
class Restarted:
    r"""An affine recurrence that begins anew from zero before some steps.

    Inputs and summaries are those of the recurrence, and whether something before them is cut off.
    Multiplied by zero instead, what is not finite would stay.

    Args:
        inner: the recurrence.
    """

    inner: Affine

    def step(self, state: Array, x: Cut) -> tuple[Array, Array]:
        """Advance one step, from zero where it is a restart."""
        inner, cut = x
        cut, state = lanes.align(cut, 0, state, 1)
        return self.inner.step(jnp.where(cut, 0, state), inner)

    def identity(self, lane_shape: tuple[int, ...], dtype: DTypeLike) -> Cut:
        """Return an empty block, in which nothing is cut off."""
        return self.inner.identity(lane_shape, dtype), jnp.zeros(lane_shape, bool)

    def combine(self, left: Cut, right: Cut) -> Cut:
        """Join two blocks; what stands before a restart is forgotten."""
        (earlier, cut_earlier), (later, cut_later) = left, right
        joined = self.inner.combine(earlier, later)
        kept = jax.tree.map(lambda new, old: jnp.where(cut_later, new, old), later, joined)
        return kept, cut_earlier | cut_later

    def absorb(self, summary: Cut, x: Cut) -> Cut:
        """Lengthen a block; one step is its own summary."""
        return self.combine(summary, x)

    def apply(self, summary: Cut, state: Array) -> Array:
        """Jump over a block."""
        return self.step(state, summary)[0]

    def sound(self, summary: Cut) -> bool:
        """Every block has a summary."""
        return True
