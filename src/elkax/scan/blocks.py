"""A sequence run in blocks, side by side in vector lanes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.scan import lanes
from elkax.scan.fallback import where_sound
from elkax.scan.layout import from_blocks, to_blocks
from elkax.scan.packing import Packed, pack
from elkax.scan.protocol import (
    Centred,
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

# From the first state and the summaries of all blocks but the one run last, the state before each
# block; blocks in the last axis, and the last argument tells whether they run backwards.
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
    steps = -(-length // min(num_blocks, length))
    blocks = -(-length // steps)
    padding = steps * blocks - length
    if blocks == 1:
        return Sequential()(scannable, state, xs, reverse=reverse)
    packing, arrays = pack(xs)
    packed = Packed(scannable, packing)
    rows = [to_blocks(x, steps, blocks, padding, reverse) for x in arrays]
    empty = scannable.identity((blocks,), state_dtype(state))
    totals = _summarise(packed, empty, rows, reverse)
    # No state is carried over the block that is run last, so its summary is not used.
    used = slice(1, None) if reverse else slice(0, -1)

    def parallel() -> tuple[State, PyTree]:
        jumps = jax.tree.map(lambda leaf: leaf[..., used], totals)
        starts = find_starts(scannable, state, jumps, reverse)
        last, outputs = _run_from(packed, starts, rows, padding, reverse)
        end = 0 if reverse else -1
        final = jax.tree.map(lambda leaf: leaf[..., end], last)
        return final, jax.tree.map(
            lambda leaf: from_blocks(leaf, length, padding, reverse), outputs
        )

    sound = scannable.sound(totals)
    return where_sound(
        sound if sound is True else sound[..., used],
        parallel,
        lambda: Sequential()(packed, state, arrays, reverse=reverse),
    )


def _summarise(packed: Packed, empty: Summary, rows: list[Array], reverse: bool) -> Summary:
    """Summarise all blocks, in few digits each about the state that its first steps tell."""

    def lengthen(summary: Summary, row: list[Array]) -> tuple[Summary, None]:
        return absorb(packed, summary, lanes.materialize(row, 1)), None

    scannable, dtype = packed.scannable, state_dtype(jax.tree.leaves(empty)[0])
    if isinstance(scannable, Centred) and lanes.is_short(dtype):
        head = slice(-TRIAL, None) if reverse else slice(TRIAL)
        first = [row[head] for row in rows]
        trial, _ = jax.lax.scan(lengthen, empty, first, reverse=reverse)
        empty = scannable.recenter(empty, scannable.locate(trial))
    return jax.lax.scan(lengthen, empty, rows, reverse=reverse)[0]


def _run_from(
    packed: Packed, starts: State, rows: list[Array], padding: int, reverse: bool
) -> tuple[State, PyTree]:
    """Run all blocks side by side from their own first states."""

    def advance(before: State, row: list[Array]) -> tuple[State, PyTree]:
        return step(packed, before, lanes.materialize(row, 1))

    if not padding:
        return jax.lax.scan(advance, starts, rows, reverse=reverse)
    steps, _, blocks = rows[0].shape
    position = jnp.arange(blocks)[None] * steps + jnp.arange(steps)[:, None]
    real = position >= padding if reverse else position < steps * blocks - padding

    def advance_real(before: State, x: PyTree) -> tuple[State, PyTree]:
        row, keep = x
        after, output = advance(before, row)
        return jax.tree.map(lambda a, b: jnp.where(keep, a, b), after, before), output

    return jax.lax.scan(advance_real, starts, (rows, real), reverse=reverse)
