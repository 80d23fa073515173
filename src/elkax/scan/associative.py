"""Prefix combination of one-step summaries."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from elkax.scan.fallback import where_sound
from elkax.scan.lanes import from_lanes, to_lanes
from elkax.scan.protocol import Scannable, State, sequence_length, state_dtype
from elkax.scan.sequential import Sequential


@dataclass(frozen=True)
class Associative:
    """Run the recurrence through `jax.lax.associative_scan`: depth O(log T), work O(T).

    One-step summaries are combined into prefixes, every prefix is applied to the initial state,
    and one `step` in all lanes at once gives the outputs. The program, and with it the compile
    time, grows with log T.
    """

    def __call__(
        self, scannable: Scannable, state: State, xs: PyTree, *, reverse: bool = False
    ) -> tuple[State, PyTree]:
        """Run the recurrence; see `elkax.scan.Backend`."""
        length = sequence_length(xs)
        lanes = jax.tree.map(to_lanes, xs)
        if reverse:
            lanes = jax.tree.map(lambda x: jnp.flip(x, -1), lanes)
        summaries = scannable.absorb(scannable.identity((length,), state_dtype(state)), lanes)
        # The prefix that ends at T - 1 is what the last step starts from.
        starts = jax.tree.map(lambda leaf: leaf[..., :-1], summaries)

        def parallel() -> tuple[State, PyTree]:
            first = jax.tree.map(lambda leaf: leaf[..., None], state)
            before = first
            if length > 1:
                prefixes = _prefixes(scannable, starts)
                spread = jax.tree.map(
                    lambda leaf: jnp.broadcast_to(leaf, (*leaf.shape[:-1], length - 1)), first
                )
                after = scannable.apply(prefixes, spread)
                before = jax.tree.map(lambda a, b: jnp.concatenate((a, b), -1), first, after)
            states, outputs = scannable.step(before, lanes)
            if reverse:
                outputs = jax.tree.map(lambda leaf: jnp.flip(leaf, -1), outputs)
            final = jax.tree.map(lambda leaf: leaf[..., -1], states)
            return final, jax.tree.map(from_lanes, outputs)

        return where_sound(
            scannable.sound(starts),
            parallel,
            lambda: Sequential()(scannable, state, xs, reverse=reverse),
        )


def _prefixes(scannable: Scannable, summaries: PyTree) -> PyTree:
    """Combine all prefixes along the one lane axis."""
    leaves, structure = jax.tree.flatten(summaries)
    shapes = [leaf.shape[:-1] for leaf in leaves]
    # `associative_scan` counts its axis from the front, so all leaves get the same rank.
    rank = max(leaf.ndim for leaf in leaves)
    padded = [leaf.reshape((1,) * (rank - leaf.ndim) + leaf.shape) for leaf in leaves]

    def restore(tree: list) -> PyTree:
        parts = [
            leaf.reshape(shape + leaf.shape[-1:]) for leaf, shape in zip(tree, shapes, strict=True)
        ]
        return jax.tree.unflatten(structure, parts)

    def combine(left: list, right: list) -> list:
        joined = jax.tree.leaves(scannable.combine(restore(left), restore(right)))
        return [leaf.reshape((1,) * (rank - leaf.ndim) + leaf.shape) for leaf in joined]

    return restore(jax.lax.associative_scan(combine, padded, axis=rank - 1))
