"""Diagonal complex linear recurrences."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key, OneRecurrence, check_size
from elkax.cells.weights import products


class ParamsDiagonalComplex(NamedTuple):
    r"""Parameters of a `DiagonalComplex` cell; complex matrices as their real and imaginary parts.

    Attributes:
        log_rate: $\nu$ (D,), $|\lambda| = \exp(-e^\nu)$.
        log_phase: $\theta$ (D,), $\arg\lambda = e^\theta$.
        log_gain: $\gamma$ (D,).
        input_weights: B (2, D, U).
        output_weights: C (2, O, D).
        skip_weights: (O, U).
    """

    log_rate: Float[Array, " D"]
    log_phase: Float[Array, " D"]
    log_gain: Float[Array, " D"]
    input_weights: Float[Array, "2 D U"]
    output_weights: Float[Array, "2 O D"]
    skip_weights: Float[Array, "O U"]


@dataclass(frozen=True)
class DiagonalComplex(OneRecurrence):
    r"""The linear recurrent unit, a diagonal complex linear system as in LRU and S5.

    $s_t = \lambda\odot s_{t-1} + e^\gamma\odot Bx_t$ with $\lambda = \exp(-e^\nu + ie^\theta)$, and
    the output is $\mathrm{Re}(Cs_t) + Ex_t$.

    Args:
        input_dim: U.
        state_dim: D.
        output_dim: O; D if None.
        least: smallest $|\lambda|$ at first.
        most: largest $|\lambda|$ at first.
        phase: largest $\arg\lambda$ at first.

    References:
        Orvieto et al. (2023), arXiv:2303.06349; Smith et al. (2023), arXiv:2208.04933.
    """

    output_dim: int | None = None
    least: float = 0.5
    most: float = 0.99
    phase: float = 6.28

    def __post_init__(self) -> None:
        """Reject what cannot be."""
        super().__post_init__()
        if self.output_dim is not None:
            check_size("output_dim", self.output_dim, 1)
        if not 0 <= self.least < self.most < 1:
            raise ValueError(
                f"least and most must be 0 <= least < most < 1, got {self.least} and {self.most}"
            )
        if not self.phase > 0:
            raise ValueError(f"phase must be positive, got {self.phase}")

    def initialize(self, key: Key) -> ParamsDiagonalComplex:
        r"""Draw $\lambda$ evenly from a ring, and $\gamma$ that keeps the variance of the input."""
        ring, turn, into, out, past = jax.random.split(key, 5)
        size, outputs = self.state_dim, self.output_dim or self.state_dim
        square = jax.random.uniform(ring, (size,), minval=self.least**2, maxval=self.most**2)
        phase = self.phase * (1 - jax.random.uniform(turn, (size,)))
        fan = max(self.input_dim, 1)
        return ParamsDiagonalComplex(
            log_rate=jnp.log(-jnp.log(square) / 2),
            log_phase=jnp.log(phase),
            log_gain=jnp.log1p(-square) / 2,
            input_weights=jax.random.normal(into, (2, size, self.input_dim)) / (2 * fan) ** 0.5,
            output_weights=jax.random.normal(out, (2, outputs, size)) / size**0.5,
            skip_weights=jax.random.normal(past, (outputs, self.input_dim)) / fan**0.5,
        )

    def initial_state(self, params: ParamsDiagonalComplex) -> Array:
        """Return zero, complex."""
        return jax.lax.complex(*(self.zeros(params),) * 2)

    def coefficients(self, params: ParamsDiagonalComplex, x: Array) -> tuple[Array, Array]:
        """Return decay and increment; the decay has no time."""
        decay = jnp.exp(jax.lax.complex(-jnp.exp(params.log_rate), jnp.exp(params.log_phase)))
        return decay, jnp.exp(params.log_gain) * jax.lax.complex(*products(params.input_weights, x))

    def readout(self, params: ParamsDiagonalComplex, state: Array, x: Array) -> Array:
        """Return the real part of what is read from the state, and of the input."""
        real, imaginary = params.output_weights
        (skip,) = products(params.skip_weights[None], x)
        return state.real @ real.T - state.imag @ imaginary.T + skip
