"""What a recurrent cell offers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree, UInt32

from elkax.cells.timeline import Timeline

Key = PRNGKeyArray | UInt32[Array, "2"]
Params = Any


@runtime_checkable
class Cell(Protocol):
    """A recurrent cell: sizes and options, hashable; its parameters are data.

    A cell whose Jacobian has a structure says so by an attribute `jacobian_structure`; blocks of a
    `BlockDiagonal` then hold one entry of every leaf of the state.

    Attributes:
        input_dim: U, perhaps 0.
    """

    input_dim: int

    def initialize(self, key: Key) -> Params:
        """Draw parameters, a NamedTuple of arrays."""
        ...

    def initial_state(self, params: Params) -> PyTree:
        """Return the state before the first step."""
        ...

    def step(self, params: Params, state: PyTree, x: Array) -> tuple[PyTree, PyTree]:
        """Return the next state and the output, for an input (U,); this defines the cell."""
        ...


@runtime_checkable
class ReadCell(Cell, Protocol):
    """A cell whose output is computed from the new state, and perhaps the input."""

    def readout(self, params: Params, state: PyTree, x: Array) -> PyTree:
        """Return the output of a step."""
        ...


@runtime_checkable
class LinearCell(Cell, Protocol):
    """A cell whose state is found by linear recurrences, whose coefficients inputs determine."""

    def evaluate(
        self, params: Params, inputs: Array, start: PyTree, timeline: Timeline
    ) -> tuple[PyTree, PyTree]:
        """Return states and outputs of all steps; outputs in padding may be anything.

        Args:
            params: parameters.
            inputs: (T, U), zero in padding.
            start: state before the first step and after a reset.
            timeline: the order of the steps.
        """
        ...


@dataclass(frozen=True)
class Sized:
    """Sizes of a cell.

    Args:
        input_dim: U, numbers in an input, perhaps 0.
        state_dim: D, numbers in the state, or in every part of it.
    """

    input_dim: int
    state_dim: int

    def __post_init__(self) -> None:
        """Reject sizes that cannot be."""
        for name, value, least in (
            ("input_dim", self.input_dim, 0),
            ("state_dim", self.state_dim, 1),
        ):
            check_size(name, value, least)

    def zeros(self, params: Params) -> Array:
        """Return zero (D,) in the type of the parameters."""
        return jnp.zeros(self.state_dim, jnp.result_type(*jax.tree.leaves(params)))

    def initial_state(self, params: Params) -> PyTree:
        """Return zero."""
        return self.zeros(params)


class Recurrent(Sized):
    """What nonlinear cells have in common that have `advance`, and whose output is the state."""

    advance: Callable[..., PyTree]

    def readout(self, params: Params, state: PyTree, x: Array) -> PyTree:
        """Return the state."""
        return state

    def step(self, params: Params, state: PyTree, x: Array) -> tuple[PyTree, PyTree]:
        """Take one step; see `Cell`."""
        state = self.advance(params, state, x)
        return state, self.readout(params, state, x)


class OneRecurrence(Sized):
    r"""What cells have in common with $s_t = a_ts_{t-1} + b_t$, whose output is the state.

    `coefficients` gives $a_t$ and $b_t$ (..., D) for inputs (..., U).
    """

    coefficients: Callable[..., tuple[Array, Array]]

    def readout(self, params: Params, state: Array, x: Array) -> Array:
        """Return the state."""
        return state

    def step(self, params: Params, state: Array, x: Array) -> tuple[Array, Array]:
        """Take one step; see `Cell`."""
        decay, increment = self.coefficients(params, x)
        state = decay * state + increment
        return state, self.readout(params, state, x)

    def evaluate(
        self, params: Params, inputs: Array, start: Array, timeline: Timeline
    ) -> tuple[Array, Array]:
        """Take all steps by one recurrence; see `LinearCell`."""
        states = timeline.recurrence(*self.coefficients(params, inputs), start)
        return states, self.readout(params, states, inputs)


def check_size(name: str, value: int, least: int) -> None:
    """Raise ValueError unless a size is an integer that is not too small."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
