r"""Effects of which nothing is known, as further columns of means, and their estimate.

An initial state $N(m_0, P_0) + U\delta$ with flat $\delta$ is the same as $N(m_0, P_0 + UU^\top) +
U\delta$: a flat effect swallows a proper one. Given $\delta$ every innovation of a state that
is seen then has a positive variance, also without measurement error. All means are affine in
$\delta$ and have the covariances in common: a filter with 1 + d columns of means.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.model import Model
from elkax.gaussian.output import FilterOutput, log_density, standardize
from elkax.gaussian.unknown import tolerance


class Effect(NamedTuple):
    r"""The estimate of $\delta$ from all data.

    Attributes:
        mean: $\hat\delta$ (d,), zero where the data do not determine it.
        cov: $J^-$ (d, d), of the determined part, $J = E^\top E$.
        log_det: $\log\mathrm{pdet}J$, for effects in the units of the states.
    """

    mean: Array
    cov: Array
    log_det: Array


def proper_part(model: Model) -> Model:
    r"""Give the model for $\delta = 0$, started from $N(m_0, P_0 + UU^\top)$."""
    units = jnp.asarray(model.unknown)[: len(model.initial_mean)]
    both = model.initial_cov + jnp.matmul(units, units.T, precision="highest")
    return model._replace(initial_cov=both, unknown=None, age=None)


def given_effects(model: Model) -> Model:
    r"""Stack the models given $\delta = 0$ and, without data or offsets, given each unit effect."""
    units = jnp.asarray(model.unknown)[: len(model.initial_mean)].T
    model = proper_part(model)

    def stack(first: Array, rest: Array | None = None) -> Array:
        rest = jnp.zeros((len(units), *first.shape), first.dtype) if rest is None else rest
        return jnp.concatenate((first[None], rest))

    return model._replace(
        initial_mean=stack(model.initial_mean, units),
        offset=stack(model.offset),
        values=stack(model.values),
    )


def over_effects(function: Callable[[Model], Any], model: Model) -> Any:
    """Evaluate a function for every column of `given_effects`; covariances are shared."""
    axes = Model(*[None] * len(model))._replace(initial_mean=0, offset=0, values=0)
    return jax.vmap(function, in_axes=(axes,))(given_effects(model))


def estimate(model: Model, columns: FilterOutput) -> tuple[Effect, Array]:
    r"""Estimate $\delta$, and compute the diffuse log-likelihood.

    With $e$ and $E$ the standardized innovations for $\delta = 0$ and their change with $\delta$:
    $\lim_{\kappa\to\infty}\log p(y \mid \delta \sim N(0, \kappa I)) + \tfrac r2\log\kappa =
    \ell(0) + \tfrac12\eta^\top J^-\eta - \tfrac12\log\mathrm{pdet}J$, $J = E^\top E$ of rank r,
    $\eta = -E^\top e$, found from the residual $e + E\hat\delta$, in which nothing large cancels
    however far the data are from $m_0$.

    Args:
        model: the model, with effects.
        columns: filter output of every column, leading axes 1 + d and T.
    """
    scaled = standardize(columns).reshape(len(columns.mean), -1)
    base, units = scaled[0], scaled[1:].T
    scales = jnp.sqrt(jnp.sum(jnp.asarray(model.unknown)[: len(model.initial_mean)] ** 2, axis=0))
    age = jnp.repeat(jnp.max(jnp.asarray(model.age), axis=1), columns.residual.shape[-1])
    effect = Effect(*solve(units, base, jax.lax.stop_gradient(scales), tolerance(age)))
    residual = base + jnp.matmul(units, effect.mean, precision="highest")
    first = jax.tree.map(lambda leaf: leaf[0], columns)
    # The density of a residual of zero, and then of the standardized one.
    known = jnp.where(first.variance == 0, first.residual, 0.0)
    at_zero = jnp.sum(log_density(first._replace(residual=known)))
    return effect, at_zero - 0.5 * jnp.sum(residual * residual) - 0.5 * effect.log_det


@jax.custom_jvp
def solve(units: Array, base: Array, scales: Array, level: Array) -> tuple[Array, Array, Array]:
    r"""Minimise $|e + E\delta|$ orthogonally, the rank being found with columns scaled to one.

    A right singular vector of E is determined if some row of E tells more of it than rounding.

    The derivative holds the rank and the undetermined directions fixed:
    $dJ^- = -J^-dJ\,J^-$, $d\hat\delta = -J^-(dE^\top(e + E\hat\delta) + E^\top(de +
    dE\,\hat\delta))$, $d\log\mathrm{pdet}J = 2\,\mathrm{tr}(J^-E^\top dE)$.

    Args:
        units: $E$ (n, d).
        base: $e$ (n,).
        scales: (d,) units of the effects in those of the states.
        level: (n,) what each row of E tells by rounding, for columns scaled to one.

    Returns:
        The fields of `Effect`.
    """
    count = units.shape[1]
    norms = jnp.linalg.norm(units, axis=0)
    scale = 1.0 / jnp.where(norms > 0, norms, 1.0)
    padding = ((0, max(0, count - len(units))), (0, 0))
    factor = jnp.linalg.qr(jnp.pad(units * scale, padding), mode="r")
    # What is not finite would keep the decomposition from returning.
    finite = jnp.all(jnp.isfinite(factor))
    _, values, turned = jnp.linalg.svd(jnp.where(finite, factor, jnp.eye(count, dtype=norms.dtype)))
    basis = turned.T
    told = jnp.matmul(units * scale, basis, precision="highest")
    known = jnp.any(jnp.abs(told) > level[:, None], axis=0)
    inverse = jnp.where(known, 1.0 / jnp.where(known, values, 1.0), 0.0)
    root = scale[:, None] * basis * inverse
    cov = jnp.matmul(root, root.T, precision="highest")
    mean = jnp.zeros(count, units.dtype)
    for _ in range(3):
        residual = base + jnp.matmul(units, mean, precision="highest")
        gradient = jnp.matmul(units.T, residual, precision="highest")
        mean = mean - jnp.matmul(root, jnp.matmul(root.T, gradient, precision="highest"))
    total = scales * scale
    unseen = jnp.where(known, 0.0, basis)
    spread = total[:, None] * unseen
    within = jnp.matmul(spread.T, spread, precision="highest")
    # Relative to the largest, so that units of any size stay in range.
    largest = jnp.max(jnp.where(known, 0.0, jnp.diagonal(within)))
    largest = jnp.where(largest > 0, largest, 1.0)
    pivots = jnp.diagonal(jnp.linalg.cholesky(within / largest + jnp.diag(known * 1.0)))
    log_det = 2 * jnp.sum(jnp.log(jnp.where(known, values, 1.0)) + jnp.log(pivots))
    log_det = log_det + jnp.sum(~known) * jnp.log(largest) - 2 * jnp.sum(jnp.log(total))
    nothing = jnp.where(finite, 0.0, jnp.nan)
    return mean + nothing, cov + nothing, log_det + nothing


@solve.defjvp
def _solve_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    units, base, *_ = primals
    d_units, d_base, *_ = tangents
    mean, cov, log_det = solve(*primals)

    def product(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision="highest")

    residual = base + product(units, mean)
    d_residual = d_base + product(d_units, mean)
    d_mean = -product(cov, product(d_units.T, residual) + product(units.T, d_residual))
    half = product(units.T, d_units)
    d_cov = -product(cov, product(half + half.T, cov))
    d_log_det = 2 * jnp.sum(cov * half)
    return (mean, cov, log_det), (d_mean, d_cov, d_log_det)


def combine_columns(columns: Array, effect: Effect) -> Array:
    r"""Put $\hat\delta$ into what is affine in it, leading axis the columns; others are kept."""
    change = jnp.tensordot(effect.mean, columns[1:], 1, precision="highest")
    return jnp.concatenate(((columns[0] + change)[None], columns[1:]))


def spread(columns: Array, effect: Effect, other: Array | None = None) -> Array:
    r"""Compute $ZJ^-Z'^\top$ for the changes Z (T, D) with each effect, leading axis the columns.

    Args:
        columns: (1 + d, T, D).
        effect: the estimate.
        other: $Z'$; Z if None.
    """
    left = jnp.moveaxis(columns[1:], 0, -1)
    right = left if other is None else jnp.moveaxis(other[1:], 0, -1)
    half = jnp.matmul(left, effect.cov, precision="highest")
    return jnp.matmul(half, jnp.swapaxes(right, -1, -2), precision="highest")
