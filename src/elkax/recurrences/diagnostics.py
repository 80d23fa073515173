"""What a recurrence is like along a trajectory."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from elkax.linearize import Full
from elkax.recurrences.prepare import Cell, declared_structure, flat_structure, prepare
from elkax.recurrences.problem import ravel_states
from elkax.scan import Backend, lanes, run


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["size"])
@dataclass(frozen=True)
class Growth:
    r"""How a vector grows under products of matrices, as a `Scannable`.

    $v \leftarrow A_tv/|A_tv|$; the output of a step is $\log|A_tv|$. The summary of a block is its
    product, scaled to a largest entry of one so that it does not overflow.

    Args:
        size: D.
    """

    size: int

    def step(self, state: Array, x: Array) -> tuple[Array, Array]:
        """Multiply and normalise."""
        v = lanes.matvec(x, state)
        norm = jnp.sqrt(lanes.dot(v, v))
        return v / jnp.where(norm > 0, norm, 1.0), jnp.log(norm)

    def identity(self, lane_shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Return the identity matrix."""
        return lanes.identity(self.size, lane_shape, dtype)

    def combine(self, left: Array, right: Array) -> Array:
        """Join two blocks."""
        both = lanes.matmul(right, left)
        largest = jnp.max(jnp.abs(both), axis=(0, 1))
        return both / jnp.where(largest > 0, largest, 1.0)

    def absorb(self, summary: Array, x: Array) -> Array:
        """Lengthen a block."""
        return self.combine(summary, x)

    def apply(self, summary: Array, state: Array) -> Array:
        """Jump over a block."""
        return self.step(state, summary)[0]

    def sound(self, summary: Array) -> bool:
        """Every block has a summary."""
        return True


def lyapunov_exponent(
    cell: Cell,
    initial_state: PyTree,
    inputs: PyTree,
    states: PyTree,
    *,
    num_timesteps: int | None = None,
    backend: Backend | None = None,
) -> Array:
    r"""Estimate the largest Lyapunov exponent along a trajectory, per step.

    $\tfrac1T\sum_t\log(|J_tv_{t-1}|/|v_{t-1}|)$ for a random first v: negative where neighbouring
    trajectories approach each other, so that few iterations solve the recurrence; positive in
    chaos, where an error of one rounding grows by $e^{\lambda T}$.

    Args:
        cell: as `evaluate_recurrence`.
        initial_state: as there.
        inputs: as there.
        states: the trajectory, as `solution.states`.
        num_timesteps: T, where `inputs` has no array.
        backend: how to run the scan.

    Returns:
        A scalar; $-\infty$ if v has vanished. Memory O(T D^2).

    References:
        Gonzalez et al. (2025), arXiv:2508.16817.
    """
    problem, _ = prepare(cell, initial_state, inputs, num_timesteps, None).flatten()
    flat = problem.initial
    before = problem.before(ravel_states(states))
    _, jacobian = Full().linearize(problem.step, before, problem.inputs)
    first = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    first = first / jnp.linalg.norm(first)
    size = flat.shape[0]
    growth = run(
        Growth(size), first, jacobian, backend=backend, state_dim=size, recurrence="affine"
    )[1]
    return jnp.mean(growth)


def check_structure(
    cell: Cell, initial_state: PyTree, inputs: PyTree = None, *, num_timesteps: int | None = None
) -> None:
    """Compare the structure that a cell states with its Jacobian, at the first input.

    The Jacobian is evaluated at the initial state and at three random ones about it.

    Args:
        cell: as `evaluate_recurrence`, with an attribute `jacobian_structure`.
        initial_state: as there.
        inputs: as there.
        num_timesteps: T, where `inputs` has no array.

    Raises:
        ValueError: if the Jacobian has entries where the structure has none, or others than its
            `derivative` gives, or if no structure is stated.
    """
    arguments = prepare(cell, initial_state, inputs, num_timesteps, None)
    structure = declared_structure(arguments.cell)
    if structure is None:
        raise ValueError("cell has no attribute jacobian_structure to compare its Jacobian with")
    problem, unravel = arguments.flatten()
    step, flat = problem.step, problem.initial
    noise = jax.random.normal(jax.random.key(0), (3, flat.shape[0]), flat.dtype)
    points = flat + jnp.concatenate((jnp.zeros_like(noise[:1]), noise))
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], len(points), axis=0), problem.inputs)
    _, full = Full().linearize(step, points, repeated)
    structure = flat_structure(structure, unravel)
    _, kept = structure.linearize(step, points, repeated)
    units = jnp.eye(flat.shape[0], dtype=flat.dtype)
    columns = [structure.times(kept, jnp.broadcast_to(unit, points.shape)) for unit in units]
    error = jnp.abs(full - jnp.stack(columns, axis=-1))
    limit = jnp.sqrt(jnp.finfo(flat.dtype).eps) * (1.0 + jnp.max(jnp.abs(full)))
    if not bool(jnp.all(error <= limit)):
        _, row, column = jnp.unravel_index(jnp.argmax(error), error.shape)
        raise ValueError(
            f"the Jacobian of cell is not that of its jacobian_structure, {structure}: the "
            f"derivative of entry {row} of the new state in entry {column} of the old one is off "
            f"by {float(jnp.max(error)):.3g}"
        )
