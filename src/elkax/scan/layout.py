"""Time steps laid out in blocks, and work on all of them at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.scan.lanes import materialize


def to_blocks(x: Array, steps: int, blocks: int, padding: int, reverse: bool = False) -> Array:
    """Lay a (T, ...) array out as (steps, ..., blocks), padded where the run ends."""
    if padding:
        widths = ((padding, 0) if reverse else (0, padding),) + ((0, 0),) * (x.ndim - 1)
        x = jnp.pad(x, widths)
    return jnp.moveaxis(x.reshape((blocks, steps) + x.shape[1:]), 0, -1)


def from_blocks(x: Array, length: int, padding: int, reverse: bool = False) -> Array:
    """Undo `to_blocks`."""
    x = jnp.moveaxis(x, -1, 0)
    x = x.reshape((-1,) + x.shape[2:])
    return x[padding:] if reverse else x[:length]


def in_blocks(
    function: Callable[[PyTree], tuple[PyTree, PyTree]], xs: PyTree, size: int
) -> tuple[PyTree, PyTree]:
    """Evaluate a function of single time steps for all of them, as many at once as fit in cache.

    Args:
        function: maps inputs with time in the last axis to `(outputs, totals)`: outputs with time
            in the last axis, and totals without it, already summed over the time steps given.
            Padding is zero (False), and must add nothing to the totals.
        xs: leaves with leading axis T.
        size: dimension D of the matrices that the function works on.

    Returns:
        Outputs with leading axis T, and totals over all T.
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    # About 16 KiB for one matrix in all lanes, so that a dozen of them stay in cache.
    width = max(16, 512 // size) if jax.default_backend() == "cpu" else length
    blocks = min(width, length)
    steps = -(-length // blocks)
    padding = steps * blocks - length
    rows = jax.tree.map(lambda x: to_blocks(x, steps, blocks, padding), xs)
    outputs, totals = jax.lax.map(lambda row: function(materialize(row, 0)), rows)
    outputs = jax.tree.map(lambda leaf: from_blocks(leaf, length, padding), outputs)
    return outputs, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), totals)
