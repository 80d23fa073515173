"""Long short-term memory."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, Recurrent
from elkax.cells.weights import affine, diagonal_weights, input_weights, recurrent_weights
from elkax.linearize import BlockDiagonal


class StateLSTM(NamedTuple):
    """Memory and output of an LSTM, (D,) each."""

    cell: Float[Array, "... D"]
    hidden: Float[Array, "... D"]


class ParamsLSTM(NamedTuple):
    """Weights and biases of input gate, forget gate, candidate and output gate, in this order.

    Attributes:
        recurrent_weights: U (4, D, D), of a `DiagonalLSTM` (4, D).
        input_weights: W (4, D, U).
        bias: b (4, D).
    """

    recurrent_weights: Float[Array, "4 D *D"]
    input_weights: Float[Array, "4 D U"]
    bias: Float[Array, "4 D"]


@dataclass(frozen=True)
class _AnyLSTM(Recurrent):
    forget_bias: float = 1.0

    def initial_state(self, params: ParamsLSTM) -> StateLSTM:
        """Return zeros."""
        return StateLSTM(self.zeros(params), self.zeros(params))

    def readout(self, params: ParamsLSTM, state: StateLSTM, x: Array) -> Array:
        """Return the hidden part of the state."""
        return state.hidden

    def _first(self, recurrent: Array, key: Key) -> ParamsLSTM:
        bias = jnp.zeros((4, self.state_dim)).at[1].set(self.forget_bias)
        return ParamsLSTM(recurrent, input_weights(key, 4, self.state_dim, self.input_dim), bias)


class LSTM(_AnyLSTM):
    r"""Long short-term memory, whose output is the hidden part of its state.

    $i, f, o = \sigma(Uh_{t-1} + Wx_t + b)$, $g = \tanh(U_gh_{t-1} + W_gx_t + b_g)$,
    $c_t = f\odot c_{t-1} + i\odot g$, $h_t = o\odot\tanh c_t$.

    Args:
        input_dim: U.
        state_dim: D.
        forget_bias: first bias of the forget gate.

    References:
        Hochreiter & Schmidhuber (1997), Neural Computation 9(8); Gers et al. (2000), ibid. 12(10).
    """

    def initialize(self, key: Key) -> ParamsLSTM:
        """Draw orthogonal U, and W of variance 1 / U."""
        one, two = jax.random.split(key)
        return self._first(recurrent_weights(one, 4, self.state_dim), two)

    def advance(self, params: ParamsLSTM, state: StateLSTM, x: Array) -> StateLSTM:
        """Return the next state."""
        carried = params.recurrent_weights @ state.hidden
        return _gate(state.cell, carried + affine(params.input_weights, params.bias, x))


class DiagonalLSTM(_AnyLSTM):
    r"""An LSTM whose entries see only themselves: $u\odot h_{t-1}$ in the place of $Uh_{t-1}$.

    Its Jacobian has blocks of two, one for each pair $(c, h)$.

    Args:
        input_dim: U.
        state_dim: D.
        forget_bias: first bias of the forget gate.

    References:
        Danieli et al. (2025), arXiv:2510.21450.
    """

    jacobian_structure = BlockDiagonal(2)

    def initialize(self, key: Key) -> ParamsLSTM:
        """Draw u between -1 and 1, and W of variance 1 / U."""
        one, two = jax.random.split(key)
        return self._first(diagonal_weights(one, 4, self.state_dim), two)

    def advance(self, params: ParamsLSTM, state: StateLSTM, x: Array) -> StateLSTM:
        """Return the next state."""
        carried = params.recurrent_weights * state.hidden
        return _gate(state.cell, carried + affine(params.input_weights, params.bias, x))


def _gate(cell: Array, sums: Array) -> StateLSTM:
    i, f, g, o = sums
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return StateLSTM(cell, jax.nn.sigmoid(o) * jnp.tanh(cell))
