"""No Jacobian, or the identity in its place."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.linearize.structure import Step
from elkax.scan import Backend, affine_scan


@dataclass(frozen=True)
class Zero:
    """Nothing: Jacobi, one more exact state with every iteration."""

    def linearize(self, step: Step, states: Array, inputs: PyTree) -> tuple[Array, None]:
        """Evaluate f; see `Structure`."""
        return jax.vmap(step)(states, inputs), None

    def times(self, jacobian: None, vectors: Array) -> Array:
        """Return zero; see `Structure`."""
        return jnp.zeros_like(vectors)

    def transpose(self, jacobian: None) -> None:
        """Return the same; see `Structure`."""
        return None

    def mask(self, jacobian: None, keep: Array) -> None:
        """Return the same; see `Structure`."""
        return None

    def scan(
        self,
        jacobian: None,
        offset: Array,
        start: Array,
        *,
        reverse: bool = False,
        backend: Backend | None = None,
    ) -> Array:
        """Return the offsets; see `Structure`."""
        return offset


@dataclass(frozen=True)
class Identity(Zero):
    """The identity matrix: Picard."""

    def times(self, jacobian: Array, vectors: Array) -> Array:
        """Return the vectors where kept; see `Structure`."""
        return jacobian * vectors

    def linearize(self, step: Step, states: Array, inputs: PyTree) -> tuple[Array, Array]:
        """Evaluate f; see `Structure`."""
        return jax.vmap(step)(states, inputs), jnp.ones((len(states), 1), states.dtype)

    def transpose(self, jacobian: Array) -> Array:
        """Return the same; see `Structure`."""
        return jacobian

    def mask(self, jacobian: Array, keep: Array) -> Array:
        """Set entries to zero; see `Structure`."""
        return jnp.where(keep[:, None], jacobian, 0.0)

    def scan(
        self,
        jacobian: Array,
        offset: Array,
        start: Array,
        *,
        reverse: bool = False,
        backend: Backend | None = None,
    ) -> Array:
        """Add up the offsets between zeros; see `Structure`."""
        weights = jnp.broadcast_to(jacobian, offset.shape)
        return affine_scan(weights, offset, start, reverse=reverse, backend=backend)
