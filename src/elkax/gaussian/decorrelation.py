"""Measurements with correlated errors turned into measurements with uncorrelated ones."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.factor import symmetrize, unit_ldl, unit_ldl_change, unit_ldl_weights
from elkax.gaussian.model import Model
from elkax.scan import lanes
from elkax.scan.fallback import where_sound
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes, transpose


class Measurements(NamedTuple):
    r"""Measurements of all times, of which some may be missing.

    Attributes:
        rows: $H$ (N, D) or (T, N, D).
        cov: $R$ (N, N) or (T, N, N).
        values: (T, N), zero where missing.
        observed: (T, N).
    """

    rows: Array
    cov: Array
    values: Array
    observed: Array


def uncorrelate(model: Model) -> Model:
    """Return the same model with uncorrelated measurement errors."""
    return uncorrelate_and_pull_back(model)[0]


def uncorrelate_and_pull_back(model: Model) -> tuple[Model, Callable[[Model], Model]]:
    r"""Decorrelate, and tell what turns a gradient in the new fields into one in the model's own.

    With $R = L\,\mathrm{diag}(r)L^\top$ over the observed entries, L unit lower, $B = L^{-1}$:
    $y \leftarrow By$, $H \leftarrow BH$, errors with variances r. They vary in time if R or H does,
    or if some rows may be partly missing. Singular R is allowed: measurements without error come
    last, where no multiplier is divided by their zero pivots, so that the factor has a derivative.

    A gradient $\bar H, \bar r, \bar y$ in the new fields is $B^\top\bar H$, $B^\top\bar y$ and, in
    R, the symmetric part of $B^\top GB$ where $G_{jj} = \bar r_j$, below the diagonal
    $G_{ij} = -(\bar H(BH)^\top + \bar y(By)^\top)_{ij}/r_j$; see `unit_ldl_change`.

    Returns:
        The model with uncorrelated errors, and the function of its gradient.
    """
    if model.correlated is None:
        return model, lambda gradient: gradient
    if model.correlated.shape[-1] == 1:
        plain = model._replace(correlated=None, variances=model.correlated[..., 0])
        return plain, lambda g: g._replace(variances=None, correlated=g.variances[..., None])
    given = Measurements(model.rows, model.correlated, model.values, model.observed)
    order = _exact_last(given.cov)
    data = given if order is None else _reorder(order, given)
    inverse, variances = _factor(_in_lanes(data.cov, 2), to_lanes(data.observed))
    rows = matmul(inverse, _in_lanes(data.rows, 2))
    values = matvec(inverse, to_lanes(data.values))
    plain = model._replace(
        correlated=None,
        rows=_in_time(rows, 2),
        variances=_in_time(variances, 1),
        values=from_lanes(values),
        observed=data.observed,
    )

    def pull_back(gradient: Model) -> Model:
        h, r = _in_lanes(gradient.rows, 2), _in_lanes(gradient.variances, 1)
        y, back = to_lanes(gradient.values), transpose(inverse)
        moments = lanes.product(h, transpose(rows)), lanes.outer(y, values)
        if inverse.ndim == 2:
            cov = data.cov
            moments = [m if m.ndim == 2 else m.sum(-1) for m in moments]
        else:
            cov = _masked(_in_lanes(data.cov, 2), to_lanes(data.observed))
        eye = lanes.identity(len(r), variances.shape[1:], r.dtype)
        inner = eye * r[None] - unit_ldl_weights(cov, variances) * sum(moments)
        change = symmetrize(matmul(back, matmul(lanes.materialize(inner), inverse)))
        if inverse.ndim > 2:
            change = jnp.where(_both(to_lanes(data.observed)), change, 0.0)
        moved = Measurements(
            _sum_as(data.rows, _in_time(matmul(back, h), 2)),
            _sum_as(data.cov, _in_time(change, 2)),
            from_lanes(matvec(back, y)),
            data.observed,
        )
        if order is not None:
            moved = _reorder(jnp.argsort(order, axis=-1), moved)
        return gradient._replace(
            rows=_sum_as(given.rows, moved.rows),
            variances=None,
            correlated=moved.cov,
            values=moved.values,
        )

    return plain, pull_back


def _in_lanes(array: Array, rank: int) -> Array:
    return array if array.ndim == rank else to_lanes(array)


def _in_time(array: Array, rank: int) -> Array:
    return array if array.ndim == rank else from_lanes(array)


def _sum_as(given: Array, change: Array) -> Array:
    """Sum a gradient over time if it belongs to something without a time axis."""
    return change if change.ndim == given.ndim else change.sum(0)


def needs_no_own_factor(observed: Array) -> Array:
    """Tell for every time (T,) whether all of its entries are observed, or none."""
    return observed.all(1) | ~observed.any(1)


def _exact_last(cov: Array) -> Array | None:
    """Give an order with measurements without error last, (N,) or (T, N); None if known to be so.

    """
    exact = jnp.diagonal(cov, axis1=-2, axis2=-1) == 0
    if not isinstance(exact, jax.core.Tracer) and not exact.any():
        return None
    return jnp.argsort(exact, axis=-1, stable=True)


def _reorder(order: Array, data: Measurements) -> Measurements:
    """Put measurements into an order, (N,) or (T, N)."""
    rows, cov, values, observed = data
    if order.ndim == 1:
        cov = cov[order][:, order]
        rows = jnp.take(rows, order, axis=-2)
        return Measurements(rows, cov, values[:, order], observed[:, order])
    rows = jnp.broadcast_to(rows, (len(order), *rows.shape[-2:]))
    cov = jnp.take_along_axis(cov, order[:, :, None], axis=1)
    return Measurements(
        jnp.take_along_axis(rows, order[:, :, None], axis=1),
        jnp.take_along_axis(cov, order[:, None, :], axis=2),
        jnp.take_along_axis(values, order, axis=1),
        jnp.take_along_axis(observed, order, axis=1),
    )


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
        (N, N) and (N,), or (N, N, T) and (N, T).
    """
    whole = needs_no_own_factor(observed.T)
    if cov.ndim == 2 and not isinstance(whole, jax.core.Tracer) and bool(whole.all()):
        return unit_ldl(cov)

    def each() -> tuple[Array, Array]:
        return unit_ldl(_masked(cov, observed))

    def alike() -> tuple[Array, Array]:
        times = observed.shape[-1:]
        return jax.tree.map(
            lambda part: jnp.broadcast_to(part[..., None], part.shape + times), unit_ldl(cov)
        )

    return each() if cov.ndim == 3 else where_sound(whole, alike, each)


@_factor.defjvp
def _factor_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    cov, observed = primals
    change, _ = tangents
    inverse, variances = _factor(cov, observed)
    if inverse.ndim == 2:
        return (inverse, variances), unit_ldl_change(inverse, variances, cov, change)
    change = jnp.where(_both(observed), change[..., None] if change.ndim == 2 else change, 0.0)
    moved = unit_ldl_change(inverse, variances, _masked(cov, observed), change)
    return (inverse, variances), moved
