"""A sequence run in blocks, side by side in vector lanes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from elkax.scan import lanes
from elkax.scan.fallback import where_sound
from elkax.scan.layout import block_shape, from_blocks, to_blocks
from elkax.scan.protocol import (
    Centred,
    Determined,
    Scannable,
    State,
    Summary,
    absorb,
    sequence_length,
    state_dtype,
    step,
)
from elkax.scan.sequential import Sequential

# So many steps tell where a block began, well enough to keep digits.
TRIAL = 8

# From the first state and the summaries of all blocks, the state before each block; blocks in the
# last axis, and the last argument tells whether they run backwards.
FindStarts = Callable[[Scannable, State, Summary, bool], State]


def check_block_count(num_blocks: int) -> None:
    """Reject a block count that cannot be."""
    if not isinstance(num_blocks, int) or num_blocks < 1:
        raise ValueError(f"num_blocks must be a positive integer, got {num_blocks!r}")


def run_in_blocks(
    scannable: Scannable,
    state: State,
    xs: PyTree,
    num_blocks: int,
    find_starts: FindStarts,
    *,
    reverse: bool,
) -> tuple[State, PyTree]:
    """Summarise all blocks, find the state before each of them, and run them from there.

    Any T is cut; the block run last is padded at its end, and the padding neither changes a state
    nor reaches the outputs.

    Args:
        scannable: the recurrence.
        state: state before the first step.
        xs: inputs, leading axis T.
        num_blocks: at most so many blocks.
        find_starts: gives the state before each block.
        reverse: run from the last input to the first.
    """
    length = sequence_length(xs)
    steps, blocks, padding = block_shape(length, num_blocks)
    if blocks == 1:
        return Sequential()(scannable, state, xs, reverse=reverse)
    rows = jax.tree.map(lambda x: to_blocks(x, steps, blocks, padding, reverse), xs)
    empty = scannable.identity((blocks,), state_dtype(state))
    totals = _summarise(scannable, empty, rows, reverse)
    starts = find_starts(scannable, state, totals, reverse)
    sound = scannable.sound(totals)
    if isinstance(scannable, Determined):
        inner = slice(None, -1) if reverse else slice(1, None)
        determined = scannable.determined(jax.tree.map(lambda leaf: leaf[..., inner], starts))
        if determined is not True:
            sound = jnp.all(determined) & jnp.all(sound)

    def parallel() -> tuple[State, PyTree]:
        last, outputs = _run_from(scannable, starts, rows, padding, reverse)
        end = 0 if reverse else -1
        final = jax.tree.map(lambda leaf: leaf[..., end], last)
        return final, jax.tree.map(
            lambda leaf: from_blocks(leaf, length, padding, reverse), outputs
        )

    return where_sound(
        sound,
        parallel,
        lambda: Sequential()(scannable, state, xs, reverse=reverse),
    )


def _summarise(scannable: Scannable, empty: Summary, rows: PyTree, reverse: bool) -> Summary:
    """Summarise all blocks, in few digits each about the state that its first steps tell."""

    def lengthen(summary: Summary, x: PyTree) -> tuple[Summary, None]:
        return absorb(scannable, summary, lanes.materialize(x, 0)), None

    dtype = state_dtype(jax.tree.leaves(empty)[0])
    if isinstance(scannable, Centred) and lanes.is_short(dtype):
        head = slice(-TRIAL, None) if reverse else slice(TRIAL)
        first = jax.tree.map(lambda leaf: leaf[head], rows)
        trial, _ = jax.lax.scan(lengthen, empty, first, reverse=reverse)
        empty = scannable.recenter(empty, scannable.locate(trial))
    return jax.lax.scan(lengthen, empty, rows, reverse=reverse)[0]


def _run_from(
    scannable: Scannable, starts: State, rows: PyTree, padding: int, reverse: bool
) -> tuple[State, PyTree]:
    """Run all blocks side by side from their own first states."""

    def advance(before: State, row: PyTree) -> tuple[State, PyTree]:
        return step(scannable, before, lanes.materialize(row, 0))

    if not padding:
        return jax.lax.scan(advance, starts, rows, reverse=reverse)
    steps, *_, blocks = jax.tree.leaves(rows)[0].shape
    position = jnp.arange(blocks)[None] * steps + jnp.arange(steps)[:, None]
    real = position >= padding if reverse else position < steps * blocks - padding

    def advance_real(before: State, x: PyTree) -> tuple[State, PyTree]:
        row, keep = x
        after, output = advance(before, row)
        return jax.tree.map(lambda a, b: jnp.where(keep, a, b), after, before), output

    return jax.lax.scan(advance_real, starts, (rows, real), reverse=reverse)
