"""Quasi-recurrent networks."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, Sized, check_size
from elkax.cells.timeline import Timeline
from elkax.cells.weights import biases, input_weights


class StateQRNN(NamedTuple):
    """Memory c (D,), and the last k - 1 inputs (k - 1, U), the latest first."""

    cell: Float[Array, "... D"]
    window: Float[Array, "... k U"]


class ParamsQRNN(NamedTuple):
    """Weights of a QRNN.

    Attributes:
        input_weights: (k, 3, D, U) of candidate, forget gate and output gate, in this order;
            entry j along the first axis is for the input j steps ago.
        bias: (3, D).
    """

    input_weights: Float[Array, "k 3 D U"]
    bias: Float[Array, "3 D"]


@dataclass(frozen=True)
class QRNN(Sized):
    r"""The quasi-recurrent network with fo-pooling.

    $z = \tanh(b_z + \sum_{j<k}W_z^jx_{t-j})$,
    $f, o = \sigma(b_{f,o} + \sum_{j<k}W_{f,o}^jx_{t-j})$, $c_t = f\odot c_{t-1} + (1 - f)\odot z$,
    and the output is $o\odot c_t$.

    Args:
        input_dim: U.
        state_dim: D.
        width: k, at least 1.
        forget_bias: first $b_f$.

    References:
        Bradbury et al. (2017), arXiv:1611.01576.
    """

    width: int = 2
    forget_bias: float = 1.0

    def __post_init__(self) -> None:
        """Reject sizes that cannot be."""
        super().__post_init__()
        check_size("width", self.width, 1)

    def initialize(self, key: Key) -> ParamsQRNN:
        """Draw weights of variance 1 / (k U)."""
        weights = input_weights(key, 3, self.state_dim, self.width * self.input_dim)
        taps = weights.reshape((3, self.state_dim, self.width, self.input_dim))
        return ParamsQRNN(
            jnp.moveaxis(taps, 2, 0),
            jnp.zeros((3, self.state_dim)).at[1].set(self.forget_bias),
        )

    def initial_state(self, params: ParamsQRNN) -> StateQRNN:
        """Return a memory of zero, and inputs of zero."""
        zero = self.zeros(params)
        return StateQRNN(zero, jnp.zeros((self.width - 1, self.input_dim), zero.dtype))

    def _gates(self, params: ParamsQRNN, window: Array) -> tuple[Array, Array, Array]:
        """Return decay, increment and output gate for k inputs (..., k, U), the latest first."""
        sums = jnp.einsum("kgdu,...ku->g...d", params.input_weights, window)
        candidate, forget, gate = sums + biases(params.bias, window[..., 0, :])
        increment = jax.nn.sigmoid(-forget) * jnp.tanh(candidate)
        return jax.nn.sigmoid(forget), increment, jax.nn.sigmoid(gate)

    def step(self, params: ParamsQRNN, state: StateQRNN, x: Array) -> tuple[StateQRNN, Array]:
        """Take one step; see `Cell`."""
        window = jnp.concatenate((x[None], state.window))
        forget, new, gate = self._gates(params, window)
        cell = forget * state.cell + new
        return StateQRNN(cell, window[:-1]), gate * cell

    def evaluate(
        self, params: ParamsQRNN, inputs: Array, start: StateQRNN, timeline: Timeline
    ) -> tuple[StateQRNN, Array]:
        """Take all steps by one recurrence; see `LinearCell`."""
        taps = [inputs]
        for first in start.window:
            taps.append(timeline.before(taps[-1], first))
        window = jnp.stack(taps, 1)
        forget, new, gate = self._gates(params, window)
        cell = timeline.recurrence(forget, new, start.cell)
        return StateQRNN(cell, timeline.hold(window[:, :-1], start.window)), gate * cell
