"""Square-root form: a covariance is stored as a lower factor."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from elkax.gaussian.factor import gram, psd_cholesky, solve_lower, tria, tria_change
from elkax.scan import lanes
from elkax.scan.lanes import dot, halves, materialize, matmul, matvec, outer, transpose


class Turn(NamedTuple):
    r"""How the noise of a state turns into that of the next one, see `Whitened`.

    With $[FL, L_Q]\Theta = [L_+, 0]$, and $w = a + \Gamma x$ what a measurement tells of the noise
    of $z_+ = m_+ + L_+w$. What is near the identity is held as what differs from it.

    Attributes:
        turned: $\Theta_{11} - I$ (D, D).
        rest: $\Theta_{12}$ (D, D).
        gamma: $\Gamma - I$ (D, D).
        shift: $a$ (D,).
    """

    turned: Array
    rest: Array
    gamma: Array
    shift: Array


@dataclass(frozen=True)
class SquareRoot:
    r"""Gaussian algebra on lower factors, $P = LL^\top$ and $J = ZZ^\top$, possibly singular.

    Covariances are positive semi-definite by construction and keep about twice the digits of
    the covariance form, at roughly twice the cost.

    In types of few digits a factor that a recurrence carries is $[L, E]$ (D, 2D) with $E$ what
    rounding left out of $L$, and so is a gain: one that changes little in a step would otherwise
    be rounded anew in each, which adds up over as many steps as the model remembers.

    Args:
        exact_entries: whether measurements without error may occur.
    """

    exact_entries: bool = True

    def encode(self, covariance: Array) -> Array:
        """Store a covariance as its guarded Cholesky factor."""
        return psd_cholesky(covariance)

    def exact(self, matrix: Array) -> Array:
        r"""Return $[L, 0]$ where the type has few digits."""
        few = lanes.is_short(matrix.dtype)
        return lanes.with_rest(matrix, jnp.zeros_like(matrix)) if few else matrix

    def decode(self, stored: Float[Array, "n k *lanes"]) -> Array:
        r"""Return $LL^\top$."""
        return gram(halves(stored)[0])

    def variances(self, stored: Float[Array, "n k *lanes"]) -> Array:
        r"""Return the diagonal of $LL^\top$."""
        factor, _ = halves(stored)
        return jnp.sum(factor * factor, axis=1)

    def rounding(self, dtype: DTypeLike) -> tuple[float, float]:
        r"""Give $\epsilon^2$ and 64, since factors are rounded; see `Form`."""
        return float(jnp.finfo(dtype).eps) ** 2, 64.0

    def times(self, stored: Float[Array, "n k *lanes"], x: Array) -> Array:
        r"""Compute $L(L^\top x)$."""
        factor, _ = halves(stored)
        return matvec(factor, matvec(transpose(factor), x))

    def predict(self, weights: Array, stored: Array, noise: Array) -> Array:
        r"""Compute the factor of $FLL^\top F^\top + L_QL_Q^\top$ by one triangularisation."""
        noise, _ = halves(noise)
        kept, change = lanes.advance_apart(weights, stored)
        if halves(stored)[1] is None:
            return tria(beside(materialize(kept + change), noise))
        change = tria_change(kept, beside(materialize(change), noise))
        return lanes.with_rest(*lanes.two_sum(*lanes.align(kept, 2, change, 2)))

    def predict_turned(self, weights: Array, stored: Array, noise: Array) -> tuple[Array, Turn]:
        r"""Predict, and tell how the noise of the state turns into that of the prediction.

        Returns:
            The factor $L_+$, and the start of a `Turn`.
        """
        noise, _ = halves(noise)
        size = noise.shape[0]
        kept, change = lanes.advance_apart(weights, stored)
        change, turned = tria_change(kept, beside(materialize(change), noise), turned=True)
        kept, change = lanes.align(kept, 2, change, 2)
        gamma = jnp.zeros_like(change)
        turn = Turn(turned[:, :size], turned[:, size:], gamma, gamma[:, 0])
        if halves(stored)[1] is None:
            return materialize(kept + change), turn
        return lanes.with_rest(*lanes.two_sum(kept, change)), turn

    def update_turned(
        self, stored: Array, turn: Turn, projection: Array, variance: Array, s: Array, v: Array
    ) -> tuple[Array, Turn]:
        """Condition as `update` does, and go on with a `Turn`; v is the innovation."""
        factor, low = halves(stored)
        size = factor.shape[0]
        told = lanes.add(projection, matvec(turn.gamma, projection))
        told = lanes.scale(told, 1.0 / s)
        eye = lanes.identity(size, factor.shape[2:], factor.dtype)
        both = jnp.concatenate((factor, eye + turn.gamma))
        keep, kept, change = shrink_columns(both, projection, variance)
        gamma = keep[None] * turn.gamma + change[size:] + (keep - 1.0)[None] * eye
        turn = turn._replace(gamma=gamma, shift=lanes.add(turn.shift, lanes.scale(told, v)))
        kept, change = kept[:size], change[:size]
        if low is None:
            return kept + change, turn
        return lanes.with_rest(*lanes.two_sum(kept, keep[None] * low + change)), turn

    def project(self, stored: Array, row: Array, variance: Array) -> tuple[Array, Array]:
        r"""Compute $f = L^\top h$ and $s = f^\top f + r$; arguments as `Covariance.project`."""
        f = matvec(transpose(halves(stored)[0]), row)
        return f, dot(f, f) + variance

    def gain(self, stored: Array, projection: Array) -> Array:
        r"""Compute $Lf$, the covariance of the state with the scalar."""
        return matvec(halves(stored)[0], projection)

    def update(
        self, stored: Array, row: Array, projection: Array, variance: Array, s: Array, gain: Array
    ) -> Array:
        """Condition on the scalar; arguments and returns as `Covariance.update`."""
        del row, s, gain
        stored, low = halves(stored)
        keep, kept, change = shrink_columns(stored, projection, variance)
        if low is None:
            return kept + change
        return lanes.with_rest(*lanes.two_sum(kept, keep[None] * low + change))

    def correct(self, stored: Array, row: Array, variance: Array, gain: Array) -> Array:
        r"""Compute the factor of `Covariance.correct` from $[L - k(L^\top h)^\top, \sqrt rk]$."""
        stored, low = halves(stored)
        noise = lanes.scale(gain, jnp.sqrt(variance))[:, None]
        change = -outer(gain, matvec(transpose(stored), row))
        if low is None:
            return tria(beside(materialize(stored + change), noise))
        change = tria_change(stored, beside(materialize(low + change), noise))
        return lanes.with_rest(*lanes.two_sum(*lanes.align(stored, 2, change, 2)))

    def settle(self, stored: Array) -> Array:
        """Return the factor as it is."""
        return stored

    def accumulate(self, stored: Array, low: Array, columns: Array) -> tuple[Array, Array]:
        r"""Compute the factor of $ZZ^\top + GG^\top$; arguments as `Covariance.accumulate`."""
        if not lanes.is_short(stored.dtype):
            return tria(beside(stored, columns)), low
        change = tria_change(stored, beside(low, columns))
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
            return transpose(solve_lower(tria(beside(cross, eye)), transpose(factor)))
        change = tria_change(eye, beside(jnp.zeros_like(cross), cross))
        whole = transpose(solve_lower(eye + change, transpose(factor)))
        return lanes.subtract(stored, matmul(whole, transpose(change)))


def shrink_columns(stored: Array, projection: Array, variance: Array) -> tuple[Array, Array, Array]:
    r"""Multiply a factor with the one that a scalar measurement brings, $\Gamma$.

    With $f = L^\top h$ and $\sigma_j = r + \sum_{i>j} f_i^2$,
    $I - ff^\top/\sigma_0 = \Gamma\Gamma^\top$, and $L\Gamma$ has the columns
    $\sqrt{\sigma_j/\sigma_{j-1}}\,L_j - f_j(\sigma_j\sigma_{j-1})^{-1/2}\sum_{i>j}f_iL_i$:
    nothing cancels on the diagonal and r = 0 is ordinary.

    Args:
        stored: $L$ (m, n, lanes), or any matrix to be multiplied with $\Gamma$.
        projection: $f$ (n, lanes), zero where nothing is conditioned on.
        variance: $r$.

    Returns:
        1 for the columns that lose little (n, lanes), and $L\Gamma$ as a sum of two: these columns
        as they are, and what is added.

    References:
        Carlson (1973), AIAA Journal 11(9); here for a lower factor.
    """
    f = projection
    later, variance = lanes.align(_sum_later(f * f), 1, variance, 0)
    later = later + variance  # sigma_j
    from_here = later + f * f  # sigma_{j-1}
    stored, f = lanes.align(stored, 2, f, 1)
    later, from_here = (lanes.align(stored, 2, each, 1)[1] for each in (later, from_here))
    columns = _sum_later(f[None] * stored, axis=1)
    some = from_here > 0
    safe = jnp.where(some, from_here, 1.0)
    shrink = jnp.where(some, jnp.sqrt(later / safe), 1.0)
    left = some & (later > 0)
    # Each by itself, for their product may underflow.
    inverse = jax.lax.rsqrt(jnp.where(left, later, 1.0)) * jax.lax.rsqrt(safe)
    weight = f * jnp.where(left, inverse, 0.0)
    # Where little is taken away, 1 - shrink without the difference, so that it rounds once.
    loss = jnp.where(some, f * f / (safe * (1.0 + shrink)), 0.0)
    little = shrink > 0.5
    keep, factor = jnp.where(little, 1.0, 0.0), jnp.where(little, -loss, shrink)
    keep, factor, weight, columns = materialize((keep, factor, weight, columns), 1)
    return keep, keep[None] * stored, stored * factor[None] - columns * weight[None]


def beside(left: Array, right: Array) -> Array:
    """Put two matrices side by side, one without lanes being the same in every lane."""
    left, right = lanes.align(left, 2, right, 2)
    shape = jnp.broadcast_shapes(left.shape[2:], right.shape[2:])
    left = jnp.broadcast_to(left, left.shape[:2] + shape)
    right = jnp.broadcast_to(right, right.shape[:2] + shape)
    return jnp.concatenate((left, right), axis=1)


def _sum_later(x: Array, axis: int = 0) -> Array:
    """Sum the entries that come after each one along an axis, without subtracting anything."""
    size = x.shape[axis]
    # Without lanes a running sum is the fastest; with them it is one for each lane.
    if size > lanes.MAX_UNROLLED or x.ndim == axis + 1:
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
