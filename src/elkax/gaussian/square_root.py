"""Square-root form: a covariance is stored as a lower factor."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.gaussian.factor import gram, is_regular, psd_cholesky, solve_lower, tria, tria_change
from elkax.scan import lanes
from elkax.scan.lanes import dot, halves, materialize, matmul, matvec, transpose


@dataclass(frozen=True)
class SquareRoot:
    r"""Gaussian algebra on lower factors, $P = LL^\top$ and $J = ZZ^\top$, possibly singular.

    Covariances are positive semi-definite by construction and keep about twice the digits of
    the covariance form, at roughly twice the cost.

    In types of few digits a factor that a recurrence carries is $[L, E]$ (D, 2D) with $E$ what
    rounding left out of $L$, and so is a gain: one that changes little in a step would otherwise
    be rounded anew in each, which adds up over as many steps as the model remembers.
    """

    def encode(self, covariance: Float[Array, "n n *lanes"]) -> Array:
        """Store a covariance as its guarded Cholesky factor."""
        return psd_cholesky(covariance)

    def exact(self, matrix: Float[Array, "n n *lanes"]) -> Array:
        r"""Return $[L, 0]$ where the type has few digits."""
        few = lanes.is_short(matrix.dtype)
        return lanes.with_rest(matrix, jnp.zeros_like(matrix)) if few else matrix

    def decode(self, stored: Float[Array, "n k *lanes"]) -> Array:
        r"""Return $LL^\top$."""
        return gram(halves(stored)[0])

    def cholesky(self, stored: Float[Array, "n k *lanes"], *, written_out: bool = False) -> Array:
        """Return the stored factor."""
        del written_out
        return halves(stored)[0]

    def times(self, stored: Float[Array, "n k *lanes"], x: Array) -> Array:
        r"""Compute $L(L^\top x)$."""
        factor, _ = halves(stored)
        return matvec(factor, matvec(transpose(factor), x))

    def predict(self, weights: Array, stored: Array, noise: Array) -> Array:
        r"""Compute the factor of $FLL^\top F^\top + L_QL_Q^\top$ by one triangularisation."""
        noise, _ = halves(noise)
        kept, change = lanes.advance_apart(weights, stored)
        if halves(stored)[1] is None:
            return tria(_beside(materialize(kept + change), noise))
        change = tria_change(kept, _beside(materialize(change), noise))
        return lanes.with_rest(*lanes.two_sum(*lanes.align(kept, 2, change, 2)))

    def carry(self, weights: Array, stored: Array, noise: Array) -> tuple[Array, Array]:
        r"""Compute $LL^\top F^\top$ and the factor that `predict` does."""
        factor, _ = halves(stored)
        cross = matmul(factor, transpose(matmul(halves(weights)[0], factor)))
        return cross, self.predict(weights, stored, noise)

    def reverse(self, weights: Array, stored: Array, noise: Array) -> tuple[Array, Array, Array]:
        r"""Turn a step around; arguments and returns as `Covariance.reverse`.

        The factor of the joint covariance of $(z', z)$, by one triangularisation, has the blocks
        $L'$, $GL'$ and, below the diagonal, a factor of $U$: one solve instead of the two with
        $FPF^\top + Q$, and no squares. In types of few digits it is that of $(z', z - Ez')$ with
        $E = \mathrm{diag}(e)$ from `lanes.split_identity` of F, which has $(G - E)L'$ in place of
        $GL'$.
        """
        size, few = stored.shape[0], lanes.is_short(stored.dtype)
        near, _ = lanes.split_identity(weights)
        kept, change = lanes.advance_apart(weights, stored)
        if few:
            change = materialize(change)
            moved = kept + change
            apart = lanes.scale_rows(stored, 1.0 - near) - lanes.scale_rows(change, near)
            below = _beside(apart, lanes.scale_rows(noise, -near))
        else:
            moved = materialize(kept + change)
            below = _beside(stored, jnp.zeros_like(stored))
        above = _beside(moved, noise)
        joint = tria(jnp.concatenate((above, below), axis=0))
        factor, cross, rest = joint[:size, :size], joint[size:, :size], joint[size:, size:]
        factor, cross = materialize((factor, cross))
        gain = transpose(solve_lower(factor, transpose(cross), transposed=True, written_out=True))
        return lanes.add_identity(near, gain) if few else gain, rest, is_regular(factor)

    def smooth(
        self, weights: Array, stored: Array, noise: Array, after: Array
    ) -> tuple[Array, Array, Array]:
        """Carry a covariance back; arguments and returns as `Covariance.smooth`."""
        gain, rest, regular = self.reverse(weights, stored, noise)
        return gain, self.predict(gain, after, rest), regular

    def project(self, stored: Array, row: Array, variance: Array) -> tuple[Array, Array]:
        r"""Compute $f = L^\top h$ and $s = f^\top f + r$; arguments as `Covariance.project`."""
        f = matvec(transpose(halves(stored)[0]), row)
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
        stored, low = halves(stored)
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
        kept, change = keep[None] * stored, stored * factor[None] - columns * weight[None]
        if low is None:
            return gain, kept + change
        return gain, lanes.with_rest(*lanes.two_sum(kept, keep[None] * low + change))

    def accumulate(self, stored: Array, low: Array, columns: Array) -> tuple[Array, Array]:
        r"""Compute the factor of $ZZ^\top + GG^\top$; arguments as `Covariance.accumulate`."""
        if not lanes.is_short(stored.dtype):
            return tria(_beside(stored, columns)), low
        change = tria_change(stored, _beside(low, columns))
        return lanes.two_sum(*lanes.align(stored, 2, change, 2))

    def condition(self, stored: Array, information: Array) -> Array:
        r"""Compute a factor of $(I + PJ)^{-1}P$ for $P = LL^\top$, $J = ZZ^\top$.

        With $\Psi\Psi^\top = I + L^\top ZZ^\top L$, found by triangularising $[I, L^\top Z]$, it
        is $X = L\Psi^{-\top} = L - X(\Psi - I)^\top$.
        """
        factor, low = halves(stored)
        cross = matmul(transpose(factor), halves(information)[0])
        eye = lanes.identity(cross.shape[0], cross.shape[2:], cross.dtype)
        if low is None:
            return transpose(solve_lower(tria(_beside(cross, eye)), transpose(factor)))
        change = tria_change(eye, _beside(jnp.zeros_like(cross), cross))
        whole = transpose(solve_lower(eye + change, transpose(factor)))
        return lanes.subtract(stored, matmul(whole, transpose(change)))


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
