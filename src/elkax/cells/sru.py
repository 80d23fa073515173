"""The simple recurrent unit."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, OneRecurrence
from elkax.cells.weights import affine, input_weights, products


class ParamsSRU(NamedTuple):
    """Parameters of an SRU.

    Attributes:
        candidate_weights: W (D, U).
        gate_weights: (2, D, U) of forget gate and highway gate, in this order.
        bias: (2, D) of these.
        skip_weights: P (D, U); None where U = D.
    """

    candidate_weights: Float[Array, "D U"]
    gate_weights: Float[Array, "2 D U"]
    bias: Float[Array, "2 D"]
    skip_weights: Float[Array, "D U"] | None


@dataclass(frozen=True)
class SRU(OneRecurrence):
    r"""The simple recurrent unit in the form whose gates see inputs alone.

    $f, r = \sigma(W_{f,r}x_t + b_{f,r})$, $c_t = f\odot c_{t-1} + (1 - f)\odot Wx_t$, and the
    output is $r\odot c_t + (1 - r)\odot x_t$, with $Px_t$ for the last $x_t$ unless U = D.

    Args:
        input_dim: U.
        state_dim: D.
        forget_bias: first $b_f$.

    References:
        Lei & Zhang (2017), arXiv:1709.02755v1, without its optional nonlinearity; Martin & Cundy
        (2018), arXiv:1709.04057.
    """

    forget_bias: float = 1.0

    def initialize(self, key: Key) -> ParamsSRU:
        """Draw weights of variance 1 / U."""
        wide = self.input_dim != self.state_dim
        weights = input_weights(key, 4, self.state_dim, self.input_dim)
        return ParamsSRU(
            weights[0],
            weights[1:3],
            jnp.zeros((2, self.state_dim)).at[0].set(self.forget_bias),
            weights[3] if wide else None,
        )

    def coefficients(self, params: ParamsSRU, x: Array) -> tuple[Array, Array]:
        """Return decay and increment."""
        (forget,) = affine(params.gate_weights[:1], params.bias[:1], x)
        (candidate,) = products(params.candidate_weights[None], x)
        return jax.nn.sigmoid(forget), jax.nn.sigmoid(-forget) * candidate

    def readout(self, params: ParamsSRU, state: Array, x: Array) -> Array:
        """Blend state and input."""
        (gate,) = affine(params.gate_weights[1:], params.bias[1:], x)
        skip = x if params.skip_weights is None else products(params.skip_weights[None], x)[0]
        return jax.nn.sigmoid(gate) * state + jax.nn.sigmoid(-gate) * skip
