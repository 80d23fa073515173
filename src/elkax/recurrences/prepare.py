"""What the arguments of a recurrence must be, and its flat form."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, PyTree

from elkax.linearize import BlockDiagonal, Diagonal, Structure
from elkax.recurrences.problem import Problem, where_rows
from elkax.smoothers.prepare import check_count, valid_steps

Cell = Callable[[PyTree, PyTree], PyTree]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cell", "initial", "inputs", "valid"],
    meta_fields=["length"],
)
@dataclass(frozen=True)
class Arguments:
    """A recurrence whose arguments have been checked.

    Attributes:
        cell: a `jax.tree_util.Partial`.
        initial: $s_0$, a pytree.
        inputs: pytree with leading axis T, maybe without arrays; what stands in padding is not
            used.
        valid: (T,), False in padding, where the state stays; None if there is none.
        length: T.
    """

    cell: Cell
    initial: PyTree
    inputs: PyTree
    valid: Array | None
    length: int

    def has_one_type(self) -> bool:
        """Tell whether the leaves of the state are of one floating-point type."""
        types = {leaf.dtype for leaf in jax.tree.leaves(self.initial)}
        return len(types) == 1 and jnp.issubdtype(next(iter(types)), jnp.floating)

    def advance(self, state: PyTree, inputs: PyTree, valid: Array | None) -> PyTree:
        """Take one step, in which the state stays unless it is valid (None: it is)."""
        # In TF32, which a GPU would take by default, Newton's method does not converge.
        with jax.default_matmul_precision("highest"):
            new = self.cell(state, inputs)
        if valid is None:
            return new
        return jax.tree.map(lambda a, b: jnp.where(valid, a, b), new, state)

    def flatten(self) -> tuple[Problem, Callable[[Array], PyTree]]:
        """Return the recurrence on flat states (D,), and what makes such a state a pytree again.

        An input of the flat step is an input of the cell, whether it exists (None if all do), and
        an empty array, so that there is one of leading length T.
        """
        types = {str(leaf.dtype) for leaf in jax.tree.leaves(self.initial)}
        if not self.has_one_type():
            raise TypeError(
                "initial_state must be a pytree of arrays of one floating-point type, got "
                f"{sorted(types)}"
            )
        flat, unravel = ravel_pytree(self.initial)

        def step(state: Array, x: PyTree) -> Array:
            inputs, valid, _ = x
            return ravel_pytree(self.advance(unravel(state), inputs, valid))[0]

        inputs = clean(self.inputs, self.valid)
        return Problem(step, flat, (inputs, self.valid, jnp.zeros((self.length, 0)))), unravel

    def turn_round(self) -> "Arguments":
        """Return the recurrence that takes the steps from the last to the first."""
        inputs, valid = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), (self.inputs, self.valid))
        return replace(self, inputs=inputs, valid=valid)


def prepare(
    cell: Cell,
    initial_state: PyTree,
    inputs: PyTree,
    num_timesteps: int | None,
    length: ArrayLike | None,
) -> Arguments:
    """Check a recurrence.

    Raises:
        TypeError: on a state without arrays, a cell that is not callable or changes the type of
            the state.
        ValueError: on T = 0, lengths that differ, a cell that changes the shape of the state.
    """
    if not callable(cell):
        raise TypeError(f"cell must be a function (state, input) -> state, got {cell!r}")
    if not isinstance(cell, jax.tree_util.Partial):
        cell = jax.tree_util.Partial(cell)
    initial = jax.tree.map(jnp.asarray, initial_state)
    if not jax.tree.leaves(initial):
        raise TypeError(f"initial_state must be a pytree of arrays, got no array, {initial_state}")
    inputs = jax.tree.map(jnp.asarray, inputs)
    count = _count_steps(inputs, num_timesteps)
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    _check_output(jax.eval_shape(cell, initial, first), initial)
    return Arguments(cell, initial, inputs, valid_steps(length, count), count)


def _count_steps(inputs: PyTree, num_timesteps: int | None) -> int:
    shapes = [leaf.shape for leaf in jax.tree.leaves(inputs)]
    lengths = {shape[0] if shape else None for shape in shapes}
    if num_timesteps is not None:
        check_count("num_timesteps", num_timesteps)
        lengths.add(num_timesteps)
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            "inputs must be arrays of one common leading length T (without any, num_timesteps "
            f"gives it), got shapes {shapes} and num_timesteps = {num_timesteps}"
        )
    count = next(iter(lengths)) or 0
    if count == 0:
        raise ValueError("inputs must hold at least one time step, got T = 0")
    return count


def _check_output(output: Any, state: PyTree) -> None:
    def shapes(tree: PyTree) -> str:
        return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree))

    expected, got = jax.tree.structure(state), jax.tree.structure(output)
    pair = isinstance(output, tuple) and len(output) == 2
    if expected != got and pair and jax.tree.structure(output[0]) == expected:
        raise ValueError(
            "cell must return the new state alone, got a tuple whose first entry is one, as "
            "jax.lax.scan takes it (carry, output): return the carry, and compute outputs from the "
            "states that are found, by jax.vmap"
        )
    same = expected == got and all(
        a.shape == b.shape
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(output), strict=True)
    )
    if not same:
        raise ValueError(
            f"cell must return a state like the one it is given, {shapes(state)}, got "
            f"{shapes(output)}"
        )
    if any(
        a.dtype != b.dtype
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(output), strict=True)
    ):
        raise TypeError(
            f"cell must not change the type of the state, {shapes(state)}, got {shapes(output)}"
        )


def declared_structure(cell: Cell) -> Structure | None:
    """Return the structure that a cell states as its `jacobian_structure`, None if it does not.

    Raises:
        TypeError: if it is none.
    """
    declared = getattr(cell, "jacobian_structure", None)
    while declared is None and isinstance(cell, jax.tree_util.Partial):
        cell = cell.func
        declared = getattr(cell, "jacobian_structure", None)
    if declared is None:
        return None
    if isinstance(declared, type) or not isinstance(declared, Structure):
        raise TypeError(
            f"jacobian_structure must be an object such as elkax.Diagonal(), got {declared!r}"
        )
    if isinstance(declared, Diagonal | BlockDiagonal):
        return replace(declared, exact=True)
    return declared


def flat_structure(structure: Structure, unravel: Callable[[Array], PyTree]) -> Structure:
    """Return a structure for the flat step of a cell, for one whose derivative takes its states."""
    if not (isinstance(structure, Diagonal) and structure.derivative is not None):
        return structure
    derivative = structure.derivative

    def flat(state: Array, x: PyTree) -> Array:
        inputs, valid, _ = x
        diagonal = ravel_pytree(derivative(unravel(state), inputs))[0]
        return diagonal if valid is None else jnp.where(valid, diagonal, 1.0)

    return replace(structure, derivative=flat)


def clean(inputs: PyTree, valid: Array | None) -> PyTree:
    """Repeat the first input that exists in the padding, so that f is defined there."""
    if valid is None:
        return inputs

    def fill(leaf: Array) -> Array:
        first = leaf[jnp.argmax(valid)]
        # Without any, what stands in the padding must not reach a derivative as NaN times zero.
        return where_rows(valid, leaf, jnp.where(jnp.any(valid), first, jnp.zeros_like(first)))

    return jax.tree.map(fill, inputs)
