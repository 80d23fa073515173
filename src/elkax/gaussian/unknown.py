r"""Directions of the state of which nothing is known.

Beside its Gaussian part a state has $U\delta$ with effects $\delta$ that no finite variance
describes. U is (D + d, d): below its D rows stand those of the rotation that the effects have
gone through. A measurement that sees some of it, $f = U^\top h \ne 0$, determines one direction:
U is rotated so that f has a single entry, and that column becomes zero. What rounding leaves where
terms cancel is removed where it arises, so that zeros tell what is known.

References:
    Koopman (1997), JASA 92(440); here with $P_\infty = UU^\top$ in factors.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.scan import lanes
from elkax.scan.lanes import dot, matvec, transpose

# In units of rounding, how much of a sum of terms is taken for what rounding left of them in one
# operation.
LEVEL = 16


def tolerance(age: Array) -> Array:
    r"""Give the part of its terms below which what is seen of an effect is taken for rounding.

    The entries of F are rounded, so that $F^t$ drifts from what it stands for by about $t\epsilon$:
    two cycles of one frequency seem to part. What grows by less than that in every step tells
    nothing, however long it grows. At most 1 %.

    Args:
        age: in how many steps F has changed a state so far.
    """
    return jnp.minimum(jnp.finfo(age.dtype).eps * (1000 + 4 * age), 0.01)


def start(rows: Array) -> Array:
    """Put the identity below the D rows of U."""
    return jnp.concatenate((rows, jnp.eye(rows.shape[1], dtype=rows.dtype)))


def propagate(weights: Array, unknown: Array, first: Array | None = None) -> tuple[Array, Array]:
    """Multiply the rows of the states with F.

    Args:
        weights: $F$.
        unknown: $U$ (D + d, d).
        first: (D, d) to be added, the rows of the states at the start.

    Returns:
        U, and the sizes of the terms that the rows of its states were summed from.
    """
    size = weights.shape[0]
    states, rotation = unknown[:size], unknown[size:]
    terms = lanes.matmul(*map(jnp.abs, jax.lax.stop_gradient((weights, states))))
    moved = _clean(lanes.matmul(weights, states), _rounding(terms))
    if first is not None:
        moved = lanes.add_matrix(moved, first)
        terms = lanes.add_matrix(terms, jax.lax.stop_gradient(jnp.abs(first)))
    moved = lanes.give_lanes(moved, 2, (rotation, 2))
    return jnp.concatenate((moved, lanes.give_lanes(rotation, 2, (moved, 2)))), terms


def see(unknown: Array, row: Array, level: Array) -> Array:
    r"""Compute $f = U^\top h$.

    Args:
        unknown: $U$.
        row: $h$.
        level: (D, d) what of the rows of the states is taken for rounding.
    """
    states = transpose(unknown[: row.shape[0]])
    return _clean(matvec(states, row), matvec(transpose(level), jnp.abs(row)))


def determine(unknown: Array, level: Array, seen: Array, where: Array) -> tuple[Array, Array]:
    """Rotate U so that what was seen has one entry, and make that column zero.

    Args:
        unknown: $U$.
        level: (D, d) what of the rows of the states is taken for rounding.
        seen: $f$.
        where: where to do so.

    Returns:
        U and the level after it.
    """
    largest = jnp.argmax(jnp.abs(seen), axis=0)
    index = jnp.arange(seen.shape[0]).reshape((-1,) + (1,) * (seen.ndim - 1))
    one = (index == largest).astype(seen.dtype)
    pivot = dot(one, seen)
    square = dot(seen, seen)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    v = seen + one * jnp.where(pivot < 0, -length, length)
    square = dot(v, v)
    weight = jnp.where(square > 0, 2.0 / jnp.where(square > 0, square, 1.0), 0.0)
    along = matvec(unknown, v) * weight
    size = level.shape[0]
    rotated = unknown - lanes.outer(along, v)
    rows = jnp.max(jnp.abs(unknown[size:]), axis=1, keepdims=True)
    v = jax.lax.stop_gradient(jnp.abs(v))
    mixed = level + lanes.outer(matvec(level, v) * weight, v)
    states, rotation = _clean(rotated[:size], mixed), _clean(rotated[size:], _rounding(rows))
    rotated = jnp.concatenate((states, rotation)) * (1.0 - one)[None]
    return jnp.where(where, rotated, unknown), jnp.where(where, mixed, level)


def _rounding(terms: Array) -> Array:
    """Give what one operation may have left of its terms."""
    return LEVEL * jnp.finfo(terms.dtype).eps * terms


def _clean(value: Array, level: Array) -> Array:
    """Put zero where a sum is at the level of rounding."""
    return jnp.where(jnp.abs(value) <= jax.lax.stop_gradient(level), 0.0, value)


def never_seen(unknown: Array, age: Array) -> Array:
    r"""Give what of the states all data leave unknown, (T, D, d), zero where they determine it.

    What is left of the rotation at the end, W, was never seen: $U_tR_t^\top W$ with the rotation
    $R_t$ at t is how the states depend on it.

    Args:
        unknown: $U$ (T, D + d, d) after every step.
        age: (T, D), see `tolerance`.
    """
    size = age.shape[1]
    rotation, last = unknown[:, size:], unknown[-1, size:]
    turn = jnp.matmul(jnp.swapaxes(rotation, 1, 2), last, precision="highest")
    states = unknown[:, :size]
    found = jnp.matmul(states, turn, precision="highest")
    terms = jnp.matmul(jnp.abs(states), jnp.abs(turn), precision="highest")
    return jax.lax.stop_gradient(_clean(found, tolerance(age)[:, :, None] * terms))


def log_rotation(unknown: Array, first: Array) -> Array:
    r"""Compute what the log-likelihood lacks for effects in the units of the states.

    $\sum_k\log s_k - \tfrac12\log|W^\top\mathrm{diag}(s^2)W|$ with the units s of the effects and
    what is left of their rotation, W: the likelihood then has $\mathrm{pdet}$ of the information
    about the effects themselves.

    Args:
        unknown: $U$ (D + d, d) at the end.
        first: $U$ at the beginning, a multiple of a unit vector in each column.
    """
    size = len(first) - first.shape[1]
    units = jnp.sqrt(jnp.sum(first[:size] ** 2, axis=0))
    left = unknown[size:] * units[:, None]
    gone = jnp.all(unknown[size:] == 0, axis=0)
    within = jnp.matmul(left.T, left, precision="highest")
    largest = jnp.max(jnp.diagonal(within))
    largest = jnp.where(largest > 0, largest, 1.0)
    pivots = jnp.diagonal(jnp.linalg.cholesky(within / largest + jnp.diag(gone * 1.0)))
    rest = jnp.sum(jnp.log(pivots)) + 0.5 * jnp.sum(~gone) * jnp.log(largest)
    return jnp.sum(jnp.log(units)) - rest
