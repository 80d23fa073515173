"""Initial distributions that parameters alone cannot say: stationary and exactly diffuse."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian import Model
from elkax.gaussian.covariance import Covariance
from elkax.gaussian.factor import cho_solve, is_regular, psd_cholesky
from elkax.gaussian.kalman import FilterOutput, log_density, standardize
from elkax.scan.lanes import diagonal_of, from_lanes, matmul, matvec, to_lanes

# Enough doublings for a spectral radius within 1e-12 of one.
_DOUBLINGS = 48


@dataclass(frozen=True)
class Stationary:
    r"""Start from the stationary distribution of the dynamics.

    $m_0 = (I - F)^{-1}c$ and $P_0 = FP_0F^\top + Q$, in place of the initial mean and covariance
    of the parameters. Needs dynamics that do not vary in time; a spectral radius of one or more
    has no stationary distribution and gives NaN.
    """

    def resolve(self, model: Model) -> Model:
        """Return the model with the stationary initial moments.

        Raises:
            ValueError: if the dynamics vary in time.
        """
        if model.weights.ndim != 2 or model.noise.ndim != 2 or model.offset.ndim != 1:
            raise ValueError(
                "Stationary() needs dynamics that do not vary in time (weights, covariance, bias, "
                f"no inputs), got weights {model.weights.shape}, covariance {model.noise.shape}, "
                f"offset {model.offset.shape}"
            )

        mean, cov = _stationary_moments(model.weights, model.offset, model.noise)
        return model._replace(initial_mean=mean, initial_cov=cov)


@jax.jit
def _stationary_moments(weights: Array, offset: Array, noise: Array) -> tuple[Array, Array]:
    """Sum both series by doubling; NaN if they do not settle."""

    def double(carry: tuple, _: None) -> tuple[tuple, None]:
        weights, mean, cov = carry
        mean = mean + matvec(weights, mean)
        cov = Covariance().predict(weights, cov, cov)
        return (matmul(weights, weights), mean, cov), None

    (rest, mean, cov), _ = jax.lax.scan(double, (weights, offset, noise), None, length=_DOUBLINGS)
    # A power this high is at rounding level if and only if the dynamics forget their start.
    settled = jnp.max(jnp.abs(rest)) < jnp.finfo(cov.dtype).eps
    return jnp.where(settled, mean, jnp.nan), jnp.where(settled, cov, jnp.nan)


@dataclass(frozen=True)
class ExactDiffuse:
    r"""Start from the limit of infinite prior variance, taken exactly.

    The initial state is $z_1 = m_0 + A\delta + N(0, P_0)$, where $\delta$ holds the diffuse
    components, with a flat prior, and $P_0$ is the initial covariance of the parameters without
    the rows and columns of those components. Everything is computed given $\delta$, whose
    likelihood $\exp(\eta^\top\delta - \tfrac12\delta^\top J\delta)$ comes from the innovations,
    and $\delta$ is integrated out afterwards. The log-likelihood is the diffuse one,
    $\lim_{\kappa\to\infty}\log p(y \mid \kappa) + \tfrac d2\log\kappa$
    $= \ell(0) + \tfrac12\eta^\top J^{-1}\eta - \tfrac12\log|J|$. Filtered moments are NaN at the
    times at which the data so far do not identify $\delta$. An emission without error (R = 0) of
    states that nothing else disturbs has no density given $\delta$: the likelihood is then NaN.

    Args:
        components: which states are diffuse, one bool each; all if None.

    References:
        de Jong (1991), Annals of Statistics 19(2); Durbin & Koopman (2012), Ch. 5.
    """

    components: tuple[bool, ...] | None = None

    def resolve(self, model: Model) -> Model:
        """Return the model for delta = 0.

        Raises:
            ValueError: if `components` does not fit the state, or names none.
        """
        mask = jnp.asarray(self._mask(model.initial_mean.shape[0]))
        keep = ~mask[:, None] & ~mask[None, :]
        return model._replace(initial_cov=jnp.where(keep, model.initial_cov, 0.0))

    def _mask(self, size: int) -> tuple[bool, ...]:
        mask = (True,) * size if self.components is None else tuple(map(bool, self.components))
        if len(mask) != size or not any(mask):
            raise ValueError(
                f"components must be {size} bools, at least one of them True, got {self.components}"
            )
        return mask

    def columns(self, model: Model) -> Model:
        """Stack the model for delta = 0 and, without data or offsets, for each unit delta."""
        mask = self._mask(model.initial_mean.shape[0])
        units = jnp.eye(len(mask), dtype=model.initial_mean.dtype)
        units = units[jnp.asarray([i for i, diffuse in enumerate(mask) if diffuse])]

        def stack(first: Array, rest: Array) -> Array:
            return jnp.concatenate((first[None], rest))

        def zeros(like: Array) -> Array:
            return jnp.zeros((len(units), *like.shape), like.dtype)

        return model._replace(
            initial_mean=stack(model.initial_mean, units),
            offset=stack(model.offset, zeros(model.offset)),
            values=stack(model.values, zeros(model.values)),
        )

    def run(self, function: Callable[[Model], Any], model: Model) -> Any:
        """Evaluate a function for every column of `columns`; covariances are shared."""
        axes = Model(*(None if field is None else -1 for field in model))
        axes = axes._replace(**{n: None for n in model._fields})
        axes = axes._replace(initial_mean=0, offset=0, values=0)
        return jax.vmap(function, in_axes=(axes,))(self.columns(model))


class DiffuseEffect(NamedTuple):
    r"""The estimate of $\delta$ from data up to some time.

    Attributes:
        mean: $\hat\delta = J^{-1}\eta$ (T, d).
        cov: $J^{-1}$ (T, d, d).
    """

    mean: Array
    cov: Array


def estimate_diffuse(columns: FilterOutput) -> tuple[DiffuseEffect, Array]:
    r"""Estimate $\delta$ at every time, and compute the diffuse log-likelihood.

    With $e_0$ and $E$ the standardized innovations for $\delta = 0$ and their change with
    $\delta$, $J = E^\top E$ and $\eta = -E^\top e_0$; the likelihood is that of the residual
    $e_0 + E\hat\delta$, where nothing large cancels however far the data are from $m_0$.

    Args:
        columns: filter output of every column, leading axes 1 + d and T.

    Returns:
        Estimates from data up to t, leading axis T, NaN where $\delta$ is not identified; and the
        log-likelihood.
    """
    scaled = standardize(columns)
    base, units = scaled[0], scaled[1:]
    score = -jnp.cumsum(jnp.einsum("itn,tn->ti", units, base, precision="highest"), axis=0)
    information = jnp.cumsum(jnp.einsum("itn,jtn->tij", units, units, precision="highest"), axis=0)
    scale = jnp.sqrt(jnp.diagonal(information[-1]))
    scale = jnp.where(scale > 0, scale, 1.0)
    # Equilibrated, so that states on different scales are not taken for unidentified.
    balanced = to_lanes(information / (scale[:, None] * scale[None]))
    factor = psd_cholesky(balanced)
    pivots = diagonal_of(factor)
    level = 100 * jnp.finfo(scaled.dtype).eps
    known = is_regular(factor) & jnp.all(pivots * pivots > level, axis=0)
    eye = jnp.eye(len(scale), dtype=scaled.dtype)
    safe = jnp.where(known, factor, eye[..., None])
    inverse = from_lanes(cho_solve(safe, jnp.broadcast_to(eye[..., None], safe.shape)))
    cov = inverse / (scale[:, None] * scale[None])
    mean = jnp.einsum("tij,tj->ti", cov, score, precision="highest")
    residual = base + jnp.einsum("itn,i->tn", units, mean[-1], precision="highest")
    log_det = 2 * jnp.sum(jnp.log(jnp.where(known[-1], pivots[:, -1], 1.0)))
    log_det = log_det + 2 * jnp.sum(jnp.log(scale))
    # The density of a residual of zero, and then of the standardized residual.
    at_zero = columns._replace(residual=jnp.zeros_like(columns.residual))
    at_zero = log_density(jax.tree.map(lambda leaf: leaf[0], at_zero))
    value = jnp.sum(at_zero) - 0.5 * jnp.sum(residual * residual) - 0.5 * log_det
    # NaN comes last: times a zero cotangent it would be NaN in the derivative of what is known.
    effect = DiffuseEffect(
        mean=jnp.where(known[:, None], mean, jnp.nan),
        cov=jnp.where(known[:, None, None], cov, jnp.nan),
    )
    return effect, jnp.where(known[-1], value, jnp.nan)


def integrate(
    means: Array, cov: Array, effect_mean: Array, effect_cov: Array, other: Array | None = None
) -> tuple[Array, Array]:
    r"""Integrate $\delta$ out of moments that are affine in it.

    Args:
        means: (1 + d, T, D): mean for $\delta = 0$ and its change with each unit $\delta$.
        cov: (T, D, D) given $\delta$.
        effect_mean: (d,) or (T, d).
        effect_cov: (d, d) or (T, d, d).
        other: (d, T, D) change of the other side for a cross-covariance; `means` itself if None.

    Returns:
        Mean and covariance.
    """
    units = jnp.moveaxis(means[1:], 0, -1)
    right = units if other is None else jnp.moveaxis(other, 0, -1)
    mean = means[0] + jnp.einsum(
        "tij,...j->ti" if effect_mean.ndim == 1 else "tij,tj->ti",
        units,
        effect_mean,
        precision="highest",
    )
    spread = jnp.matmul(
        jnp.matmul(units, effect_cov, precision="highest"),
        jnp.swapaxes(right, -1, -2),
        precision="highest",
    )
    return mean, cov + spread
