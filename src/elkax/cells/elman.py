"""Elman's cell."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, Recurrent
from elkax.cells.weights import input_weights, recurrent_weights


class ParamsElman(NamedTuple):
    """Weights U (D, D), W (D, U) and bias b (D,)."""

    recurrent_weights: Float[Array, "D D"]
    input_weights: Float[Array, "D U"]
    bias: Float[Array, " D"]


class Elman(Recurrent):
    r"""Elman's cell $h_t = \tanh(Uh_{t-1} + Wx_t + b)$, whose output is the state.

    References:
        Elman (1990), Cognitive Science 14(2).
    """

    def initialize(self, key: Key) -> ParamsElman:
        """Draw an orthogonal U, and W of variance 1 / U."""
        one, two = jax.random.split(key)
        return ParamsElman(
            recurrent_weights(one, 1, self.state_dim)[0],
            input_weights(two, 1, self.state_dim, self.input_dim)[0],
            jnp.zeros(self.state_dim),
        )

    def advance(self, params: ParamsElman, state: Array, x: Array) -> Array:
        """Return the next state."""
        return jnp.tanh(params.recurrent_weights @ state + params.input_weights @ x + params.bias)
