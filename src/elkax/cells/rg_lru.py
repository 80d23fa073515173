"""The real-gated linear recurrent unit."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, OneRecurrence
from elkax.cells.weights import affine, input_weights, products


class ParamsRGLRU(NamedTuple):
    r"""Parameters of an RG-LRU.

    Attributes:
        decay_logit: $\Lambda$ (D,).
        gate_weights: W (2, D, D) of recurrence gate and input gate, in this order.
        bias: b (2, D) of these.
        input_weights: P (D, U); None where U = D.
    """

    decay_logit: Float[Array, " D"]
    gate_weights: Float[Array, "2 D D"]
    bias: Float[Array, "2 D"]
    input_weights: Float[Array, "D U"] | None


@dataclass(frozen=True)
class RGLRU(OneRecurrence):
    r"""The real-gated linear recurrent unit, whose output is the state.

    $r, i = \sigma(W_{r,i}u_t + b_{r,i})$, $a_t = \sigma(\Lambda)^{\kappa r}$,
    $h_t = a_t\odot h_{t-1} + \sqrt{1 - a_t^2}\odot i\odot u_t$, with $u_t = x_t$ if U = D,
    else $Px_t$.

    Args:
        input_dim: U.
        state_dim: D.
        sharpness: $\kappa$.

    References:
        De et al. (2024), arXiv:2402.19427.
    """

    sharpness: float = 8.0

    def __post_init__(self) -> None:
        """Reject what cannot be."""
        super().__post_init__()
        if not self.sharpness > 0:
            raise ValueError(f"sharpness must be positive, got {self.sharpness}")

    def initialize(self, key: Key) -> ParamsRGLRU:
        r"""Draw $\sigma(\Lambda)^\kappa$ between 0.9 and 0.999, W of variance 1 / D, P of 1 / U."""
        one, two, three = jax.random.split(key, 3)
        decay = jax.random.uniform(one, (self.state_dim,), minval=0.9, maxval=0.999)
        root = jnp.log(decay) / self.sharpness
        wide = self.input_dim != self.state_dim
        return ParamsRGLRU(
            root - jnp.log(-jnp.expm1(root)),
            input_weights(two, 2, self.state_dim, self.state_dim),
            jnp.zeros((2, self.state_dim)),
            input_weights(three, 1, self.state_dim, self.input_dim)[0] if wide else None,
        )

    def coefficients(self, params: ParamsRGLRU, x: Array) -> tuple[Array, Array]:
        """Return decay and increment."""
        u = x if params.input_weights is None else products(params.input_weights[None], x)[0]
        gate, new = affine(params.gate_weights, params.bias, u)
        # log(-log a): the gain has a slope in it where a rounds to one, and none in a.
        rate = (
            math.log(self.sharpness) + jax.nn.log_sigmoid(gate) + _log_softplus(-params.decay_logit)
        )
        return jnp.exp(-jnp.exp(rate)), _gain(rate) * jax.nn.sigmoid(new) * u


def _log_softplus(x: Array) -> Array:
    """Compute log(log(1 + exp(x))), which approaches x far to the left."""
    far = x < -40
    return jnp.where(far, x, jnp.log(jax.nn.softplus(jnp.where(far, 0, x))))


def _gain(rate: Array) -> Array:
    r"""Compute $\sqrt{1 - a^2}$ for $a = e^{-y/2}$, $y = 2e^\rho$."""
    y = 2 * jnp.exp(rate)
    small = y < jnp.finfo(y.dtype).eps ** 0.5
    safe = jnp.where(small, 1, y)
    mean = jnp.where(small, 1 - y / 2, -jnp.expm1(-safe) / safe)
    return jnp.exp((rate + math.log(2)) / 2) * jnp.sqrt(mean)
