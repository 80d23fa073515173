"""Minimal gated cells, whose gates see inputs alone."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, OneRecurrence
from elkax.cells.weights import affine, input_weights


class ParamsMinGRU(NamedTuple):
    """Weights (2, D, U) and biases (2, D) of update gate and candidate, in this order."""

    input_weights: Float[Array, "2 D U"]
    bias: Float[Array, "2 D"]


class MinGRU(OneRecurrence):
    r"""The minimal GRU, whose output is the state.

    $z = \sigma(W_zx_t + b_z)$, $h_t = (1 - z)\odot h_{t-1} + z\odot(W_hx_t + b_h)$.

    References:
        Feng et al. (2024), arXiv:2410.01201.
    """

    def initialize(self, key: Key) -> ParamsMinGRU:
        """Draw weights of variance 1 / U, and biases of zero."""
        return ParamsMinGRU(
            input_weights(key, 2, self.state_dim, self.input_dim), jnp.zeros((2, self.state_dim))
        )

    def coefficients(self, params: ParamsMinGRU, x: Array) -> tuple[Array, Array]:
        """Return decay and increment."""
        gate, candidate = affine(params.input_weights, params.bias, x)
        return jax.nn.sigmoid(-gate), jax.nn.sigmoid(gate) * candidate


class ParamsMinLSTM(NamedTuple):
    """Weights (3, D, U) and biases (3, D) of forget gate, input gate, candidate, in this order."""

    input_weights: Float[Array, "3 D U"]
    bias: Float[Array, "3 D"]


@dataclass(frozen=True)
class MinLSTM(OneRecurrence):
    r"""The minimal LSTM, whose output is the state.

    $f, i = \sigma(W_{f,i}x_t + b_{f,i})$, and with $g = f / (f + i)$
    $h_t = g\odot h_{t-1} + (1 - g)\odot(W_hx_t + b_h)$.

    Args:
        input_dim: U.
        state_dim: D.
        forget_bias: first $b_f$.

    References:
        Feng et al. (2024), arXiv:2410.01201.
    """

    forget_bias: float = 1.0

    def initialize(self, key: Key) -> ParamsMinLSTM:
        """Draw weights of variance 1 / U."""
        return ParamsMinLSTM(
            input_weights(key, 3, self.state_dim, self.input_dim),
            jnp.zeros((3, self.state_dim)).at[0].set(self.forget_bias),
        )

    def coefficients(self, params: ParamsMinLSTM, x: Array) -> tuple[Array, Array]:
        """Return decay and increment."""
        forget, new, candidate = affine(params.input_weights, params.bias, x)
        # By logarithms, so that two closed gates do not make it 0 / 0.
        share = jax.nn.log_sigmoid(forget) - jax.nn.log_sigmoid(new)
        return jax.nn.sigmoid(share), jax.nn.sigmoid(-share) * candidate
