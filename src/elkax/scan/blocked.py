"""Blocks of the sequence side by side in vector lanes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.scan import lanes
from elkax.scan.fallback import where_sound
from elkax.scan.layout import from_blocks, to_blocks
from elkax.scan.protocol import Scannable, State, sequence_length, state_dtype
from elkax.scan.sequential import Sequential


@dataclass(frozen=True)
class Blocked:
    """Cut the sequence into K blocks and run them side by side in vector lanes.

    1. Every block is summarised by `absorb`, all K in lanes: T / K steps in sequence.
    2. `apply` jumps from block to block: K steps in sequence, giving each block's first state.
    3. Every block is run by `step` from its first state, all K in lanes: T / K steps.

    Work about 2.5 T steps, compile time independent of T. Any T is cut; the last block is padded
    at its end and the padding neither changes a state nor reaches the outputs.

    Args:
        num_blocks: K, at most T of them are used.
    """

    num_blocks: int = 32

    def __post_init__(self) -> None:
        """Reject a block count that cannot be."""
        if not isinstance(self.num_blocks, int) or self.num_blocks < 1:
            raise ValueError(f"num_blocks must be a positive integer, got {self.num_blocks!r}")

    def __call__(
        self, scannable: Scannable, state: State, xs: PyTree, *, reverse: bool = False
    ) -> tuple[State, PyTree]:
        """Run the recurrence; see `elkax.scan.Backend`."""
        length = sequence_length(xs)
        steps = -(-length // min(self.num_blocks, length))
        blocks = -(-length // steps)
        padding = steps * blocks - length
        if blocks == 1:
            return Sequential()(scannable, state, xs, reverse=reverse)
        rows = jax.tree.map(lambda x: to_blocks(x, steps, blocks, padding, reverse), xs)

        def absorb(summary: PyTree, x: PyTree) -> tuple[PyTree, None]:
            return scannable.absorb(summary, lanes.materialize(x, 0)), None

        empty = scannable.identity((blocks,), state_dtype(state))
        totals, _ = jax.lax.scan(absorb, empty, rows, reverse=reverse)
        # No state is carried over the block that is run last, so its summary is not used.
        used = slice(1, None) if reverse else slice(0, -1)
        totals = jax.tree.map(lambda leaf: leaf[..., used], totals)
        sound = scannable.sound(totals)
        totals = jax.tree.map(lanes.from_lanes, totals)

        def parallel() -> tuple[State, PyTree]:
            starts = _block_starts(scannable, state, totals, reverse)
            last, outputs = _run_blocks(scannable, starts, rows, padding, reverse)
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


def _block_starts(scannable: Scannable, state: State, totals: PyTree, reverse: bool) -> State:
    """Give the state before every block, blocks in lanes."""

    def jump(before: State, total: PyTree) -> tuple[State, State]:
        after = scannable.apply(total, before)
        return after, after

    _, starts = jax.lax.scan(jump, state, totals, reverse=reverse)

    def join(first: Array, rest: Array) -> Array:
        parts = (rest, first[None]) if reverse else (first[None], rest)
        return jnp.moveaxis(jnp.concatenate(parts), 0, -1)

    return jax.tree.map(join, state, starts)


def _run_blocks(
    scannable: Scannable, starts: State, rows: PyTree, padding: int, reverse: bool
) -> tuple[State, PyTree]:
    """Run all blocks side by side from their own first states."""

    def advance(before: State, row: PyTree) -> tuple[State, PyTree]:
        return scannable.step(before, lanes.materialize(row, 0))

    if not padding:
        return jax.lax.scan(advance, starts, rows, reverse=reverse)
    steps, *_, blocks = jax.tree.leaves(rows)[0].shape
    position = jnp.arange(blocks)[None] * steps + jnp.arange(steps)[:, None]
    real = position >= padding if reverse else position < steps * blocks - padding

    def step(before: State, x: PyTree) -> tuple[State, PyTree]:
        row, keep = x
        after, output = advance(before, row)
        return jax.tree.map(lambda a, b: jnp.where(keep, a, b), after, before), output

    return jax.lax.scan(step, starts, (rows, real), reverse=reverse)
