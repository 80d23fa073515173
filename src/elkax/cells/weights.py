"""First weights of cells, and their products."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.cells.protocol import Key


def input_weights(key: Key, count: int, state_dim: int, input_dim: int) -> Array:
    """Draw weights (count, D, U) of variance 1 / U."""
    scale = 1 / math.sqrt(max(input_dim, 1))
    return scale * jax.random.normal(key, (count, state_dim, input_dim))


def recurrent_weights(key: Key, count: int, state_dim: int) -> Array:
    """Draw orthogonal weights (count, D, D)."""
    return jax.random.orthogonal(key, state_dim, (count,))


def diagonal_weights(key: Key, count: int, state_dim: int) -> Array:
    """Draw weights (count, D) between -1 and 1."""
    return jax.random.uniform(key, (count, state_dim), minval=-1.0)


def products(weights: Float[Array, "g D U"], x: Float[Array, "... U"]) -> Float[Array, "g ... D"]:
    """Multiply every matrix with a vector, or with those of all times."""
    return jnp.einsum("gdu,...u->g...d", weights, x)


def biases(bias: Float[Array, "g D"], x: Float[Array, "... U"]) -> Float[Array, "g ... D"]:
    """Shape biases to be added to `products`."""
    return bias.reshape((bias.shape[0],) + (1,) * (x.ndim - 1) + bias.shape[1:])


def affine(weights: Float[Array, "g D U"], bias: Float[Array, "g D"], x: Float[Array, "... U"]):
    """Compute $W_gx + b_g$ for every g, at one time or at all times."""
    return products(weights, x) + biases(bias, x)
