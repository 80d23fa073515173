"""Square blocks on the diagonal of the Jacobian."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.linearize.full import Full
from elkax.linearize.structure import Step, pushforward
from elkax.scan import Backend


@dataclass(frozen=True)
class BlockDiagonal:
    """Square blocks on the diagonal, (T, D / k, k, k), coordinates in the order of the state.

    Args:
        block: k, a divisor of D.
        exact: whether the Jacobian of the cell has no other entries, so that k products with
            vectors give it instead of D.
    """

    block: int
    exact: bool = False

    def linearize(self, step: Step, states: Array, inputs: PyTree) -> tuple[Array, Array]:
        """Evaluate f and the blocks; see `Structure`."""
        length, size = states.shape
        if size % self.block:
            raise ValueError(f"the block size {self.block} must divide the state dimension {size}")
        shape = (length, size // self.block, self.block)
        values, push = pushforward(step, states, inputs)
        unit = jnp.eye(self.block, dtype=states.dtype)
        if self.exact:
            combs = jnp.broadcast_to(unit[:, None, None], (self.block, *shape))
            columns = jax.lax.map(lambda comb: push(comb.reshape(states.shape)), combs)
            return values, jnp.moveaxis(columns.reshape((self.block, *shape)), 0, -1)

        def column(index: Array) -> Array:
            basis = (jnp.arange(size) == index).astype(states.dtype)
            pushed = push(jnp.broadcast_to(basis, states.shape)).reshape(shape)
            return jax.lax.dynamic_index_in_dim(pushed, index // self.block, 1, keepdims=False)

        columns = jax.lax.map(column, jnp.arange(size))
        return values, jnp.moveaxis(columns.reshape((*shape[1:], length, self.block)), 2, 0).mT

    def _split(self, vectors: Array) -> Array:
        return vectors.reshape((*vectors.shape[:-1], -1, self.block))

    def times(self, jacobian: Array, vectors: Array) -> Array:
        """Multiply block by block; see `Structure`."""
        product = jnp.sum(jacobian * self._split(vectors)[:, :, None, :], axis=-1)
        return product.reshape(vectors.shape)

    def transpose(self, jacobian: Array) -> Array:
        """Swap the last two axes; see `Structure`."""
        return Full().transpose(jacobian)

    def scan(
        self,
        jacobian: Array,
        offset: Array,
        start: Array,
        *,
        reverse: bool = False,
        backend: Backend | None = None,
    ) -> Array:
        """Solve the affine recurrences of all blocks; see `Structure`."""

        def solve(jacobian: Array, offset: Array, start: Array) -> Array:
            return Full().scan(jacobian, offset, start, reverse=reverse, backend=backend)

        parts = jax.vmap(solve, in_axes=(1, 1, 0), out_axes=1)
        return parts(jacobian, self._split(offset), self._split(start)).reshape(offset.shape)

    def filter(
        self, jacobian: Array, offset: Array, noise: Array, backend: Backend | None
    ) -> tuple[Array, Array]:
        """Run the Kalman filters of all blocks; see `Structure`."""

        def solve(jacobian: Array, offset: Array, noise: Array) -> tuple[Array, Array]:
            return Full().filter(jacobian, offset, noise, backend)

        parts = jax.vmap(solve, in_axes=1, out_axes=1)
        means, covs = parts(jacobian, self._split(offset), self._split(noise))
        return means.reshape(offset.shape), covs

    def gap(self, covs: Array, jacobian: Array) -> Array:
        """Multiply block by block; see `Structure`."""
        return Full().gap(covs, jacobian)
