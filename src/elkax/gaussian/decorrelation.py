"""Measurements with correlated errors turned into measurements with uncorrelated ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.factor import symmetrize, unit_ldl, unit_ldl_change, unit_ldl_weights
from elkax.gaussian.model import Model
from elkax.scan import lanes
from elkax.scan.fallback import where_sound
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes, transpose


def uncorrelate(model: Model, *, alike: bool = False) -> Model:
    """Decorrelate; see `uncorrelate_and_pull_back`."""
    return uncorrelate_and_pull_back(model, alike=alike)[0]


def uncorrelate_and_pull_back(
    model: Model, *, alike: bool = False
) -> tuple[Model, Callable[[Model], Model]]:
    r"""Decorrelate, and tell what turns a gradient in the new fields into one in the model's own.

    With $R = L\,\mathrm{diag}(r)L^\top$ over the observed entries, L unit lower, $B = L^{-1}$:
    $y \leftarrow By$, $H \leftarrow BH$, errors with variances r. They vary in time if R or H does,
    or if some rows may be partly missing. Singular R is allowed; see `unit_ldl`.

    A gradient $\bar H, \bar r, \bar y$ in the new fields is $B^\top\bar H$, $B^\top\bar y$ and, in
    R, the symmetric part of $B^\top GB$ where $G_{jj} = \bar r_j$, and
    $G_{ij} = -(\bar H(BH)^\top + \bar y(By)^\top)_{ij}/r_j$ if i comes after j; see
    `unit_ldl_change`.

    Args:
        model: the model.
        alike: whether it is known that R is constant and that no entry or every entry is missing at
            all times; one factor is then enough.

    Returns:
        The model with uncorrelated errors, and the function of its gradient.
    """
    if model.correlated is None:
        return model, lambda gradient: gradient
    if model.correlated.shape[-1] == 1:
        plain = model._replace(correlated=None, variances=model.correlated[..., 0])

        def widen(gradient: Model) -> Model:
            variances = jnp.asarray(gradient.variances)
            return gradient._replace(variances=None, correlated=variances[..., None])

        return plain, widen
    cov, observed = _in_lanes(model.correlated, 2), to_lanes(model.observed)
    inverse, variances = unit_ldl(cov) if alike else _factor(cov, observed)
    rows = matmul(inverse, _in_lanes(model.rows, 2))
    values = matvec(inverse, to_lanes(model.values))
    plain = model._replace(
        correlated=None,
        rows=_in_time(rows, 2),
        variances=_in_time(variances, 1),
        values=from_lanes(values),
    )

    def pull_back(gradient: Model) -> Model:
        h, r = _in_lanes(gradient.rows, 2), _in_lanes(gradient.variances, 1)
        y, back = to_lanes(gradient.values), transpose(inverse)
        moments = lanes.product(h, transpose(rows)), lanes.outer(y, values)
        if inverse.ndim == 2:
            moments = [m if m.ndim == 2 else m.sum(-1) for m in moments]
            weights = unit_ldl_weights(cov, variances)
        else:
            weights = unit_ldl_weights(_masked(cov, observed), variances)
        eye = lanes.identity(len(r), r.shape[1:], r.dtype)
        inner = lanes.materialize(eye * r[None] - weights * sum(moments))
        change = symmetrize(matmul(back, matmul(inner, inverse)))
        if inverse.ndim > 2:
            change = jnp.where(_both(observed), change, 0.0)
        return gradient._replace(
            rows=_sum_as(model.rows, _in_time(matmul(back, h), 2)),
            variances=None,
            correlated=_sum_as(model.correlated, _in_time(change, 2)),
            values=from_lanes(matvec(back, y)),
        )

    return plain, pull_back


def _in_lanes(array: Array, rank: int) -> Array:
    return array if array.ndim == rank else to_lanes(array)


def _in_time(array: Array, rank: int) -> Array:
    return array if array.ndim == rank else from_lanes(array)


def _sum_as(given: Array, change: Array) -> Array:
    """Sum a gradient over time if it belongs to something without a time axis."""
    return change if change.ndim == given.ndim else change.sum(0)


def needs_no_own_factor(observed: Any) -> Any:
    """Tell for every time (T,) whether all of its entries are observed, or none."""
    return observed.all(1) | ~observed.any(1)


def _masked(cov: Array, observed: Array) -> Array:
    """Give missing entries an error of variance one of their own, (N, N, T)."""
    eye = jnp.eye(cov.shape[0], dtype=cov.dtype)[..., None]
    cov = cov[..., None] if cov.ndim == 2 else cov
    return jnp.where(_both(observed), cov, eye)


def _both(observed: Array) -> Array:
    """Tell which pairs of entries are observed, (N, N, T)."""
    return observed[:, None] & observed[None]


@jax.custom_jvp
def _factor(cov: Array, observed: Array) -> tuple[Array, Array]:
    r"""Compute $L^{-1}$ and r over the observed entries.

    A constant R has one factor for all times at which no entry or every entry is missing.

    Args:
        cov: $R$ (N, N) or (N, N, T).
        observed: (N, T).

    Returns:
        (N, N, T) and (N, T).
    """

    def each() -> tuple[Array, Array]:
        return unit_ldl(_masked(cov, observed))

    def alike() -> tuple[Array, Array]:
        times = observed.shape[-1:]
        return jax.tree.map(
            lambda part: jnp.broadcast_to(part[..., None], part.shape + times), unit_ldl(cov)
        )

    if cov.ndim == 3:
        return each()
    return where_sound(needs_no_own_factor(observed.T), alike, each)


@_factor.defjvp
def _factor_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    cov, observed = primals
    change, _ = tangents
    inverse, variances = _factor(cov, observed)
    change = jnp.where(_both(observed), change[..., None] if change.ndim == 2 else change, 0.0)
    moved = unit_ldl_change(inverse, variances, _masked(cov, observed), change)
    return (inverse, variances), moved
