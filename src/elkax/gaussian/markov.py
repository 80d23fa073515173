"""Propagation of a mean and a covariance through affine-Gaussian steps."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from elkax.scan import lanes
from elkax.scan.lanes import add, advance, materialize, matvec


class Transition(NamedTuple):
    r"""An affine-Gaussian map $z \mapsto N(Mz + g, U)$, of one step or of a block.

    Attributes:
        weights: $M$ (D, D), perhaps with what rounding left out of it, see `Form.exact`.
        offset: $g$ (D,).
        cov: $U$ (D, D), stored in the form in use.
    """

    weights: Array
    offset: Array
    cov: Array


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["size", "form"])
@dataclass(frozen=True)
class GaussMarkov:
    r"""The recurrence $(m, P) \mapsto (Mm + g, MPM^\top + U)$.

    Run backwards it is the Rauch-Tung-Striebel smoother (M the gain) and the Bryson-Frazier
    costates (M the transposed closed-loop transition); run forwards it is prediction. The
    summary of a block is its own transition.

    Args:
        size: D.
        form: how covariances are stored.
    """

    size: int
    form: Any

    def move(self, summary: Transition, mean: Array) -> Array:
        """Move the mean alone."""
        return add(matvec(lanes.halves(summary.weights)[0], mean), summary.offset)

    def apply(self, summary: Transition, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """Jump over a block, or a step."""
        mean, cov = state
        return self.move(summary, mean), self.form.predict(summary.weights, cov, summary.cov)

    def step(
        self, state: tuple[Array, Array], x: Transition
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Advance one step; the output is the new mean and covariance."""
        mean, cov = self.apply(x, state)
        return (mean, cov), (mean, lanes.halves(cov)[0])

    def identity(self, lane_shape: tuple[int, ...], dtype: DTypeLike) -> Transition:
        """Return $M = I$, $g = 0$, $U = 0$."""
        zero = jnp.zeros((self.size, *lane_shape), dtype)
        matrix = jnp.zeros((self.size, self.size, *lane_shape), dtype)
        eye = lanes.identity(self.size, lane_shape, dtype)
        return Transition(self.form.exact(eye), zero, self.form.exact(matrix))

    def combine(self, left: Transition, right: Transition) -> Transition:
        r"""Join two blocks: $(M_2M_1, M_2g_1 + g_2, M_2U_1M_2^\top + U_2)$."""
        offset, cov = self.apply(right, (left.offset, left.cov))
        weights = materialize(advance(right.weights, left.weights))
        return Transition(weights, offset, cov)

    def absorb(self, summary: Transition, x: Transition) -> Transition:
        """Lengthen a block; one step is its own summary."""
        return self.combine(summary, x)

    def sound(self, summary: Transition) -> bool:
        """Every block has a summary."""
        return True
