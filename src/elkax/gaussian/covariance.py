"""Covariance form: a covariance is stored as itself."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.gaussian.factor import (
    gram,
    is_regular,
    psd_cholesky,
    solve_lower,
    solve_regular,
    symmetrize,
)
from elkax.scan import lanes
from elkax.scan.lanes import dot, matmul, matvec, outer, transpose


@dataclass(frozen=True)
class Covariance:
    r"""Gaussian algebra on covariances $P$ and information matrices $J$ themselves.

    The cheapest form. In float32 a variance that an observation makes k times smaller keeps a
    relative error of about $k\epsilon$; `SquareRoot` keeps $\sqrt k\,\epsilon$.
    """

    def encode(self, covariance: Float[Array, "n n *lanes"]) -> Array:
        """Store a covariance."""
        return covariance

    def exact(self, matrix: Float[Array, "n n *lanes"]) -> Array:
        """Return the matrix; nothing else is carried."""
        return matrix

    def decode(self, stored: Float[Array, "n n *lanes"]) -> Array:
        """Return the covariance."""
        return stored

    def cholesky(self, stored: Float[Array, "n n *lanes"], *, written_out: bool = False) -> Array:
        """Return a lower, possibly singular factor."""
        return psd_cholesky(stored, written_out=written_out)

    def times(self, stored: Float[Array, "n n *lanes"], x: Array) -> Array:
        """Multiply the stored matrix with a vector."""
        return matvec(stored, x)

    def predict(self, weights: Array, stored: Array, noise: Array) -> Array:
        r"""Compute $FPF^\top + Q$."""
        return self.carry(weights, stored, noise)[1]

    def carry(self, weights: Array, stored: Array, noise: Array) -> tuple[Array, Array]:
        r"""Compute $PF^\top$ and $FPF^\top + Q$."""
        half, both = lanes.congruence(transpose(weights), stored)
        both, noise = lanes.align(lanes.materialize(both), 2, noise, 2)
        return half, symmetrize(both + noise)

    def reverse(self, weights: Array, stored: Array, noise: Array) -> tuple[Array, Array, Array]:
        r"""Turn a step $z' = Fz + N(0, Q)$, $z \sim N(m, P)$, around: $z \mid z'$.

        $G = PF^\top(FPF^\top + Q)^{-1}$ and, in Joseph form,
        $U = (I - GF)P(I - GF)^\top + GQG^\top$.

        Args:
            weights: $F$.
            stored: $P$.
            noise: $Q$.

        Returns:
            $G$, $U$, and whether $FPF^\top + Q$ is regular; if not, they are meaningless.
        """
        gain, rest, regular = _find_gain(weights, stored, noise)
        kept = lanes.inner(rest, lanes.materialize(lanes.inner(stored, rest)))
        added = lanes.inner(gain, lanes.materialize(lanes.inner(noise, gain)))
        return transpose(gain), symmetrize(lanes.materialize(kept + added)), regular

    def smooth(
        self, weights: Array, stored: Array, noise: Array, after: Array
    ) -> tuple[Array, Array, Array]:
        r"""Carry the covariance $P'$ of $z'$ given all data back to $z$.

        $GP'G^\top + U = (I - GF)P(I - GF)^\top + G(Q + P')G^\top$; other arguments and returns as
        `reverse`.
        """
        gain, rest, regular = _find_gain(weights, stored, noise)
        kept = lanes.inner(rest, lanes.materialize(lanes.inner(stored, rest)))
        after, noise = lanes.align(after, 2, noise, 2)
        _, back = lanes.congruence(gain, after + noise)
        return transpose(gain), symmetrize(lanes.materialize(kept + back)), regular

    def project(self, stored: Array, row: Array, variance: Array) -> tuple[Array, Array]:
        r"""Compute $Ph$ and $s = h^\top Ph + r$ for one scalar $y = h^\top z + N(0, r)$.

        Args:
            stored: $P$.
            row: $h$.
            variance: $r$, may be zero.
        """
        ph = matvec(stored, row)
        return ph, dot(row, ph) + variance

    def rounding(self, floor: Array) -> Array:
        """Return the rounding level of an innovation variance summed from terms of size `floor`."""
        return 8 * jnp.finfo(floor.dtype).eps * floor

    def update(
        self, stored: Array, projection: Array, variance: Array, s: Array, active: Array
    ) -> tuple[Array, Array]:
        """Condition on the scalar.

        Args:
            stored: $P$.
            projection: from `project`.
            variance: $r$.
            s: innovation variance, any positive number where not active.
            active: False where nothing is conditioned on.

        Returns:
            The gain $Ph/s$, zero where not active, and the conditional $P$.
        """
        del variance
        # Zero times a non-finite entry keeps it visible, where a selection would hide it.
        gain = projection * jnp.where(active, 1.0 / s, 0.0)
        return gain, stored - outer(gain, projection)

    def accumulate(self, stored: Array, low: Array, columns: Array) -> tuple[Array, Array]:
        r"""Compute $J + GG^\top$, and what rounding left out of it.

        A direction of which a block says nothing would be filled with the roundings of others; in
        float64 they are too small to matter, and are dropped.

        Args:
            stored: $J$.
            low: what earlier roundings left out of it.
            columns: $G$.
        """
        stored, product = lanes.align(stored, 2, lanes.product(columns, transpose(columns)), 2)
        if not lanes.is_short(stored.dtype):
            return stored + product, low
        return lanes.two_sum(stored, low + product)

    def condition(self, stored: Array, information: Array) -> Array:
        r"""Compute $(I + PJ)^{-1}P$; see `condition_on_information`."""
        return condition_on_information(stored, information)


def _find_gain(weights: Array, stored: Array, noise: Array) -> tuple[Array, Array, Array]:
    r"""Compute $G^\top$, $(I - GF)^\top$, and whether $FPF^\top + Q$ is regular."""
    half, predicted = Covariance().carry(weights, stored, noise)
    factor, solved = solve_regular(predicted, transpose(half))
    solved = lanes.materialize(solved)
    eye = lanes.identity(solved.shape[0], solved.shape[2:], solved.dtype)
    return solved, lanes.materialize(eye - lanes.inner(weights, solved)), is_regular(factor)


@jax.custom_jvp
def condition_on_information(
    covariance: Float[Array, "n n *lanes"], information: Float[Array, "n n *lanes"]
) -> Float[Array, "n n *lanes"]:
    r"""Compute $X = (I + PJ)^{-1}P = L(I + L^\top JL)^{-1}L^\top$ with $P = LL^\top$.

    The inner matrix is symmetric with pivots of at least one, so singular $P$ and $J$ are
    ordinary. The derivative,
    $dX = (I - XJ)\,dP\,(I - XJ)^\top - X\,dJ\,X$, needs no derivative of the factor.

    Args:
        covariance: $P$, positive semi-definite.
        information: $J$, positive semi-definite.

    Returns:
        $X$, positive semi-definite.
    """
    factor = psd_cholesky(covariance)
    inner = matmul(matmul(transpose(factor), information), factor)
    eye = lanes.identity(inner.shape[0], inner.shape[2:], inner.dtype)
    half = solve_lower(psd_cholesky(symmetrize(inner) + eye), transpose(factor))
    return gram(transpose(half))


@condition_on_information.defjvp
def _condition_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]):
    covariance, information = primals
    d_covariance, d_information = tangents
    x = condition_on_information(covariance, information)
    xj = matmul(x, information)
    left = lanes.identity(x.shape[0], xj.shape[2:], x.dtype) - xj
    change = matmul(matmul(left, d_covariance), transpose(left))
    return x, change - matmul(matmul(x, d_information), x)
