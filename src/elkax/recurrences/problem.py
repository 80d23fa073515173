"""A recurrence with flat states, ready to be linearized."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

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

    def before(self, states: Array) -> Array:
        """Give the state before every step, (T, D), for states after them."""
        return jnp.concatenate((self.initial[None], states[:-1]))


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
