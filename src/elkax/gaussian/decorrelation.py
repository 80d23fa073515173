"""Measurements with correlated errors turned into measurements with uncorrelated ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.factor import unit_ldl
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
    whole = needs_no_own_factor(observed)
    if cov.ndim == 3:
        return *_decorrelate_each(rows, cov, values, observed), observed
    if not isinstance(whole, jax.core.Tracer) and bool(whole.all()):
        return *_decorrelate_alike(rows, cov, values), observed

    def alike() -> tuple[Array, Array, Array]:
        new_rows, variances, new_values = _decorrelate_alike(rows, cov, values)
        length = (values.shape[0],)
        return (
            jnp.broadcast_to(new_rows, length + new_rows.shape[-2:]),
            jnp.broadcast_to(variances, length + variances.shape),
            new_values,
        )

    new = where_sound(whole, alike, lambda: _decorrelate_each(rows, cov, values, observed))
    return *new, observed


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


def _decorrelate_alike(rows: Array, cov: Array, values: Array) -> tuple[Array, Array, Array]:
    """Decorrelate with one factor for all times."""
    inverse, variances = unit_ldl(cov)
    h = rows if rows.ndim == 2 else to_lanes(rows)
    new_rows = matmul(inverse, h)
    new_values = from_lanes(matvec(inverse, to_lanes(values)))
    return new_rows if rows.ndim == 2 else from_lanes(new_rows), variances, new_values


def _decorrelate_each(
    rows: Array, cov: Array, values: Array, observed: Array
) -> tuple[Array, Array, Array]:
    """Decorrelate what is observed at every time with a factor of its own."""
    mask = to_lanes(observed)
    r = cov[..., None] if cov.ndim == 2 else to_lanes(cov)
    eye = jnp.eye(cov.shape[-1], dtype=cov.dtype)[..., None]
    inverse, variances = unit_ldl(jnp.where(mask[:, None] & mask[None], r, eye))
    new_rows = matmul(inverse, rows if rows.ndim == 2 else to_lanes(rows))
    new_values = matvec(inverse, to_lanes(values))
    return from_lanes(new_rows), from_lanes(variances), from_lanes(new_values)
