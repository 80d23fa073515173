"""The Kalman filter of a damped recurrence whose coordinates do not mix."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from elkax.scan.lanes import add, multiply

State = tuple[Array, Array]


class DiagonalStep(NamedTuple):
    r"""One step $z_t = a \circ z_{t-1} + b + N(0, \mathrm{diag}(q))$, all fields (D,).

    Attributes:
        weights: $a$.
        offset: $b$.
        noise: $q$.
    """

    weights: Array
    offset: Array
    noise: Array


class DiagonalSummary(NamedTuple):
    r"""A block, given the state before it; notation of `Summary`, entry by entry."""

    a: Array
    b: Array
    c: Array
    eta: Array
    j: Array


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["size"])
@dataclass(frozen=True)
class DiagonalKalmanFilter:
    r"""Predict with a diagonal transition, then observe every coordinate as $0 + N(0, 1)$.

    The filtered variance is $p/(1 + p)$, at most one, and equals the gain. Divisions are by
    numbers of at least one, so that q = 0 and p = 0 are ordinary and every block has a summary.

    Args:
        size: D.
    """

    size: int

    def step(self, state: State, x: DiagonalStep) -> tuple[State, State]:
        """Predict and update; the output is the filtered mean and variance."""
        mean, variance = state
        a, b, q = x
        mean, variance = add(multiply(a, mean), b), add(multiply(a * a, variance), q)
        kept = 1.0 / (1.0 + variance)
        new = multiply(mean, kept), variance * kept
        return new, new

    def identity(self, lanes: tuple[int, ...], dtype: DTypeLike) -> DiagonalSummary:
        """Summarise no step."""
        zero = jnp.zeros((self.size, *lanes), dtype)
        return DiagonalSummary(jnp.ones_like(zero), zero, zero, zero, zero)

    def absorb(self, summary: DiagonalSummary, x: DiagonalStep) -> DiagonalSummary:
        """Lengthen a block by one step."""
        a, b, q = x
        through = a * summary.a
        mean, variance = a * summary.b + b, a * a * summary.c + q
        s = 1.0 + variance
        return DiagonalSummary(
            through / s,
            mean / s,
            variance / s,
            summary.eta - through * mean / s,
            summary.j + through * through / s,
        )

    def combine(self, left: DiagonalSummary, right: DiagonalSummary) -> DiagonalSummary:
        """Join two blocks; the formulas of `KalmanFilter.combine` for D = 1."""
        s = 1.0 + left.c * right.j
        mean, variance = self.apply(right, (left.b, left.c))
        return DiagonalSummary(
            right.a * left.a / s,
            mean,
            variance,
            left.eta + left.a * (right.eta - right.j * left.b) / s,
            left.j + left.a * left.a * right.j / s,
        )

    def apply(self, summary: DiagonalSummary, state: State) -> State:
        """Jump over a block."""
        mean, variance = state
        s = 1.0 + variance * summary.j
        mean = summary.a * (mean + variance * summary.eta) / s + summary.b
        return mean, summary.a * summary.a * variance / s + summary.c

    def sound(self, summary: DiagonalSummary) -> bool:
        """Every block has a summary."""
        return True
