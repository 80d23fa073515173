"""The linear cell."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, Recurrent
from elkax.cells.weights import input_weights, recurrent_weights
from elkax.linearize import Full


class ParamsLinear(NamedTuple):
    """Weights A (D, D), B (D, U) and bias b (D,)."""

    recurrent_weights: Float[Array, "D D"]
    input_weights: Float[Array, "D U"]
    bias: Float[Array, " D"]


class Linear(Recurrent):
    r"""The linear cell $s_t = As_{t-1} + Bx_t + b$, whose output is the state.

    A is the same at all times, and a linear recurrence would hold T copies of it: `run` takes
    steps one after the other, or iterates with the method named. `DEER` then takes one iteration.
    """

    jacobian_structure = Full()

    def initialize(self, key: Key) -> ParamsLinear:
        """Draw an orthogonal A, and B of variance 1 / U."""
        one, two = jax.random.split(key)
        return ParamsLinear(
            recurrent_weights(one, 1, self.state_dim)[0],
            input_weights(two, 1, self.state_dim, self.input_dim)[0],
            jnp.zeros(self.state_dim),
        )

    def advance(self, params: ParamsLinear, state: Array, x: Array) -> Array:
        """Return the next state."""
        return params.recurrent_weights @ state + params.input_weights @ x + params.bias
