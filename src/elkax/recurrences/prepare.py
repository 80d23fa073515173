"""What the arguments of a recurrence must be, and its flat form."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, PyTree

from elkax.linearize import BlockDiagonal, Diagonal, Structure
from elkax.recurrences.method import Method
from elkax.recurrences.problem import where_rows
from elkax.smoothers.prepare import check_count, valid_steps

Cell = Callable[[PyTree, PyTree], PyTree]


class Arguments(NamedTuple):
    """A recurrence whose arguments have been checked.

    Attributes:
        cell: a `jax.tree_util.Partial`.
        initial: $s_0$, a pytree.
        inputs: pytree with leading axis T, maybe without arrays.
        valid: (T,), False in padding; None if there is none.
        length: T.
    """

    cell: Cell
    initial: PyTree
    inputs: PyTree
    valid: Array | None
    length: int


def prepare(
    cell: Cell,
    initial_state: PyTree,
    inputs: PyTree,
    num_timesteps: int | None,
    length: ArrayLike | None,
) -> Arguments:
    """Check a recurrence.

    Raises:
        TypeError: on states that are not of one floating-point type, a cell that is not callable
            or changes the type of the state.
        ValueError: on T = 0, lengths that differ, a cell that changes the shape of the state.
    """
    if not callable(cell):
        raise TypeError(f"cell must be a function (state, input) -> state, got {cell!r}")
    if not isinstance(cell, jax.tree_util.Partial):
        cell = jax.tree_util.Partial(cell)
    initial = jax.tree.map(jnp.asarray, initial_state)
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(initial)}
    if len(types) != 1 or not jnp.issubdtype(jnp.dtype(next(iter(types))), jnp.floating):
        raise TypeError(
            "initial_state must be a pytree of arrays of one floating-point type, got "
            f"{sorted(types) or 'no array'}"
        )
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


def check_guess(arguments: Arguments, guess: Any) -> None:
    """Raise a ValueError unless a first guess is one that `evaluate_recurrence` takes."""
    if guess is None or isinstance(guess, Method):
        return
    if isinstance(guess, str):
        if guess not in ("zeros", "inputs"):
            raise ValueError(
                f'guess must be None, "zeros", "inputs", a trajectory or a method, got {guess!r}'
            )
        return
    if jax.tree.structure(guess) != jax.tree.structure(arguments.initial):
        raise ValueError(
            f"guess must be a trajectory like the state, {jax.tree.structure(arguments.initial)}, "
            f"got {jax.tree.structure(guess)}"
        )
    for leaf, one in zip(jax.tree.leaves(guess), jax.tree.leaves(arguments.initial), strict=True):
        if jnp.shape(leaf) != (arguments.length, *one.shape):
            expected = (arguments.length, *one.shape)
            raise ValueError(f"guess must have shape {expected}, got {jnp.shape(leaf)}")


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


def flat_step(cell: Cell, unravel: Callable[[Array], PyTree]) -> Callable[[Array, PyTree], Array]:
    """Return the cell on flat states and on the inputs that `steps_of` gives."""

    def step(state: Array, x: PyTree) -> Array:
        inputs, valid, _ = x
        # In TF32, which a GPU would take by default, Newton's method does not converge.
        with jax.default_matmul_precision("highest"):
            new = ravel_pytree(cell(unravel(state), inputs))[0]
        return new if valid is None else jnp.where(valid, new, state)

    return step


def flat_structure(structure: Structure, unravel: Callable[[Array], PyTree]) -> Structure:
    """Return a structure for `flat_step` of a cell, for one whose derivative takes its states."""
    if not (isinstance(structure, Diagonal) and structure.derivative is not None):
        return structure
    derivative = structure.derivative

    def flat(state: Array, x: PyTree) -> Array:
        inputs, valid, _ = x
        diagonal = ravel_pytree(derivative(unravel(state), inputs))[0]
        return diagonal if valid is None else jnp.where(valid, diagonal, 1.0)

    return replace(structure, derivative=flat)


def steps_of(inputs: PyTree, valid: Array | None, length: int) -> PyTree:
    """Give what `flat_step` takes: inputs, which of them exist, and an axis of length T."""
    return clean(inputs, valid), valid, jnp.zeros((length, 0))


def clean(inputs: PyTree, valid: Array | None) -> PyTree:
    """Repeat the first input in the padding, so that f is defined there; it is not used."""
    if valid is None:
        return inputs

    return jax.tree.map(lambda leaf: where_rows(valid, leaf, leaf[:1]), inputs)
