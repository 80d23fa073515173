"""Moments of emissions with gaps, given everything that was observed."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from elkax.scan.fallback import all_lanes
from elkax.scan.lanes import matmul, matvec, outer

# Numbers in an array of N x N per time step; that many stay in a processor's cache.
CHUNK_NUMBERS = 2**15


class EmissionModel(NamedTuple):
    r"""How emissions depend on the state: $y_t = H_tz_t + c_t + N(0, R_t)$.

    Attributes:
        weights: $H$, (N, D) or (T, N, D).
        offset: $c$, bias and inputs together, (N,) or (T, N).
        cov: $R$, (N, N) or (T, N, N); where `diagonal`, its diagonal (N,) or (T, N).
    """

    weights: Array
    offset: Array
    cov: Array


class Spread(NamedTuple):
    r"""Covariances of some x, summed over time, given what was observed.

    Attributes:
        cross: $\sum_t \mathrm{Cov}[z_t, x_t \mid \text{observed}]$ (D, N).
        covariance: $\sum_t \mathrm{Cov}[x_t \mid \text{observed}]$ (N, N).
    """

    cross: Array
    covariance: Array


class Completed(NamedTuple):
    r"""Emissions without gaps, and how uncertain they and their errors are.

    Attributes:
        means: $E[y_t \mid \text{observed}]$ (T, N); observed entries as they are.
        emissions: covariances of $y_t$, which come from the gaps.
        errors: covariances of $y_t - H_tz_t$.
    """

    means: Array
    emissions: Spread
    errors: Spread


def complete(
    emissions: Float[Array, "T N"],
    model: EmissionModel,
    state_means: Float[Array, "T D"],
    state_covariances: Float[Array, "T D D"],
    *,
    diagonal: bool,
) -> Completed:
    r"""Compute the posterior moments of emissions of which some entries are missing.

    Split a row into observed entries o and missing entries m. Given the state,

    $$y_m = H_m z + c_m + W (y_o - H_o z - c_o) + e,\quad W = R_{mo}R_{oo}^{-1},\quad
      e \sim N(0, R_{mm} - W R_{om}),$$

    which is affine in z, so that the moments of z give those of y. A row that is missing as a whole
    has no o. A singular $R_{oo}$ is allowed: an entry that others determine is not inverted.

    Args:
        emissions: $y_{1:T}$, NaN where missing.
        model: how the emissions depend on the state.
        state_means: $E[z_t \mid \text{observed}]$.
        state_covariances: $\mathrm{Cov}[z_t \mid \text{observed}]$.
        diagonal: whether `model.cov` holds variances only.

    Returns:
        Means and summed covariances, not NaN unless a parameter is. O(T N (N + D) D) work, and
        O(T N^3) where R is not diagonal and any row of any series is observed in part.
    """
    fill = partial(_fill_in_chunks, emissions, model, state_means, state_covariances)
    if diagonal:
        # Errors of different entries are independent, so observed ones say nothing about others.
        return fill(variances_only=True, regress=False)
    missing = jnp.isnan(emissions)
    return jax.lax.cond(
        all_lanes(jnp.all(missing, axis=1) | ~jnp.any(missing, axis=1)),
        partial(fill, variances_only=False, regress=False),
        partial(fill, variances_only=False, regress=True),
    )


def _fill_in_chunks(
    emissions: Array,
    model: EmissionModel,
    means: Array,
    covariances: Array,
    *,
    variances_only: bool,
    regress: bool,
) -> Completed:
    """Go through time in chunks, so that no array of T x N x N is made."""
    length, size = emissions.shape
    steps = max(1, min(length, CHUNK_NUMBERS // size**2))
    ranks = (2, 1, 1 if variances_only else 2)
    varying = tuple(x if x.ndim > rank else None for x, rank in zip(model, ranks, strict=True))

    def to_chunks(x: Array) -> Array:
        # Zeros count as observed emissions, which add nothing to the sums.
        x = jnp.pad(x, ((0, -length % steps),) + ((0, 0),) * (x.ndim - 1))
        return jnp.moveaxis(x.reshape((-1, steps) + x.shape[1:]), 1, -1)

    def step(sums: tuple, chunk: tuple) -> tuple[tuple, Array]:
        y, now, mean, cov = chunk
        now = EmissionModel(*(a if b is None else b for a, b in zip(model, now, strict=True)))
        if variances_only:
            now = now._replace(cov=now.cov[:, None] * _eye(size, now.cov.ndim + 1, mean.dtype))
        filled, *spreads = _fill(y, now, mean, cov, regress=regress)
        return jax.tree.map(jnp.add, sums, tuple(spreads)), filled

    none = Spread(
        jnp.zeros((means.shape[1], size), means.dtype), jnp.zeros((size, size), means.dtype)
    )
    rows = jax.tree.map(to_chunks, (emissions, varying, means, covariances))
    spreads, filled = jax.lax.scan(step, (none, none), rows)
    return Completed(jnp.moveaxis(filled, -1, 1).reshape(-1, size)[:length], *spreads)


def _fill(
    y: Float[Array, "N L"],
    model: EmissionModel,
    mean: Float[Array, "D L"],
    cov: Float[Array, "D D L"],
    *,
    regress: bool,
) -> tuple[Float[Array, "N L"], Spread, Spread]:
    """Give the completed rows, and how they and their errors spread; time along the lanes."""
    missing = jnp.isnan(y)
    known = jnp.where(missing, 0.0, y)
    H, R = _with_lanes(model.weights, 2), _with_lanes(model.cov, 2)
    predicted = matvec(H, mean) + _with_lanes(model.offset, 1)
    loading = jnp.where(missing[:, None], H, 0.0)
    filled = jnp.where(missing, predicted, known)
    if regress:
        gain, spread = _regress(R, missing)
        filled = filled + matvec(gain, jnp.where(missing, 0.0, known - predicted))
        loading = loading - matmul(gain, H)
    else:
        spread = jnp.where(missing[:, None] & missing[None], R, 0.0)
    within = jnp.sum(spread, -1)

    def sum_up(loading: Array) -> Spread:
        carried = matmul(loading, cov)
        moved = jnp.einsum("ndl,mdl->nm", carried, loading, precision="highest")
        return Spread(jnp.sum(carried, -1).T, moved + within)

    return filled, sum_up(loading), sum_up(loading - H)


def _regress(
    R: Float[Array, "N N *lanes"], missing: Bool[Array, "N L"]
) -> tuple[Float[Array, "N N L"], Float[Array, "N N L"]]:
    r"""Regress missing entries on observed ones: $R_{mo}R_{oo}^{-1}$ and the covariance left over.

    By sweeping R over the observed entries one by one. What is left of the variance of an entry
    that the entries before it determine is at rounding level, and it is passed over.

    References:
        Goodnight (1979), "A tutorial on the sweep operator", The American Statistician 33.
    """
    size = R.shape[0]
    tolerance = 4 * size * jnp.finfo(R.dtype).eps
    position = jnp.arange(size)[:, None]

    def sweep(k: Array | int, work: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix, used = work
        pivot = matrix[k, k]
        use = ~missing[k] & (pivot > tolerance * R[k, k])
        pivot = jnp.where(use, pivot, 1.0)
        row = matrix[k] / pivot
        swept = matrix - outer(row, matrix[k])
        swept = swept.at[k].set(row).at[:, k].set(row).at[k, k].set(-1.0 / pivot)
        return jnp.where(use, swept, matrix), used | (use & (position == k))

    matrix = jnp.broadcast_to(R, (size, size, missing.shape[-1]))
    matrix, used = jax.lax.fori_loop(0, size, sweep, (matrix, jnp.zeros_like(missing)))
    gain = jnp.where(missing[:, None] & used[None], matrix, 0.0)
    return gain, jnp.where(missing[:, None] & missing[None], matrix, 0.0)


def _with_lanes(x: Array, rank: int) -> Array:
    return x if x.ndim > rank else x[..., None]


def _eye(size: int, ndim: int, dtype: jnp.dtype) -> Array:
    return jnp.eye(size, dtype=dtype).reshape((size, size) + (1,) * (ndim - 2))
