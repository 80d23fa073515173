"""A nonlinear cell as a recurrence in its state alone."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.cells.protocol import Cell, Params
from elkax.cells.timeline import Timeline
from elkax.linearize import BlockDiagonal, Diagonal
from elkax.recurrences import Method, RecurrenceInfo, evaluate_recurrence
from elkax.scan import Sequential


@dataclass(frozen=True)
class Advance:
    """The step of a cell without its output; an input is one of the cell and whether to start anew.

    Attributes:
        cell: the cell.
        tree: structure of its state, whose leaves are the columns of one array; None if the state
            is as it is.
    """

    cell: Cell
    tree: Any

    @property
    def jacobian_structure(self) -> Any:
        """Return what the cell states."""
        structure = getattr(self.cell, "jacobian_structure", None)
        # Its derivative would know of no parameters and no resets; one product gives the same.
        return replace(structure, derivative=None) if isinstance(structure, Diagonal) else structure

    def pack(self, state: PyTree) -> PyTree:
        """Bring a state to the form that is solved for."""
        return state if self.tree is None else jnp.stack(jax.tree.leaves(state), -1)

    def unpack(self, state: PyTree) -> PyTree:
        """Undo `pack`."""
        return state if self.tree is None else self.tree.unflatten(jnp.moveaxis(state, -1, 0))

    def __call__(self, params: Params, start: PyTree, state: PyTree, x: tuple) -> PyTree:
        """Take one step."""
        x, reset = x
        if reset is not None:
            state = jax.tree.map(lambda a, b: jnp.where(reset, a, b), start, state)
        return self.pack(self.cell.step(params, self.unpack(state), x)[0])


def recurrence(cell: Cell, params: Params, start: PyTree) -> tuple[jax.tree_util.Partial, PyTree]:
    """Return the cell as `evaluate_recurrence` takes it, and its first state."""
    blocks = isinstance(getattr(cell, "jacobian_structure", None), BlockDiagonal)
    advance = Advance(cell, jax.tree.structure(start) if blocks else None)
    start = advance.pack(start)
    return jax.tree_util.Partial(advance, params, start), start


def evaluate(
    cell: Cell,
    params: Params,
    inputs: Array,
    start: PyTree,
    timeline: Timeline,
    method: Method | Sequential | None,
) -> tuple[PyTree, RecurrenceInfo]:
    """Evaluate the states after all steps."""
    function, start = recurrence(cell, params, start)
    solution = evaluate_recurrence(
        function,
        start,
        (inputs, timeline.resets),
        length=timeline.length,
        reverse=timeline.reverse,
        method=method,
    )
    return function.func.unpack(solution.states), solution.info
