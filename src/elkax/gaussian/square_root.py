"""Square-root form: a covariance is stored as a lower factor."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.gaussian.factor import gram, is_regular, psd_cholesky, solve_lower, tria
from elkax.scan import lanes
from elkax.scan.lanes import dot, materialize, matmul, matvec, transpose


@dataclass(frozen=True)
class SquareRoot:
    r"""Gaussian algebra on lower factors, $P = LL^\top$ and $J = ZZ^\top$, possibly singular.

    Covariances are positive semi-definite by construction and keep about twice the digits of
    the covariance form, at roughly twice the cost.
    """

    def encode(self, covariance: Float[Array, "n n *lanes"]) -> Array:
        """Store a covariance as its guarded Cholesky factor."""
        return psd_cholesky(covariance)

    def decode(self, stored: Float[Array, "n n *lanes"]) -> Array:
        r"""Return $LL^\top$."""
        return gram(stored)

    def cholesky(self, stored: Float[Array, "n n *lanes"], *, written_out: bool = False) -> Array:
        """Return the stored factor."""
        del written_out
        return stored

    def times(self, stored: Float[Array, "n n *lanes"], x: Array) -> Array:
        r"""Compute $L(L^\top x)$."""
        return matvec(stored, matvec(transpose(stored), x))

    def predict(self, weights: Array, stored: Array, noise: Array) -> Array:
        r"""Compute the factor of $FLL^\top F^\top + L_QL_Q^\top$ by one triangularisation."""
        return tria(_beside(materialize(lanes.advance(weights, stored)), noise))

    def reverse(self, weights: Array, stored: Array, noise: Array) -> tuple[Array, Array, Array]:
        r"""Turn a step around; arguments and returns as `Covariance.reverse`.

        The factor of the joint covariance of $(z', z)$, by one triangularisation, has the blocks
        $L'$, $GL'$ and, below the diagonal, a factor of $U$: one solve instead of the two with
        $FPF^\top + Q$, and no squares.
        """
        size = stored.shape[0]
        moved = materialize(lanes.advance(weights, stored))
        above = _beside(moved, noise)
        below = _beside(stored, jnp.zeros_like(stored))
        joint = tria(jnp.concatenate((above, below), axis=0))
        factor, cross, rest = joint[:size, :size], joint[size:, :size], joint[size:, size:]
        factor, cross = materialize((factor, cross))
        gain = solve_lower(factor, transpose(cross), transposed=True, written_out=True)
        return transpose(gain), rest, is_regular(factor)

    def smooth(
        self, weights: Array, stored: Array, noise: Array, after: Array
    ) -> tuple[Array, Array, Array]:
        """Carry a covariance back; arguments and returns as `Covariance.smooth`."""
        gain, rest, regular = self.reverse(weights, stored, noise)
        return gain, self.predict(gain, after, rest), regular

    def project(self, stored: Array, row: Array, variance: Array) -> tuple[Array, Array]:
        r"""Compute $f = L^\top h$ and $s = f^\top f + r$; arguments as `Covariance.project`."""
        f = matvec(transpose(stored), row)
        return f, dot(f, f) + variance

    def rounding(self, floor: Array) -> Array:
        """Return the rounding level of an innovation variance summed from terms of size `floor`."""
        return (8 * jnp.finfo(floor.dtype).eps) ** 2 * floor

    def update(
        self, stored: Array, projection: Array, variance: Array, s: Array, active: Array
    ) -> tuple[Array, Array]:
        r"""Condition on the scalar; arguments and returns as `Covariance.update`.

        With $f = L^\top h$ and $\sigma_j = r + \sum_{i>j} f_i^2$, the factor of the conditional
        covariance $L(I - ff^\top/\sigma_0)L^\top$ has the columns
        $\sqrt{\sigma_j/\sigma_{j-1}}\,L_j - f_j(\sigma_j\sigma_{j-1})^{-1/2}\sum_{i>j}f_iL_i$:
        nothing cancels on the diagonal and r = 0 is ordinary.

        References:
            Carlson (1973), AIAA Journal 11(9); here for a lower factor.
        """
        f = projection * active
        later = variance + _sum_later(f * f)  # sigma_j
        from_here = later + f * f  # sigma_{j-1}
        columns = _sum_later(f[None] * stored, axis=1)
        gain = (columns[:, 0] + f[0] * stored[:, 0]) / s
        some = from_here > 0
        safe = jnp.where(some, from_here, 1.0)
        shrink = jnp.where(some, jnp.sqrt(later / safe), 1.0)
        left = some & (later > 0)
        weight = f * jnp.where(left, jax.lax.rsqrt(jnp.where(left, later, 1.0) * safe), 0.0)
        # Where little is taken away, 1 - shrink without the difference, so that it rounds once.
        loss = jnp.where(some, f * f / (safe * (1.0 + shrink)), 0.0)
        little = shrink > 0.5
        keep, factor = jnp.where(little, 1.0, 0.0), jnp.where(little, -loss, shrink)
        keep, factor, weight, columns, gain = materialize((keep, factor, weight, columns, gain), 1)
        return gain, keep[None] * stored + (stored * factor[None] - columns * weight[None])

    def accumulate(self, stored: Array, low: Array, columns: Array) -> tuple[Array, Array]:
        r"""Compute the factor of $ZZ^\top + GG^\top$; arguments as `Covariance.accumulate`."""
        return tria(_beside(stored, columns)), low

    def condition(self, stored: Array, information: Array) -> Array:
        r"""Compute a factor of $(I + PJ)^{-1}P$ for $P = LL^\top$, $J = ZZ^\top$.

        With $\Psi\Psi^\top = I + L^\top ZZ^\top L$, found by triangularising $[L^\top Z, I]$, it
        is $L\Psi^{-\top}$.
        """
        cross = matmul(transpose(stored), information)
        eye = lanes.identity(cross.shape[0], cross.shape[2:], cross.dtype)
        return transpose(solve_lower(tria(_beside(cross, eye)), transpose(stored)))


def _beside(left: Array, right: Array) -> Array:
    """Put two matrices side by side, one without lanes being the same in every lane."""
    left, right = lanes.align(left, 2, right, 2)
    shape = jnp.broadcast_shapes(left.shape[2:], right.shape[2:])
    left = jnp.broadcast_to(left, left.shape[:2] + shape)
    right = jnp.broadcast_to(right, right.shape[:2] + shape)
    return jnp.concatenate((left, right), axis=1)


def _sum_later(x: Array, axis: int = 0) -> Array:
    """Sum the entries that come after each one along an axis, without subtracting anything."""
    size = x.shape[axis]
    if size > lanes.MAX_UNROLLED:
        later = jnp.concatenate(
            (
                jax.lax.slice_in_dim(x, 1, size, axis=axis),
                jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis)),
            ),
            axis,
        )
        return jax.lax.cumsum(later, axis, reverse=True)
    mask = jnp.triu(jnp.ones((size, size), x.dtype), 1)
    mask = mask.reshape((size, size) + (1,) * (x.ndim - 1 - axis))
    return jnp.sum(mask * jnp.expand_dims(x, axis), axis=axis + 1)
