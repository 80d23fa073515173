"""Gated recurrent units."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, Recurrent
from elkax.cells.weights import affine, diagonal_weights, input_weights, recurrent_weights
from elkax.linearize import Diagonal


class ParamsGRU(NamedTuple):
    """Weights and biases of reset gate, update gate and candidate, in this order.

    Attributes:
        recurrent_weights: U (3, D, D).
        input_weights: W (3, D, U).
        bias: b (3, D).
        recurrent_bias: c (D,), added to the candidate's product before the reset; None where the
            reset comes first.
    """

    recurrent_weights: Float[Array, "3 D D"]
    input_weights: Float[Array, "3 D U"]
    bias: Float[Array, "3 D"]
    recurrent_bias: Float[Array, " D"] | None


@dataclass(frozen=True)
class GRU(Recurrent):
    r"""The gated recurrent unit, whose output is the state.

    $r, z = \sigma(U_{r,z}h_{t-1} + W_{r,z}x_t + b_{r,z})$, $h_t = (1 - z)\odot n + z\odot h_{t-1}$
    with $n = \tanh(W_nx_t + b_n + r\odot(U_nh_{t-1} + c))$ where the reset comes after the product,
    as in cuDNN, PyTorch, Keras and Flax, and $n = \tanh(W_nx_t + b_n + U_n(r\odot h_{t-1}))$ where
    it comes before, as in the paper.

    Args:
        input_dim: U.
        state_dim: D.
        reset: "after" or "before" the product.

    References:
        Cho et al. (2014), arXiv:1406.1078.
    """

    reset: str = "after"

    def __post_init__(self) -> None:
        """Reject what cannot be."""
        super().__post_init__()
        if self.reset not in ("after", "before"):
            raise ValueError(f'reset must be "after" or "before", got {self.reset!r}')

    def initialize(self, key: Key) -> ParamsGRU:
        """Draw orthogonal U, W of variance 1 / U, and biases of zero."""
        one, two = jax.random.split(key)
        return ParamsGRU(
            recurrent_weights(one, 3, self.state_dim),
            input_weights(two, 3, self.state_dim, self.input_dim),
            jnp.zeros((3, self.state_dim)),
            jnp.zeros(self.state_dim) if self.reset == "after" else None,
        )

    def advance(self, params: ParamsGRU, state: Array, x: Array) -> Array:
        """Return the next state."""
        weights, given = params.recurrent_weights, affine(params.input_weights, params.bias, x)
        if params.recurrent_bias is not None:
            carried = weights @ state
            r, z = jax.nn.sigmoid(carried[:2] + given[:2])
            candidate = jnp.tanh(given[2] + r * (carried[2] + params.recurrent_bias))
        else:
            r, z = jax.nn.sigmoid(weights[:2] @ state + given[:2])
            candidate = jnp.tanh(given[2] + weights[2] @ (r * state))
        return (1 - z) * candidate + z * state


class ParamsDiagonalGRU(NamedTuple):
    """Those of a `GRU` with diagonal recurrent weights: u (3, D), W (3, D, U), b (3, D)."""

    recurrent_weights: Float[Array, "3 D"]
    input_weights: Float[Array, "3 D U"]
    bias: Float[Array, "3 D"]


class DiagonalGRU(Recurrent):
    r"""A GRU whose entries see only themselves: quasi-DEER is Newton's method for it.

    $r, z = \sigma(u_{r,z}\odot h_{t-1} + W_{r,z}x_t + b_{r,z})$,
    $n = \tanh(u_n\odot r\odot h_{t-1} + W_nx_t + b_n)$, $h_t = (1 - z)\odot n + z\odot h_{t-1}$.

    References:
        Danieli et al. (2025), arXiv:2510.21450.
    """

    jacobian_structure = Diagonal()

    def initialize(self, key: Key) -> ParamsDiagonalGRU:
        """Draw u between -1 and 1, W of variance 1 / U, and biases of zero."""
        one, two = jax.random.split(key)
        return ParamsDiagonalGRU(
            diagonal_weights(one, 3, self.state_dim),
            input_weights(two, 3, self.state_dim, self.input_dim),
            jnp.zeros((3, self.state_dim)),
        )

    def advance(self, params: ParamsDiagonalGRU, state: Array, x: Array) -> Array:
        """Return the next state."""
        carried = params.recurrent_weights * state
        given = affine(params.input_weights, params.bias, x)
        r, z = jax.nn.sigmoid(carried[:2] + given[:2])
        candidate = jnp.tanh(r * carried[2] + given[2])
        return (1 - z) * candidate + z * state
