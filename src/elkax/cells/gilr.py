"""Gated impulse linear recurrences, and the LSTM that has one for a surrogate."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, OneRecurrence, Sized
from elkax.cells.timeline import Timeline
from elkax.cells.weights import affine, input_weights, products


class ParamsGILR(NamedTuple):
    """Weights (2, D, U) and biases (2, D) of gate and impulse, in this order."""

    input_weights: Float[Array, "2 D U"]
    bias: Float[Array, "2 D"]


@dataclass(frozen=True)
class GILR(OneRecurrence):
    r"""The gated impulse linear recurrence, whose output is the state.

    $g = \sigma(Ux_t + b_g)$, $i = \tanh(Vx_t + b_i)$, $h_t = g\odot h_{t-1} + (1 - g)\odot i$.

    Args:
        input_dim: U.
        state_dim: D.
        forget_bias: first $b_g$.

    References:
        Martin & Cundy (2018), arXiv:1709.04057.
    """

    forget_bias: float = 1.0

    def initialize(self, key: Key) -> ParamsGILR:
        """Draw weights of variance 1 / U."""
        return ParamsGILR(
            input_weights(key, 2, self.state_dim, self.input_dim),
            jnp.zeros((2, self.state_dim)).at[0].set(self.forget_bias),
        )

    def coefficients(self, params: ParamsGILR, x: Array) -> tuple[Array, Array]:
        """Return decay and increment."""
        gate, impulse = affine(params.input_weights, params.bias, x)
        # 1 - g without cancellation.
        return jax.nn.sigmoid(gate), jax.nn.sigmoid(-gate) * jnp.tanh(impulse)


class StateGILRLSTM(NamedTuple):
    """Surrogate and memory of a GILR-LSTM, (D,) each."""

    surrogate: Float[Array, "... D"]
    cell: Float[Array, "... D"]


class ParamsGILRLSTM(NamedTuple):
    """Parameters of a GILR-LSTM.

    Attributes:
        surrogate: those of the `GILR`.
        recurrent_weights: U (4, D, D), of the surrogate, for input gate, forget gate, candidate and
            output gate, in this order.
        input_weights: V (4, D, U).
        bias: b (4, D).
    """

    surrogate: ParamsGILR
    recurrent_weights: Float[Array, "4 D D"]
    input_weights: Float[Array, "4 D U"]
    bias: Float[Array, "4 D"]


@dataclass(frozen=True)
class GILRLSTM(Sized):
    r"""An LSTM whose gates see a `GILR` of the inputs in the place of its own last output.

    $\tilde h$ is a GILR of x; $i, f, o = \sigma(U\tilde h_{t-1} + Vx_t + b)$,
    $z = \tanh(U_z\tilde h_{t-1} + V_zx_t + b_z)$, $c_t = f\odot c_{t-1} + i\odot z$, and the output
    is $o\odot c_t$.

    Args:
        input_dim: U.
        state_dim: D.
        forget_bias: first biases of the forget gates of both.

    References:
        Martin & Cundy (2018), arXiv:1709.04057.
    """

    forget_bias: float = 1.0

    @property
    def _surrogate(self) -> GILR:
        return GILR(self.input_dim, self.state_dim, self.forget_bias)

    def initialize(self, key: Key) -> ParamsGILRLSTM:
        """Draw weights of variances 1 / D and 1 / U."""
        one, two, three = jax.random.split(key, 3)
        return ParamsGILRLSTM(
            self._surrogate.initialize(one),
            input_weights(two, 4, self.state_dim, self.state_dim),
            input_weights(three, 4, self.state_dim, self.input_dim),
            jnp.zeros((4, self.state_dim)).at[1].set(self.forget_bias),
        )

    def initial_state(self, params: ParamsGILRLSTM) -> StateGILRLSTM:
        """Return zeros."""
        return StateGILRLSTM(self.zeros(params), self.zeros(params))

    def _gates(self, params: ParamsGILRLSTM, surrogate: Array, x: Array) -> tuple:
        """Return decay and increment of the memory and the output gate."""
        given = affine(params.input_weights, params.bias, x)
        i, f, z, o = products(params.recurrent_weights, surrogate) + given
        return jax.nn.sigmoid(f), jax.nn.sigmoid(i) * jnp.tanh(z), jax.nn.sigmoid(o)

    def step(
        self, params: ParamsGILRLSTM, state: StateGILRLSTM, x: Array
    ) -> tuple[StateGILRLSTM, Array]:
        """Take one step; see `Cell`."""
        forget, new, gate = self._gates(params, state.surrogate, x)
        cell = forget * state.cell + new
        surrogate, _ = self._surrogate.step(params.surrogate, state.surrogate, x)
        return StateGILRLSTM(surrogate, cell), gate * cell

    def evaluate(
        self, params: ParamsGILRLSTM, inputs: Array, start: StateGILRLSTM, timeline: Timeline
    ) -> tuple[StateGILRLSTM, Array]:
        """Take all steps by two recurrences; see `LinearCell`."""
        surrogate, _ = self._surrogate.evaluate(params.surrogate, inputs, start.surrogate, timeline)
        before = timeline.before(surrogate, start.surrogate)
        forget, new, gate = self._gates(params, before, inputs)
        cell = timeline.recurrence(forget, new, start.cell)
        return StateGILRLSTM(surrogate, cell), gate * cell
