"""Covariance form: a covariance is stored as itself."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from elkax.gaussian.factor import gram, psd_cholesky, solve_lower, symmetrize
from elkax.scan import lanes
from elkax.scan.lanes import dot, matmul, matvec, outer, transpose


@dataclass(frozen=True)
class Covariance:
    r"""Gaussian algebra on covariances $P$ and information matrices $J$ themselves.

    The cheapest form. In float32 a variance that data make k times smaller keeps a relative error
    of about $k\epsilon$ when it is smoothed; `SquareRoot` keeps $\sqrt k\,\epsilon$.

    Args:
        exact_entries: whether measurements without error may occur.
    """

    exact_entries: bool = True

    def encode(self, covariance: Float[Array, "n n *lanes"]) -> Array:
        """Store a covariance."""
        return covariance

    def exact(self, matrix: Float[Array, "n n *lanes"]) -> Array:
        """Return the matrix; nothing else is carried."""
        return matrix

    def decode(self, stored: Float[Array, "n n *lanes"]) -> Array:
        """Return the covariance."""
        return stored

    def variances(self, stored: Float[Array, "n n *lanes"]) -> Array:
        """Return the diagonal; rounding may have made it negative."""
        return jnp.maximum(lanes.diagonal_of(stored), 0.0)

    def rounding(self, dtype: DTypeLike) -> tuple[float, float]:
        r"""Give $\epsilon$ and 8; see `Form`."""
        return float(jnp.finfo(dtype).eps), 8.0

    def times(self, stored: Float[Array, "n n *lanes"], x: Array) -> Array:
        """Multiply the stored matrix with a vector."""
        return matvec(stored, x)

    def predict(self, weights: Array, stored: Array, noise: Array) -> Array:
        r"""Compute $FPF^\top + Q$."""
        _, both = lanes.congruence(transpose(weights), stored)
        both, noise = lanes.align(lanes.materialize(both), 2, noise, 2)
        return symmetrize(both + noise)

    def project(self, stored: Array, row: Array, variance: Array) -> tuple[Array, Array]:
        r"""Compute $Ph$ and $s = h^\top Ph + r$ for one scalar $y = h^\top z + N(0, r)$.

        Args:
            stored: $P$.
            row: $h$.
            variance: $r$, may be zero.
        """
        ph = matvec(stored, row)
        return ph, dot(row, ph) + variance

    def gain(self, stored: Array, projection: Array) -> Array:
        r"""Return $Ph$, the covariance of the state with the scalar, from `project`."""
        del stored
        return projection

    def update(
        self, stored: Array, row: Array, projection: Array, variance: Array, s: Array, gain: Array
    ) -> Array:
        r"""Condition on the scalar.

        Args:
            stored: $P$.
            row: $h$.
            projection: from `project`.
            variance: $r$.
            s: innovation variance, any positive number where the gain is zero.
            gain: $k = Ph/s$, zero where nothing is conditioned on.

        Returns:
            The conditional $P$.
        """
        del s
        return _correct(stored, row, projection, variance, gain)

    def correct(self, stored: Array, row: Array, variance: Array, gain: Array) -> Array:
        r"""Compute $(I - kh^\top)P(I - kh^\top)^\top + rkk^\top$ for any gain.

        What rounding leaves in the first product along h is taken away by the second, so that a
        variance may fall by $1/\epsilon$ and keep its digits (Joseph's form, by rank-one changes).
        Symmetric up to rounding, as all that takes it needs.

        References:
            Bierman (1977), Factorization Methods for Discrete Sequential Estimation, Sec. II.7.
        """
        return _correct(stored, row, matvec(stored, row), variance, gain)

    def settle(self, stored: Array) -> Array:
        """Average with the transpose, and make a variance zero that rounding made negative."""
        cov = symmetrize(lanes.materialize(stored))
        eye = lanes.identity(cov.shape[0], (1,) * (cov.ndim - 2), bool)
        return jnp.where(eye & (cov < 0), 0.0, cov)

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


def _correct(stored: Array, row: Array, projection: Array, variance: Array, gain: Array) -> Array:
    """Correct with $Ph$ known; see `Covariance.correct`."""
    left = lanes.materialize(stored - outer(gain, projection))
    right = lanes.add(lanes.scale(gain, variance), -matvec(left, row))
    return left + outer(right, gain)


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
