"""Factorisations of small matrices over lanes.

Matrix axes come first, lanes last. Columns are run over by a `fori_loop`, which compiles fast. None
of them calls a batched triangular or LU solve, which can deadlock XLA's CPU thread pool inside a
parallel scan and is slow for small matrices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elkax.scan import lanes
from elkax.scan.lanes import (
    materialize,
    matmul,
    matvec,
    outer,
    transpose,
)

Index = Array | int


def _unit(size: int, j: Index, rank: int, dtype) -> Array:
    """Return the j-th unit vector with `rank` axes in all, the first of length `size`."""
    return (jnp.arange(size) == j).astype(dtype).reshape((size,) + (1,) * (rank - 1))


def psd_cholesky(p: Float[Array, "n n *lanes"]) -> Float[Array, "n n *lanes"]:
    r"""Compute a lower $L$ with $LL^\top = P$ for positive semi-definite $P$.

    A pivot at or below rounding level, $d_j \le 4n\,\epsilon\,P_{jj}$, gives a zero column: for a
    semi-definite matrix the rest of that column is then zero as well. NaN stays NaN.

    Args:
        p: symmetric positive semi-definite; only its lower triangle is read.

    Returns:
        Lower factor, possibly singular.
    """
    size, tolerance = p.shape[0], 4 * p.shape[0] * jnp.finfo(p.dtype).eps
    below = jnp.arange(size).reshape((size,) + (1,) * (p.ndim - 2))

    def column(j: Index, factor: Array) -> Array:
        c = p[:, j] - matvec(factor, factor[j])
        pivot = c[j]
        zero = pivot <= tolerance * p[j, j]
        scale = jnp.where(zero, 0.0, 1.0 / jnp.sqrt(jnp.where(zero, 1.0, pivot)))
        c = materialize(jnp.where(below >= j, c * scale, 0.0), 1)
        return factor + outer(c, _unit(size, j, c.ndim, p.dtype))

    return jax.lax.fori_loop(0, size, column, jnp.zeros_like(p))


def tria(a: Float[Array, "n m *lanes"]) -> Float[Array, "n n *lanes"]:
    r"""Compute the lower $L$ with $LL^\top = AA^\top$ and a non-negative diagonal.

    Householder reflections from the right, so $A$ is never squared. Each maps the row to the
    multiple of $e_i$ on its own side, so that a column that dominates is changed by a small amount
    and rounded once: over thousands of steps of a filter a relative error that is committed anew
    in every step would add up.

    Args:
        a: any real matrix with m >= n columns.

    Returns:
        Lower factor, singular if $A$ has dependent rows.

    References:
        Parlett (1971), Mathematics of Computation 25(115), for the vector without cancellation.
    """
    size, columns = a.shape[:2]
    index = jnp.arange(columns).reshape((columns,) + (1,) * (a.ndim - 2))

    def reflect(i: Index, a: Array) -> Array:
        row = jnp.where(index >= i, a[i], 0.0)
        # Scaled before squaring, so that tiny rows do not underflow.
        largest = jnp.max(jnp.abs(row), axis=0)
        row = row / jnp.where(largest > 0, largest, 1.0)
        unit = _unit(columns, i, row.ndim, a.dtype)
        rest, pivot = row * (1.0 - unit), row[i]
        square = jnp.sum(rest * rest, axis=0)
        sign = jnp.where(pivot < 0, -1.0, 1.0).astype(a.dtype)
        # v = row - sign |row| e_i, its entry i being sign (|pivot| - |row|) without the difference.
        sum_of_sizes = jnp.abs(pivot) + jnp.sqrt(pivot * pivot + square)
        head = -sign * square / jnp.where(sum_of_sizes > 0, sum_of_sizes, 1.0)
        v = rest + head * unit
        length = square + head * head
        weight = jnp.where(length > 0, 2.0 / jnp.where(length > 0, length, 1.0), 0.0)
        v, along = materialize((v, matvec(a, v) * weight), 1)
        # Turning the column keeps the diagonal >= 0.
        return (a - outer(along, v)) * (1.0 - (1.0 - sign) * unit)[None]

    reflected = jax.lax.fori_loop(0, size, reflect, a)[:, :size]
    lower = jnp.tril(jnp.ones((size, size), bool)).reshape((size, size) + (1,) * (a.ndim - 2))
    return jnp.where(lower, reflected, 0.0)


def tria_change(
    base: Float[Array, "n n *lanes_b"], a: Float[Array, "n m *lanes"], *, turned: bool = False
) -> Any:
    r"""Compute $L - B$ for the lower $L$ with $LL^\top = MM^\top$, $M = [B, 0] + A$.

    Where A is small and B about lower, the difference is found in its own digits: row i, $(p, r)$
    from the diagonal on, of norm N, is turned onto its diagonal by the least rotation that does
    it, which changes column i by $(t - x(N - p))/N$ and the later ones by
    $-(x + t/(N + p))r^\top/N$ with $t = Mr$ and $x$ column i. A reflection changes signs.

    Args:
        base: $B$, perhaps without lanes.
        a: $A$, with m >= n columns.
        turned: whether to return the first n rows of the rotation as well, in the same way.

    Returns:
        $L - B$; L has a non-negative diagonal and is singular if $M$ has dependent rows. If
        `turned`, also $[I, 0]\Theta - [I, 0]$ (n, m) with $M\Theta = [L, 0]$.
    """
    size, columns = a.shape[:2]
    index = jnp.arange(columns).reshape((columns,) + (1,) * (a.ndim - 2))
    base = jnp.zeros_like(a).at[:, :size].set(lanes.align(base, 2, a, 2)[0])
    if turned:
        base = jnp.concatenate((base, lanes.identity(columns, a.shape[2:], a.dtype)[:size]))
        a = jnp.concatenate((a, jnp.zeros_like(a)))

    def rotate(i: Index, change: Array) -> Array:
        whole = base + change
        row = jnp.where(index >= i, whole[i], 0.0)
        # Scaled before squaring, so that tiny rows do not underflow.
        largest = jnp.max(jnp.abs(row), axis=0)
        tiny = jnp.finfo(a.dtype).tiny
        row = row * (1.0 / jnp.where(largest >= tiny, largest, 1.0))
        rest, pivot = row * (1.0 - _unit(columns, i, row.ndim, a.dtype)), row[i]
        square = jnp.sum(rest * rest, axis=0)
        norm = jnp.sqrt(pivot * pivot + square)
        # The difference of norm and |pivot| without a difference.
        far = norm + jnp.abs(pivot)
        close = square / jnp.where(far > 0, far, 1.0)
        ahead = pivot >= 0
        short, long = jnp.where(ahead, close, far), jnp.where(ahead, far, close)
        inverse, scale = 1.0 / jnp.where(norm > 0, norm, 1.0), 1.0 / jnp.where(long > 0, long, 1.0)
        rest, short, inverse, scale = materialize((rest, short, inverse, scale), 1)
        column, along = whole[:, i], matvec(whole, rest)
        lost, gained = (column + along * scale) * inverse, (along - column * short) * inverse
        lost, gained = materialize((lost, gained), 1)
        return (change - outer(lost, rest)).at[:, i].add(gained)

    found = jax.lax.fori_loop(0, size, rotate, a)
    lower = jnp.tril(jnp.ones((size, size), bool)).reshape((size, size) + (1,) * (a.ndim - 2))
    change = jnp.where(lower, found[:size, :size], -base[:size, :size])
    return (change, found[size:]) if turned else change


def solve_lower(
    factor: Float[Array, "n n *lanes"],
    b: Float[Array, "n m *lanes_b"],
    *,
    transposed: bool = False,
) -> Float[Array, "n m *lanes_x"]:
    r"""Solve $LX = B$, or $L^\top X = B$, by substitution over lanes.

    Args:
        factor: lower $L$; where a pivot is zero, as `psd_cholesky` makes it, $X$ is zero.
        b: right-hand sides.
        transposed: solve with $L^\top$.

    Returns:
        $X$.
    """
    factor, b = lanes.align(factor, 2, b, 2)
    size = factor.shape[0]
    if transposed:
        factor = transpose(factor)
    start = jnp.zeros(jnp.broadcast_shapes(b.shape, b.shape[:2] + factor.shape[2:]), b.dtype)

    def row(k: Index, x: Array) -> Array:
        i = size - 1 - k if transposed else k
        pivot = factor[i, i]
        rest = b[i] - matvec(transpose(x), factor[i])
        value = materialize(jnp.where(pivot == 0, 0.0, rest / jnp.where(pivot == 0, 1.0, pivot)), 1)
        return x + _unit(size, i, x.ndim, x.dtype) * value

    return jax.lax.fori_loop(0, size, row, start)


def cho_solve(
    factor: Float[Array, "n n *lanes"],
    b: Float[Array, "n m *lanes_b"],
) -> Float[Array, "n m *lanes_x"]:
    r"""Solve $LL^\top X = B$ over lanes."""
    half = solve_lower(factor, b)
    return solve_lower(factor, half, transposed=True)


@jax.custom_jvp
def unit_ldl(
    r: Float[Array, "n n *lanes"],
) -> tuple[Float[Array, "n n *lanes"], Float[Array, "n *lanes"]]:
    r"""Compute the inverse of the unit lower $L$, and $d$, with $R = L\,\mathrm{diag}(d)L^\top$.

    The rows of $L^{-1}$ turn correlated measurements into uncorrelated ones. Semi-definite
    $R$ is allowed: a zero pivot leaves its column alone and $d_j = 0$. See `unit_ldl_change` for
    the derivative. It exists where a measurement has no error, $R_{ii} = 0$, because such a
    measurement comes after all others, wherever it stands: L is lower in that order.

    Args:
        r: symmetric positive semi-definite.

    Returns:
        $L^{-1}$ and $d$.
    """
    size = r.shape[0]
    after = _comes_after(r)
    eye = lanes.identity(size, r.shape[2:], r.dtype)

    def eliminate(j: Index, work: Array) -> Array:
        schur, inverse = work[:, :size], work[:, size:]
        zero = _is_zero_pivot(schur[j, j], r[j, j], size)
        multiplier = schur[:, j] / jnp.where(zero, 1.0, schur[j, j])
        multiplier = materialize(jnp.where(after[:, j] & ~zero, multiplier, 0.0), 1)
        schur = schur - outer(multiplier, schur[j])
        inverse = inverse - outer(multiplier, inverse[j])
        return jnp.concatenate((schur, inverse), axis=1)

    work = jax.lax.fori_loop(0, size, eliminate, jnp.concatenate((r, eye), axis=1))
    pivots = lanes.diagonal_of(work[:, :size])
    return work[:, size:], pivots


def unit_ldl_weights(r: Float[Array, "n n *lanes"], pivots: Array) -> Array:
    r"""Compute $1/d_j$ where i comes after j, (n, n, lanes), 0 elsewhere and at zero pivots."""
    zero = _is_zero_pivot(pivots, lanes.diagonal_of(r), len(pivots))
    inverse = jnp.where(zero, 0.0, 1.0 / jnp.where(zero, 1.0, pivots))
    return jnp.where(_comes_after(r), inverse[None], 0.0)


def _comes_after(r: Array) -> Array:
    """Tell whether i comes after j in the order of elimination, (n, n, lanes)."""
    size = r.shape[0]
    below = jnp.tril(jnp.ones((size, size), bool), -1).reshape((size, size) + (1,) * (r.ndim - 2))
    exact = lanes.diagonal_of(r) == 0
    first, second = exact[:, None], exact[None]
    return (first & ~second) | ((first == second) & below)


def _is_zero_pivot(pivot: Array, variance: Array, size: int) -> Array:
    return pivot <= 4 * size * jnp.finfo(pivot.dtype).eps * variance


def unit_ldl_change(inverse: Array, pivots: Array, r: Array, change: Array) -> tuple[Array, Array]:
    r"""Differentiate `unit_ldl`.

    With $B = L^{-1}$ and $G = B\,dR\,B^\top$, which is $(B\,dL)_{ij}d_j$ where i comes after j:
    $dd_j = G_{jj}$ and $dB = -\Phi B$ with $\Phi_{ij} = G_{ij}/d_j$ there, 0 in the column of a
    zero pivot.

    Args:
        inverse: $B$.
        pivots: $d$.
        r: $R$.
        change: $dR$, its symmetric part counts.

    Returns:
        $dB$ and $dd$.
    """
    moved = matmul(matmul(inverse, symmetrize(change)), transpose(inverse))
    moved, weights = lanes.align(moved, 2, unit_ldl_weights(r, pivots), 2)
    return -matmul(moved * weights, inverse), lanes.diagonal_of(moved)


@unit_ldl.defjvp
def _unit_ldl_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple, tuple]:
    factors = unit_ldl(*primals)
    return factors, unit_ldl_change(*factors, *primals, *tangents)


def symmetrize(p: Float[Array, "n n *lanes"]) -> Float[Array, "n n *lanes"]:
    """Average a matrix with its transpose."""
    return 0.5 * (p + transpose(p))


def gram(a: Float[Array, "n m *lanes"]) -> Float[Array, "n n *lanes"]:
    r"""Compute $AA^\top$ in every lane."""
    return matmul(a, transpose(a))
