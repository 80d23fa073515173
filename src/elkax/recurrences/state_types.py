"""States whose leaves are not all of one floating-point type.

Leaves that are no part of the unknown trajectory (counters, flags, keys, numbers of another
precision) can be found first, by one scan, if their update reads none of those that are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, PyTree

from elkax.linearize import Diagonal
from elkax.recurrences.prepare import Arguments, Cell, clean, declared_structure


def _merge(solved: Sequence[bool], unknown: Sequence, known: Sequence) -> list:
    """Put leaves that are solved for and leaves that are known in the order of the state."""
    some, others = iter(unknown), iter(known)
    return [next(some) if one else next(others) for one in solved]


def _take(flags: Sequence[bool], leaves: Sequence, value: bool = True) -> list:
    return [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag == value]


@dataclass(frozen=True)
class Reduced:
    """A function of state and input, with a state like its own, where some leaves are known.

    An input is that of the function, and the leaves known. Hashable.

    Attributes:
        tree: of the whole state.
        solved: which leaves are not known.
        function: the function; None if it is the first argument of a call.
        jacobian_structure: that of the cell.
    """

    tree: Any
    solved: tuple[bool, ...]
    function: Any = None
    jacobian_structure: Any = None

    def __call__(self, *arguments: Any) -> list:
        """Return the leaves that are not known."""
        *function, state, (inputs, known) = arguments
        (call,) = function or (self.function,)
        whole = self.tree.unflatten(_merge(self.solved, state, known))
        return _take(self.solved, jax.tree.leaves(call(whole, inputs)))


class Separated(NamedTuple):
    """A recurrence in the leaves of its state that have to be solved for.

    Attributes:
        arguments: that recurrence, its state a list of leaves.
        solved: which leaves of the whole state these are.
        known: trajectories of the others.
    """

    arguments: Arguments
    solved: tuple[bool, ...]
    known: list

    def take(self, trajectory: PyTree) -> PyTree:
        """Take from a trajectory of the whole state what is solved for."""
        return _take(self.solved, jax.tree.leaves(trajectory))


def separate(arguments: Arguments) -> Separated | None:
    """Find the leaves of the state that can be found first; None if there is nothing to solve.

    Raises:
        TypeError: if their update reads what has to be solved for.
    """
    solved = which_are_solved(arguments)
    if not any(solved):
        return None
    leaves, tree = jax.tree.flatten(arguments.initial)
    before, after = _find_known(arguments, tree=tree, solved=solved)
    structure = declared_structure(arguments.cell)
    if isinstance(structure, Diagonal) and structure.derivative is not None:
        structure = replace(structure, derivative=Reduced(tree, solved, structure.derivative))
    reduced = Reduced(tree, solved, jacobian_structure=structure)
    rest = replace(
        arguments,
        cell=jax.tree_util.Partial(reduced, arguments.cell),
        initial=_take(solved, leaves),
        inputs=(arguments.inputs, before),
    )
    return Separated(rest, solved, after)


def join(separated: Separated, whole: PyTree, states: list) -> PyTree:
    """Return the trajectory of a whole state, from that of what is solved for."""
    leaves = _merge(separated.solved, states, separated.known)
    return jax.tree.unflatten(jax.tree.structure(whole), leaves)


def which_are_solved(arguments: Arguments) -> tuple[bool, ...]:
    """Tell which leaves have to be solved for: those of a type that no others' update reads.

    Raises:
        TypeError: if there is no such type.
    """
    leaves = jax.tree.leaves(arguments.initial)
    sizes: dict = {}
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + leaf.size
    if not sizes:
        return (False,) * len(leaves)
    reads = _reads(arguments.cell, arguments.initial, arguments.inputs)

    def guilty(dtype: Any) -> list[int]:
        """Return the leaves of other types that are computed from one of this type."""
        solved = [leaf.dtype == dtype for leaf in leaves]
        return [
            i
            for i, row in enumerate(reads)
            if not solved[i] and any(a and b for a, b in zip(row, solved, strict=True))
        ]

    # The first is the one with most entries.
    types = sorted(sizes, key=lambda dtype: -sizes[dtype])
    for dtype in types:
        if not guilty(dtype):
            return tuple(leaf.dtype == dtype for leaf in leaves)
    first = guilty(types[0])[0]
    path = jax.tree_util.keystr(jax.tree.leaves_with_path(arguments.initial)[first][0])
    raise TypeError(
        "initial_state must be a pytree of arrays of one floating-point type, beside leaves of "
        f"other types whose update reads none of these, got leaf {path} of type "
        f"{leaves[first].dtype}, whose update reads one of {types[0]}; only "
        "method=elkax.Sequential() takes such a state"
    )


def _reads(cell: Cell, initial: PyTree, inputs: PyTree) -> list[list[bool]]:
    """Tell of every leaf of the new state which leaves of the old one it is computed from."""
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    traced = jax.make_jaxpr(lambda state, x: jax.tree.leaves(cell(state, x)))(initial, first)
    count = len(jax.tree.leaves(initial))
    rows = []
    for i in range(count):
        used = dce_jaxpr(traced.jaxpr, [i == j for j in range(count)], instantiate=False)[1]
        rows.append(list(used[:count]))
    return rows


@partial(jax.jit, static_argnames=("tree", "solved"))
def _find_known(
    arguments: Arguments, *, tree: Any, solved: tuple[bool, ...]
) -> tuple[list[Array], list[Array]]:
    """Find what is known, before and after every step."""
    leaves = jax.tree.leaves(arguments.initial)
    # Their update does not read the others, which are whatever they were.
    others = jax.lax.stop_gradient(_take(solved, leaves))

    def step(known: list, x: tuple) -> tuple[list, tuple[list, list]]:
        inputs, valid = x
        new = arguments.advance(tree.unflatten(_merge(solved, others, known)), inputs, valid)
        after = _take(solved, jax.tree.leaves(new), False)
        return after, (known, after)

    inputs = clean(arguments.inputs, arguments.valid), arguments.valid
    start = _take(solved, leaves, False)
    return jax.lax.scan(step, start, inputs, arguments.length)[1]
