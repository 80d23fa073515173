"""A recurrence with flat states, ready to be linearized."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, PyTree

from elkax.linearize.structure import Step


class Problem(NamedTuple):
    r"""A recurrence $s_t = f(s_{t-1}, x_t)$, t = 1, ..., T, on flat states.

    Attributes:
        step: f.
        initial: $s_0$ (D,).
        inputs: $x$, a pytree with leading axis T.
    """

    step: Step
    initial: Array
    inputs: PyTree

    @property
    def length(self) -> int:
        """Return T."""
        return jax.tree.leaves(self.inputs)[0].shape[0]

    def as_function(self) -> tuple[Callable[..., "Problem"], tuple[list, Array, PyTree]]:
        """Return the recurrence as a function of all that it has derivatives in, and that.

        These are what f closes over, $s_0$ and the inputs.
        """
        first = jax.tree.map(lambda leaf: leaf[0], self.inputs)
        # Not `jax.closure_convert`, which leaves what is not real where it is closed over.
        traced = jax.make_jaxpr(self.step)(self.initial, first)

        def step(state: Array, x: PyTree, *closed: Any) -> Array:
            function = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, closed))
            return function(state, *jax.tree.leaves(x))[0]

        def recurrence(closed: list, initial: Array, inputs: PyTree) -> Problem:
            return Problem(lambda state, x: step(state, x, *closed), initial, inputs)

        return recurrence, (list(traced.consts), self.initial, self.inputs)

    def before(self, states: Array) -> Array:
        """Give the state before every step, (T, D), for states after them."""
        return jnp.concatenate((self.initial[None], states[:-1]))

    def values(self, states: Array) -> Array:
        """Evaluate every step from the state before it, (T, D)."""
        return jax.vmap(self.step)(self.before(states), self.inputs)

    def run(self) -> Array:
        """Evaluate one step after the other, (T, D)."""

        def step(state: Array, x: PyTree) -> tuple[Array, Array]:
            state = self.step(state, x)
            return state, state

        return jax.lax.scan(step, self.initial, self.inputs)[1]


class Fit(NamedTuple):
    """How well states satisfy a recurrence.

    Attributes:
        good: (T,) whether the residual is within tolerance.
        relative: (T,) residual, relative to the largest entry of a state up to that time.
        scale: (T,) that entry.
    """

    good: Array
    relative: Array
    scale: Array


def fit(values: Array, states: Array, known: Array, tolerance: ArrayLike) -> Fit:
    """Compare states with f at the states before them.

    Args:
        values: f (T, D).
        states: (T, D).
        known: largest entry of a state before the first.
        tolerance: largest relative residual.
    """
    error = sizes(values - states)
    scale = jnp.maximum(jax.lax.cummax(sizes(values)), known)
    good = (error <= tolerance * scale) & jnp.isfinite(error)
    return Fit(good, jnp.where(error == 0, 0.0, error / scale), scale)


def leading(flags: Array) -> Array:
    """Count the flags that hold before the first that does not."""
    return jnp.sum(jnp.cumprod(flags.astype(int)))


def where_rows(keep: Array, x: Array, other: ArrayLike = 0.0) -> Array:
    """Take entries along the leading axis where `keep` (T,) holds, else those of `other`."""
    return jnp.where(keep.reshape((-1,) + (1,) * (x.ndim - 1)), x, other)


def sizes(x: Array) -> Array:
    """Return the largest absolute value of every row, NaN if one is not a number."""
    return jnp.max(jnp.abs(x), axis=-1)


def shift(x: Array) -> Array:
    """Return what stands one step earlier, zero at first."""
    return jnp.concatenate((jnp.zeros_like(x[:1]), x[:-1]))


def shift_back(x: Array) -> Array:
    """Return what stands one step later, zero at last."""
    return jnp.concatenate((x[1:], jnp.zeros_like(x[:1])))


def ravel_states(states: PyTree) -> Array:
    """Flatten the states of a trajectory, (T, D)."""
    return jax.vmap(lambda state: ravel_pytree(state)[0])(states)
