"""Running a cell over sequences."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from elkax.cells.nonlinear import evaluate
from elkax.cells.protocol import Cell, LinearCell, ReadCell, check_params
from elkax.cells.timeline import Timeline
from elkax.recurrences import Method, RecurrenceInfo
from elkax.recurrences.solution import if_finite
from elkax.scan import Sequential
from elkax.scan.linear_recurrence import check_resets, column


class CellRun(NamedTuple):
    """What a cell made of its inputs; with a leading axis B for a batch.

    Attributes:
        outputs: of all steps, leading axis T; zero in padding.
        states: after all steps, leading axis T; in padding the state stays.
        final_state: after the last step taken.
        info: how the evaluation ended, a `RecurrenceInfo`. That of a linear cell is converged
            without an iteration if all its states are finite.
    """

    outputs: PyTree
    states: PyTree
    final_state: PyTree
    info: RecurrenceInfo


def run(
    cell: Cell,
    params: Any,
    inputs: ArrayLike,
    initial_state: PyTree = None,
    resets: ArrayLike | None = None,
    length: ArrayLike | None = None,
    reverse: bool = False,
    method: Method | Sequential | None = None,
) -> CellRun:
    r"""Evaluate $(s_t, y_t) = \mathrm{step}(s_{t-1}, x_t)$ for all steps of one or more sequences.

    Linear cells take one or two linear recurrences, others `evaluate_recurrence`. Differentiable in
    parameters, inputs and initial state, in both modes.

    Args:
        cell: a cell of `elkax.cells`, or any `Cell`.
        params: its parameters.
        inputs: (T, U), or (B, T, U) for a batch; computed with in the type of the parameters.
        initial_state: $s_0$, one for all sequences or with a leading axis B; the cell's if None.
        resets: bools (T,) or (B, T), whether a step starts from $s_0$, in the order of processing:
            sequences packed one behind the other.
        length: number of steps that exist, 0 to T, the rest being padding that is not looked at; an
            integer, or (B,).
        reverse: run from the last step that exists to the first.
        method: as in `evaluate_recurrence`; linear cells have no use for it.

    Returns:
        Outputs, states, final state, and how the evaluation ended.

    Raises:
        TypeError: on a cell that is none, types that do not fit.
        ValueError: on shapes that do not fit, T = 0, inputs that are not finite where they exist.
    """
    if isinstance(cell, type) or not isinstance(cell, Cell):
        raise TypeError(f"cell must be an object such as elkax.cells.GRU(3, 64), got {cell!r}")
    if method is not None and not isinstance(method, Method | Sequential):
        raise TypeError(f"method must be an object such as elkax.DEER(), got {method!r}")
    inputs = jnp.asarray(inputs)
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(f"inputs must be floating-point numbers, got dtype {inputs.dtype}")
    if inputs.ndim not in (2, 3) or inputs.shape[-1] != cell.input_dim or 0 in inputs.shape[:-1]:
        raise ValueError(
            f"inputs must be (T, U) or (B, T, U) with U = {cell.input_dim}, T and B at least 1, "
            f"got {inputs.shape}"
        )
    lead = inputs.shape[:-2]
    start = _start(cell.initial_state(params), initial_state, lead)
    resets = check_resets(resets, inputs.shape[:-1])
    length = _check_length(length, lead, inputs.shape[-2])
    _check_values(inputs, length)
    types = [leaf.dtype for leaf in jax.tree.leaves(start)]
    numbers = [dtype for dtype in types if jnp.issubdtype(dtype, jnp.inexact)]
    if numbers:
        inputs = inputs.astype(jnp.finfo(jnp.result_type(*numbers)).dtype)
    return _run(
        params, inputs, start, resets, length, cell=cell, reverse=bool(reverse), method=method
    )


@partial(jax.jit, static_argnames=("cell", "reverse", "method"))
def _run(params: Any, inputs: Array, *arguments: Any, **options: Any) -> CellRun:
    """Run a cell over one sequence or a batch of them."""
    check_params(options["cell"], params)
    one = partial(_one, params, **options)
    return (one if inputs.ndim == 2 else jax.vmap(one))(inputs, *arguments)


def _one(
    params: Any,
    inputs: Array,
    start: PyTree,
    resets: Array | None,
    length: Array | None,
    *,
    cell: Cell,
    reverse: bool,
    method: Method | Sequential | None,
) -> CellRun:
    """Run a cell over one sequence."""
    timeline = Timeline(len(inputs), resets, length, reverse)
    valid = timeline.valid
    if valid is not None:
        inputs = jnp.where(valid[:, None], inputs, 0)
    with jax.default_matmul_precision("highest"):
        if isinstance(cell, LinearCell):
            states, outputs = cell.evaluate(params, inputs, start, timeline)
            info = if_finite(states, timeline.count, reverse=reverse)
        else:
            states, info = evaluate(cell, params, inputs, start, timeline, method)
            if isinstance(cell, ReadCell):
                outputs = jax.vmap(partial(cell.readout, params))(states, inputs)
            else:
                before = timeline.before(states, start)
                outputs = jax.vmap(partial(cell.step, params))(before, inputs)[1]
    if valid is not None:
        outputs = jax.tree.map(lambda leaf: jnp.where(column(valid, leaf), leaf, 0), outputs)
    final = jax.tree.map(lambda leaf: leaf[0 if reverse else -1], states)
    return CellRun(outputs, states, final, info)


def _start(own: PyTree, given: PyTree, lead: tuple[int, ...]) -> PyTree:
    """Return the state before the first step, of every sequence."""
    own = jax.tree.map(jnp.asarray, own)
    if given is None:
        given = own
    if jax.tree.structure(given) != jax.tree.structure(own):
        raise ValueError(
            f"initial_state must be like that of the cell, {jax.tree.structure(own)}, got "
            f"{jax.tree.structure(given)}"
        )

    def fit(leaf: ArrayLike, like: Array) -> Array:
        leaf = jnp.asarray(leaf)
        if leaf.shape not in (like.shape, lead + like.shape):
            expected = f"{like.shape}" + (f" or {lead + like.shape}" if lead else "")
            raise ValueError(f"initial_state must have shape {expected}, got {leaf.shape}")
        if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(like):
            raise TypeError(f"initial_state must be of type {like.dtype}, got {leaf.dtype}")
        return jnp.broadcast_to(leaf.astype(like.dtype), lead + like.shape)

    return jax.tree.map(fit, given, own)


def _check_length(length: ArrayLike | None, lead: tuple[int, ...], count: int) -> Array | None:
    if length is None:
        return None
    if not isinstance(length, jax.core.Tracer):
        length = np.asarray(length)
    if not jnp.issubdtype(length.dtype, jnp.integer):
        raise TypeError(f"length must be of integers, got dtype {length.dtype}")
    if length.shape != lead:
        expected = f"(B,) = {lead}" if lead else "one integer"
        raise ValueError(f"length must be {expected}, got shape {length.shape}")
    if isinstance(length, np.ndarray) and not np.all((length >= 0) & (length <= count)):
        raise ValueError(f"length must lie in 0, ..., T = {count}, got {length}")
    return jnp.asarray(length)


def _check_values(inputs: Array, length: Array | None) -> None:
    """Name the first input that exists and is not finite, where inputs are known."""
    if any(isinstance(x, jax.core.Tracer) for x in (inputs, length)):
        return
    wrong = ~np.isfinite(np.asarray(inputs)).all(-1)
    if length is not None:
        wrong &= np.arange(inputs.shape[-2]) < np.asarray(length)[..., None]
    if wrong.any():
        *sequence, step = np.argwhere(wrong)[0]
        where = f"sequence {sequence[0]}, step {step}" if sequence else f"step {step}"
        value = np.asarray(inputs)[(*sequence, step)]
        raise ValueError(f"inputs must be finite, got {value[~np.isfinite(value)][0]} in {where}")
