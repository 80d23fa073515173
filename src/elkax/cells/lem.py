"""Long expressive memory."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, Recurrent
from elkax.cells.weights import affine, input_weights, recurrent_weights


class StateLEM(NamedTuple):
    """Slow and fast part of the state, z and y, (D,) each."""

    memory: Float[Array, "... D"]
    hidden: Float[Array, "... D"]


class ParamsLEM(NamedTuple):
    """Weights and biases of the two time steps, the memory z and the output y, in this order."""

    recurrent_weights: Float[Array, "4 D D"]
    input_weights: Float[Array, "4 D U"]
    bias: Float[Array, "4 D"]


@dataclass(frozen=True)
class LEM(Recurrent):
    r"""Long expressive memory, whose output is the hidden part y of its state.

    $\delta = \Delta\,\sigma(W_1y_{t-1} + V_1x_t + b_1)$, $\bar\delta = \Delta\,\sigma(W_2y_{t-1} +
    V_2x_t + b_2)$, $z_t = (1 - \delta)\odot z_{t-1} + \delta\odot\tanh(W_zy_{t-1} + V_zx_t + b_z)$,
    $y_t = (1 - \bar\delta)\odot y_{t-1} + \bar\delta\odot\tanh(W_yz_t + V_yx_t + b_y)$.

    Args:
        input_dim: U.
        state_dim: D.
        time_step: $\Delta$.

    References:
        Rusch et al. (2022), arXiv:2110.04744.
    """

    time_step: float = 1.0

    def initialize(self, key: Key) -> ParamsLEM:
        """Draw orthogonal W, V of variance 1 / U, and biases of zero."""
        one, two = jax.random.split(key)
        return ParamsLEM(
            recurrent_weights(one, 4, self.state_dim),
            input_weights(two, 4, self.state_dim, self.input_dim),
            jnp.zeros((4, self.state_dim)),
        )

    def initial_state(self, params: ParamsLEM) -> StateLEM:
        """Return zeros."""
        return StateLEM(self.zeros(params), self.zeros(params))

    def readout(self, params: ParamsLEM, state: StateLEM, x: Array) -> Array:
        """Return the hidden part of the state."""
        return state.hidden

    def advance(self, params: ParamsLEM, state: StateLEM, x: Array) -> StateLEM:
        """Return the next state."""
        memory, hidden = state
        given = affine(params.input_weights, params.bias, x)
        one, two, new = params.recurrent_weights[:3] @ hidden + given[:3]
        one, two = self.time_step * jax.nn.sigmoid(jnp.stack((one, two)))
        memory = (1 - one) * memory + one * jnp.tanh(new)
        output = jnp.tanh(params.recurrent_weights[3] @ memory + given[3])
        return StateLEM(memory, (1 - two) * hidden + two * output)
