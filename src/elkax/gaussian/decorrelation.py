"""Measurements with correlated errors turned into measurements with uncorrelated ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.factor import unit_ldl, unit_ldl_change
from elkax.gaussian.model import Model
from elkax.scan.fallback import where_sound
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes


def uncorrelate(model: Model) -> Model:
    """Return the same model with uncorrelated measurement errors."""
    if model.correlated is None:
        return model
    parts = decorrelate(model.rows, model.correlated, model.values, model.observed)
    names = ("rows", "variances", "values", "observed")
    return model._replace(correlated=None, **dict(zip(names, parts, strict=True)))


def decorrelate(
    rows: Array, cov: Array, values: Array, observed: Array
) -> tuple[Array, Array, Array, Array]:
    r"""Turn correlated measurements into uncorrelated ones.

    With $R = L\,\mathrm{diag}(r)L^\top$ over the observed entries, L unit lower:
    $y \leftarrow L^{-1}y$, $H \leftarrow L^{-1}H$, errors with variances r. Singular R is allowed:
    measurements without error come last, where no multiplier is divided by their zero pivots, so
    that the factor has a derivative.

    Args:
        rows: $H$ (N, D) or (T, N, D).
        cov: $R$ (N, N) or (T, N, N).
        values: (T, N), zero where missing.
        observed: (T, N).

    Returns:
        New rows, variances, values, and which are observed, in the new order. They vary in time if
        R or H does, or if some rows may be partly missing.
    """
    if cov.shape[-1] == 1:
        return rows, cov[..., 0], values, observed
    exact = jnp.diagonal(cov, axis1=-2, axis2=-1) == 0
    if isinstance(exact, jax.core.Tracer) or bool(exact.any()):
        order = jnp.argsort(exact, axis=-1, stable=True)
        rows, cov, values, observed = _reorder(order, rows, cov, values, observed)
    inverse, variances = _factor(cov if cov.ndim == 2 else to_lanes(cov), to_lanes(observed))
    constant = inverse.ndim == 2
    new_rows = matmul(inverse, rows if rows.ndim == 2 else to_lanes(rows))
    new_values = from_lanes(matvec(inverse, to_lanes(values)))
    return (
        new_rows if constant and rows.ndim == 2 else from_lanes(new_rows),
        variances if constant else from_lanes(variances),
        new_values,
        observed,
    )


def needs_no_own_factor(observed: Array) -> Array:
    """Tell for every time (T,) whether all of its entries are observed, or none."""
    return observed.all(1) | ~observed.any(1)


def _reorder(
    order: Array, rows: Array, cov: Array, values: Array, observed: Array
) -> tuple[Array, Array, Array, Array]:
    """Put measurements into an order, (N,) or (T, N)."""
    if order.ndim == 1:
        cov = cov[order][:, order]
        return jnp.take(rows, order, axis=-2), cov, values[:, order], observed[:, order]
    rows = jnp.broadcast_to(rows, (len(order), *rows.shape[-2:]))
    cov = jnp.take_along_axis(cov, order[:, :, None], axis=1)
    return (
        jnp.take_along_axis(rows, order[:, :, None], axis=1),
        jnp.take_along_axis(cov, order[:, None, :], axis=2),
        jnp.take_along_axis(values, order, axis=1),
        jnp.take_along_axis(observed, order, axis=1),
    )


def _masked(cov: Array, observed: Array) -> Array:
    """Give missing entries an error of variance one of their own, (N, N, T)."""
    eye = jnp.eye(cov.shape[0], dtype=cov.dtype)[..., None]
    cov = cov[..., None] if cov.ndim == 2 else cov
    return jnp.where(observed[:, None] & observed[None], cov, eye)


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
    change = jnp.where(observed[:, None] & observed[None], change[..., None] if change.ndim == 2 else change, 0.0)
    moved = unit_ldl_change(inverse, variances, _masked(cov, observed), change)
    return (inverse, variances), moved
