"""Time steps laid out in blocks, and work on all of them at once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.scan.lanes import MAX_UNROLLED, materialize
from elkax.scan.series import (
    Leaves,
    Rule,
    one_series,
    series_first,
    series_last,
    with_vmap_rule,
)


def block_shape(length: int, most: int) -> tuple[int, int, int]:
    """Cut T into blocks of equal length.

    A count that divides T needs neither padding nor masks; up to a fifth fewer blocks are taken
    for it.

    Args:
        length: T.
        most: at most so many blocks.

    Returns:
        Steps in a block, blocks, and steps of padding.
    """
    most = min(most, length)
    divisors = (count for count in range(most, most - most // 5 - 1, -1) if length % count == 0)
    blocks = next(divisors, most)
    steps = -(-length // blocks)
    blocks = -(-length // steps)
    return steps, blocks, steps * blocks - length


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


def fills_lanes(size: int) -> bool:
    """Tell whether times go side by side in lanes: a CPU is busy with one step from D = 9 on."""
    return size <= MAX_UNROLLED or jax.default_backend() != "cpu"


def in_blocks(
    function: Callable[[Any, PyTree], tuple[PyTree, PyTree]], fixed: Any, xs: PyTree, size: int
) -> tuple[PyTree, PyTree]:
    """Evaluate a function of single time steps for all of them, as many at once as fit in cache.

    Args:
        function: maps `fixed` and inputs with time in the last axis to `(outputs, totals)`: outputs
            with time in the last axis, and totals likewise, to be summed over time. It closes over
            no array; padding is zero (False), and must add nothing to the totals. Where
            `fills_lanes` is false it is given single steps, without that axis.
        fixed: what is the same at all times.
        xs: leaves with leading axis T.
        size: dimension D of the matrices that the function works on; see `fills_lanes`.

    Returns:
        Outputs with leading axis T, and totals over all T.
    """
    tree = jax.tree.structure((fixed, xs))
    num_fixed = len(jax.tree.leaves(fixed))
    chunked = fills_lanes(size)

    def over_time(fixed: Any, xs: PyTree, series: int = 1) -> tuple[PyTree, PyTree]:
        if chunked:
            return _map_chunks(partial(function, fixed), xs, size * series)
        first = jax.tree.map(lambda leaf: leaf[0], xs)
        _, shapes = jax.eval_shape(function, fixed, first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def one(totals: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            outputs, more = function(fixed, x)
            return jax.tree.map(jnp.add, totals, more), outputs

        return jax.lax.scan(one, zeros, xs)[::-1]

    def make_rule(single: Callable[[Leaves], tuple[PyTree, PyTree]]) -> Rule:
        def rule(count: int, flags: Sequence[bool], leaves: Leaves) -> tuple[PyTree, PyTree]:
            expected = jax.eval_shape(single, one_series(flags, leaves))
            leaves = series_last(flags, leaves)
            if chunked:
                # Series before time: an axis of length one where something has only the other.
                leaves = [
                    leaf[..., None] if flag == (i < num_fixed) else leaf
                    for i, (flag, leaf) in enumerate(zip(flags, leaves, strict=True))
                ]
            fixed, xs = tree.unflatten(leaves)
            outputs, totals = over_time(fixed, xs, count)
            return series_first((outputs, totals), expected, count)

        return rule

    return with_vmap_rule(over_time, make_rule, fixed, xs)


def _map_chunks(
    function: Callable[[PyTree], tuple[PyTree, PyTree]], xs: PyTree, size: int
) -> tuple[PyTree, PyTree]:
    """Evaluate a function of chunks of time, for `size` numbers in the row of a matrix."""
    length = jax.tree.leaves(xs)[0].shape[0]
    # About 16 KiB for one matrix in all lanes, so that a dozen of them stay in cache.
    width = max(1, 512 // size) if jax.default_backend() == "cpu" else length
    steps, blocks, padding = block_shape(length, width)
    rows = jax.tree.map(lambda x: to_blocks(x, steps, blocks, padding), xs)

    def chunk(row: PyTree) -> tuple[PyTree, PyTree]:
        outputs, totals = function(materialize(row, 0))
        return outputs, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=-1), totals)

    outputs, totals = jax.lax.map(chunk, rows)
    outputs = jax.tree.map(lambda leaf: from_blocks(leaf, length, padding), outputs)
    return outputs, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), totals)
