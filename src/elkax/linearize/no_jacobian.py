"""No Jacobian, or the identity in its place."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.linearize.structure import Entrywise, Step
from elkax.scan import Backend


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
class Identity(Entrywise):
    """The identity matrix: Picard."""

    def linearize(self, step: Step, states: Array, inputs: PyTree) -> tuple[Array, Array]:
        """Evaluate f; see `Structure`."""
        return jax.vmap(step)(states, inputs), jnp.ones_like(states)
