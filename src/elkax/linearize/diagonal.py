"""The diagonal of the Jacobian."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.gaussian.diagonal import DiagonalKalmanFilter, DiagonalStep
from elkax.linearize.structure import Entrywise, Step, pushforward
from elkax.scan import Backend, run


@dataclass(frozen=True)
class Diagonal(Entrywise):
    r"""The diagonal: quasi-DEER and quasi-ELK.

    For a general cell it takes D products of the Jacobian with a vector, one after the other, so
    that no more than O(T D) is kept.

    Args:
        derivative: $(s_{t-1}, x_t)$ to the diagonal of the Jacobian, as a state; None to have it
            computed.
        exact: whether the Jacobian of the cell has no other entries, so that one product gives it.
    """

    derivative: Callable[[PyTree, PyTree], PyTree] | None = None
    exact: bool = False

    def linearize(self, step: Step, states: Array, inputs: PyTree) -> tuple[Array, Array]:
        """Evaluate f and the diagonals (T, D); see `Structure`."""
        if self.derivative is not None:
            values = jax.vmap(step)(states, inputs)
            return values, jax.vmap(self.derivative)(states, inputs)
        values, push = pushforward(step, states, inputs)
        if self.exact:
            return values, push(jnp.ones_like(states))

        def entry(index: Array) -> Array:
            unit = (jnp.arange(states.shape[1]) == index).astype(states.dtype)
            pushed = push(jnp.broadcast_to(unit, states.shape))
            return jax.lax.dynamic_index_in_dim(pushed, index, 1, keepdims=False)

        return values, jax.lax.map(entry, jnp.arange(states.shape[1])).T

    def filter(
        self, jacobian: Array, offset: Array, noise: Array, backend: Backend | None
    ) -> tuple[Array, Array]:
        """Filter coordinate by coordinate; see `Structure`."""
        size = offset.shape[1]
        zero = jnp.zeros_like(offset[0])
        return run(
            DiagonalKalmanFilter(size),
            (zero, zero),
            DiagonalStep(jacobian, offset, noise),
            backend=backend,
            state_dim=size,
            recurrence="affine",
        )[1]

    def gap(self, covs: Array, jacobian: Array) -> Array:
        """Multiply entry by entry; see `Structure`."""
        return (1.0 - covs) * jacobian
