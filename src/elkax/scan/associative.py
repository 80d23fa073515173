"""Prefixes of blocks, combined in parallel."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.scan.blocks import check_block_count, run_in_blocks
from elkax.scan.protocol import Centred, Scannable, State, Summary, sequence_length


@dataclass(frozen=True)
class Associative:
    r"""Combine the summaries of blocks into prefixes: no state is carried from block to block.

    1. Every block is summarised by `absorb`, all K in lanes: T / K steps in sequence.
    2. `combine` doubles in each of $\log_2K$ rounds how many blocks a summary reaches back.
    3. All prefixes are applied to the first state, and every block is run by `step` from there.

    One program serves all rounds, where that of `jax.lax.associative_scan` grows with their number.
    A summary rounds more than a step does, so there are no more of them than keep lanes busy.

    Args:
        num_blocks: K, at most T of them are used; T gives depth O(log T). By default a power of two
            between $\sqrt T/2$ and $\sqrt T$, and at least 8.
    """

    num_blocks: int | None = None

    def __post_init__(self) -> None:
        """Reject a block count that cannot be."""
        if self.num_blocks is not None:
            check_block_count(self.num_blocks)

    def __call__(
        self, scannable: Scannable, state: State, xs: PyTree, *, reverse: bool = False
    ) -> tuple[State, PyTree]:
        """Run the recurrence; see `elkax.scan.Backend`."""
        count = self.num_blocks
        if count is None:
            count = max(8, 2 ** math.ceil(math.log2(sequence_length(xs)) / 2 - 1))
        return run_in_blocks(scannable, state, xs, count, _apply_prefixes, reverse=reverse)


def _apply_prefixes(scannable: Scannable, state: State, totals: Summary, reverse: bool) -> State:
    """Give the state before every block by applying prefixes to the first one."""

    def turn(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.flip(leaf, -1), tree) if reverse else tree

    # No state is carried over the block that is run last.
    prefixes = _prefixes(scannable, jax.tree.map(lambda leaf: leaf[..., :-1], turn(totals)))
    count = jax.tree.leaves(totals)[0].shape[-1] - 1
    first = jax.tree.map(lambda leaf: leaf[..., None], state)
    spread = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, -1), first)
    after = scannable.apply(prefixes, spread)
    return turn(jax.tree.map(lambda a, b: jnp.concatenate((a, b), -1), first, after))


def _prefixes(scannable: Scannable, summaries: Summary) -> Summary:
    """Combine all prefixes along the one lane axis.

    References:
        Hillis & Steele (1986), Communications of the ACM 29(12).
    """
    lane = jnp.arange(jax.tree.leaves(summaries)[0].shape[-1])

    def double(summaries: Summary, reach: Array) -> tuple[Summary, None]:
        earlier = jax.tree.map(lambda leaf: jnp.roll(leaf, reach, -1), summaries)
        joined = scannable.combine(earlier, summaries)
        if isinstance(scannable, Centred):
            joined = scannable.recenter(joined, scannable.locate(joined))
        whole = lane < reach  # reaches back to the first block already
        return jax.tree.map(lambda old, new: jnp.where(whole, old, new), summaries, joined), None

    rounds = (lane.size - 1).bit_length()
    return jax.lax.scan(double, summaries, 2 ** jnp.arange(rounds))[0]
