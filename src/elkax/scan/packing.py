"""Many inputs of a time step in one array, so that a loop fetches them at once."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from elkax.scan.protocol import Scannable, State, Summary


class Place(NamedTuple):
    """Where a leaf of some shape and dtype stands: rows `start` to `stop` of array `index`."""

    index: int
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class Packing:
    """How the leaves of a tree stand in few arrays.

    Args:
        tree: structure of the tree.
        places: of its leaves.
    """

    tree: Any
    places: tuple[Place, ...]

    def unpack(self, arrays: list[Array]) -> PyTree:
        """Return the tree of one time step, from arrays (K, lanes) without time."""

        def take(place: Place) -> Array:
            rows = arrays[place.index]
            part = rows[place.start : place.stop].reshape(place.shape + rows.shape[1:])
            return part != 0 if place.dtype == bool else part

        return jax.tree.unflatten(self.tree, [take(place) for place in self.places])


def pack(xs: PyTree) -> tuple[Packing, list[Array]]:
    """Put leaves (T, ...) of the same dtype side by side into one array (T, K).

    Truth values, as zero and one, go with the first real numbers.
    """
    leaves, tree = jax.tree.flatten(xs)
    real = [leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    columns: dict[Any, list[Array]] = {}
    places = []
    for leaf in leaves:
        dtype = real[0] if leaf.dtype == bool and real else leaf.dtype
        group = columns.setdefault(dtype, [])
        start = sum(part.shape[1] for part in group)
        group.append(leaf.reshape(len(leaf), -1).astype(dtype))
        index = list(columns).index(dtype)
        stop = start + group[-1].shape[1]
        places.append(Place(index, start, stop, leaf.shape[1:], leaf.dtype))
    arrays = [jnp.concatenate(group, axis=1) for group in columns.values()]
    return Packing(tree, tuple(places)), arrays


@partial(jax.tree_util.register_dataclass, data_fields=["scannable"], meta_fields=["packing"])
@dataclass(frozen=True)
class Packed:
    """A recurrence whose inputs are packed; a `Scannable`."""

    scannable: Scannable
    packing: Packing

    def step(self, state: State, x: list[Array]) -> tuple[State, PyTree]:
        """Advance one step."""
        return self.scannable.step(state, self.packing.unpack(x))

    def identity(self, lanes: tuple[int, ...], dtype: DTypeLike) -> Summary:
        """Summarise no step."""
        return self.scannable.identity(lanes, dtype)

    def absorb(self, summary: Summary, x: list[Array]) -> Summary:
        """Lengthen a block by one step."""
        return self.scannable.absorb(summary, self.packing.unpack(x))

    def combine(self, left: Summary, right: Summary) -> Summary:
        """Join two blocks."""
        return self.scannable.combine(left, right)

    def apply(self, summary: Summary, state: State) -> State:
        """Jump over a block."""
        return self.scannable.apply(summary, state)

    def sound(self, summary: Summary) -> Array | bool:
        """Tell whether the summary exists."""
        return self.scannable.sound(summary)
