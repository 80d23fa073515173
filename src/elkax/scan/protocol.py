"""What a recurrence must offer to be run by every backend."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

State = PyTree
Summary = PyTree


@runtime_checkable
class Scannable(Protocol):
    r"""A recurrence $(s_t, o_t) = \mathrm{step}(s_{t-1}, x_t)$ whose blocks can be summarised.

    A *summary* of the block $x_{i:j}$ is whatever carries a state before the block to the state
    after it. Leaves of states, summaries and inputs have their matrix axes first and any number
    of trailing lane axes, the same for all; the methods work in every lane independently. The
    recurrence itself is a pytree, of the arrays that it needs in every step.

    Laws, up to rounding:

    - `absorb(s, x)` equals `combine(s, absorb(identity, x))`;
    - `combine` is associative, with `identity` as its neutral element;
    - `apply(summary of a block, state)` is the fold of `step` over the block.
    """

    def step(self, state: State, x: PyTree) -> tuple[State, PyTree]:
        """Advance one step and give that step's output."""
        ...

    def identity(self, lanes: tuple[int, ...], dtype: DTypeLike) -> Summary:
        """Return the summary of an empty block in every lane."""
        ...

    def absorb(self, summary: Summary, x: PyTree) -> Summary:
        """Lengthen a block by one step at its end."""
        ...

    def combine(self, left: Summary, right: Summary) -> Summary:
        """Join the summaries of two neighbouring blocks, `left` being run first."""
        ...

    def apply(self, summary: Summary, state: State) -> State:
        """Jump from the state before a block to the state after it."""
        ...

    def sound(self, summary: Summary) -> Array | bool:
        """Tell, in every lane, whether the summary exists.

        A recurrence may be defined where the summary of a block is not (a Kalman filter whose
        innovation covariance is singular for an exactly known block start). Backends then give
        way to `Sequential`. The constant `True` says that every summary exists.
        """
        ...


@runtime_checkable
class Centred(Scannable, Protocol):
    """A recurrence whose summaries are written about a state, near which they round least."""

    def locate(self, summary: Summary) -> Array:
        """Suggest where the state before a block was, from what its summary holds."""
        ...

    def recenter(self, summary: Summary, origin: Array) -> Summary:
        """Write the same summary about another state."""
        ...


@runtime_checkable
class Determined(Scannable, Protocol):
    """A recurrence whose outputs may depend on which of several equal states a jump gives.

    As coordinates do that a factor of a covariance defines: it is unique where that is regular.
    """

    def determined(self, state: State) -> Array | bool:
        """Tell, in every lane, whether a jump gives the very state that the steps give."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A way to run a `Scannable` over a sequence."""

    def __call__(
        self, scannable: Scannable, state: State, xs: PyTree, *, reverse: bool = False
    ) -> tuple[State, PyTree]:
        """Run the recurrence, as `jax.lax.scan` does.

        Args:
            scannable: the recurrence.
            state: state before the first step, without lanes.
            xs: inputs, every leaf with leading axis T >= 1.
            reverse: run from the last input to the first.

        Returns:
            The state after the last step run, and the outputs with leading axis T.
        """
        ...


def step(scannable: Scannable, state: State, x: PyTree) -> tuple[State, PyTree]:
    """Advance one step; traced once for all loops that run it on the same shapes."""
    return _step(scannable, state, x, kind=type(scannable))


def absorb(scannable: Scannable, summary: Summary, x: PyTree) -> Summary:
    """Lengthen a block by one step; traced once as `step` is."""
    return _absorb(scannable, summary, x, kind=type(scannable))


# The class is named because JAX takes dataclasses of equal fields for the same structure.
@partial(jax.jit, inline=True, static_argnames="kind")
def _step(scannable: Scannable, state: State, x: PyTree, *, kind: type) -> tuple[State, PyTree]:
    del kind
    return scannable.step(state, x)


@partial(jax.jit, inline=True, static_argnames="kind")
def _absorb(scannable: Scannable, summary: Summary, x: PyTree, *, kind: type) -> Summary:
    del kind
    return scannable.absorb(summary, x)


def sequence_length(xs: PyTree) -> int:
    """Return the common leading length of all leaves.

    Raises:
        ValueError: if there is no leaf, lengths differ, or the length is zero.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(xs)]
    lengths = {shape[0] if shape else None for shape in shapes}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"xs must have leaves of one common leading length T, got shapes {shapes}")
    length = shapes[0][0]
    if length == 0:
        raise ValueError("xs must hold at least one time step, got T = 0")
    return length


def state_dtype(state: Any) -> DTypeLike:
    """Return the dtype that the floating-point leaves of a state share."""
    return jax.numpy.result_type(*jax.tree.leaves(state))
