"""Affine recurrences, dense and diagonal."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from elkax.scan import lanes
from elkax.scan.choice import run
from elkax.scan.protocol import Backend


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


def affine_scan(
    transition: Float[Array, "..."],
    offset: Float[Array, "T D"],
    initial_state: Float[Array, " D"] | None = None,
    *,
    reverse: bool = False,
    backend: Backend | None = None,
) -> Float[Array, "T D"]:
    r"""Evaluate $h_t = A_t h_{t-1} + b_t$ for $t = 1, \dots, T$.

    Differentiable in every argument, forward and reverse; the derivative of an affine recurrence
    is again one: $\bar h_t = A_{t+1}^\top \bar h_{t+1} + \partial L/\partial h_t$,
    $\partial L/\partial A_t = \bar h_t h_{t-1}^\top$.

    Args:
        transition: $A_t$: (T, D, D) dense or (T, D) diagonal.
        offset: $b_t$.
        initial_state: $h_0$, not part of the output; zero if None.
        reverse: run from the last entry to the first, $h_t = A_t h_{t+1} + b_t$ with
            `initial_state` as $h_{T+1}$.
        backend: how to run it; chosen by `elkax.scan.choose` if None.

    Returns:
        $h_{1:T}$. Cost O(T D^2) dense and O(T D) diagonal with the sequential backend.

    Raises:
        ValueError: on shapes that do not fit, or T = 0.

    References:
        Martin & Cundy (2018), arXiv:1709.04057.
    """
    length, size = offset.shape
    diagonal = transition.ndim == 2
    expected = (length, size) if diagonal else (length, size, size)
    if transition.shape != expected:
        raise ValueError(
            f"transition must be (T, D, D) or (T, D) with T = {length}, D = {size} from offset, "
            f"got {transition.shape}"
        )
    if initial_state is None:
        initial_state = jnp.zeros(size, offset.dtype)
    if initial_state.shape != (size,):
        raise ValueError(f"initial_state must be ({size},), got {initial_state.shape}")
    dtype = jnp.result_type(transition, offset, initial_state)
    transition, offset, initial_state = jax.tree.map(
        lambda leaf: leaf.astype(dtype), (transition, offset, initial_state)
    )
    return _affine_scan(transition, offset, initial_state, reverse=reverse, backend=backend)


@partial(jax.jit, static_argnames=("reverse", "backend"))
def _affine_scan(
    transition: Array, offset: Array, start: Array, *, reverse: bool, backend: Backend | None
) -> Array:
    size = start.shape[0]
    recurrence = Affine(size, diagonal=transition.ndim == 2)
    xs = transition, offset
    return run(
        recurrence,
        start,
        xs,
        backend=backend,
        state_dim=size,
        recurrence="affine",
        reverse=reverse,
    )[1]
