"""Initial distributions that parameters alone cannot say: stationary and exactly diffuse."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elkax.gaussian import Model
from elkax.gaussian.covariance import Covariance
from elkax.gaussian.unknown import start
from elkax.scan.lanes import matmul, matvec

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
    the rows and columns of those components. The log-likelihood is the diffuse one,
    $\lim_{\kappa\to\infty}\log p(y \mid \delta \sim N(0, \kappa I)) + \tfrac r2\log\kappa$ with r
    the number of directions of $\delta$ that the data determine; values of different r are not to
    be compared. A state that the data do not determine has mean NaN, variance infinite and
    covariances NaN; all others are what they would be without it.

    Args:
        components: which states are diffuse, one bool each; all if None.

    References:
        de Jong (1991), Annals of Statistics 19(2); Durbin & Koopman (2012), Ch. 5.
    """

    components: tuple[bool, ...] | None = None

    def mask(self, size: int) -> tuple[bool, ...]:
        """Tell which of `size` states are diffuse.

        Raises:
            ValueError: if `components` does not fit the state, or names none.
        """
        mask = (True,) * size if self.components is None else tuple(map(bool, self.components))
        if len(mask) != size or not any(mask):
            raise ValueError(
                f"components must be {size} bools, at least one of them True, got {self.components}"
            )
        return mask

    def resolve(self, model: Model) -> Model:
        """Return the model with the unknown effects in it.

        Raises:
            ValueError: if `components` does not fit the state, or names none.
        """
        return _with_effects(model, self.mask(model.initial_mean.shape[0]))


@partial(jax.jit, static_argnames="diffuse")
def _with_effects(model: Model, diffuse: tuple[bool, ...]) -> Model:
    mask = np.array(diffuse)
    keep = ~mask[:, None] & ~mask[None, :]
    model = model._replace(
        initial_mean=jnp.where(mask, 0.0, model.initial_mean),
        initial_cov=jnp.where(keep, model.initial_cov, 0.0),
        weights=without_rounding(model.weights),
    )
    units = jnp.diag(jnp.sqrt(natural_variances(model)))[:, mask]
    changes = changed_rows(model.weights)
    if changes.ndim == 2:
        age = jnp.cumsum(changes.at[0].set(0.0), axis=0)
    else:
        age = jnp.arange(len(model.first), dtype=changes.dtype)[:, None] * changes
    return model._replace(unknown=start(units), age=age)


def without_rounding(weights: Array) -> Array:
    r"""Put zero where $\sin\pi$ or $\cos\tfrac\pi2$ stands in F, for nothing is seen through it.

    $F_{ij}$ and $F_{ji}$ are rounding where $|F_{ij}F_{ji}| \le (16\epsilon)^2|F_{ii}F_{jj}|$, in
    any units of the states, and neither is more than $16\epsilon$ of the larger of $F_{ii}$ and
    $F_{jj}$; and $F_{ii}$ is where $F_{ii}^2 \le (16\epsilon)^2|F_{ij}F_{ji}|$ for some j. One
    without its opposite never is: its size is one of units. Derivatives are those of F.

    Args:
        weights: $F$, (D, D) or (T, D, D).
    """
    level = 16 * jnp.finfo(weights.dtype).eps
    size = jnp.abs(jax.lax.stop_gradient(weights))
    # A product of two may be out of range, their geometric mean is not.
    back = jnp.sqrt(size) * jnp.sqrt(jnp.swapaxes(size, -1, -2))
    kept = jnp.diagonal(size, axis1=-2, axis2=-1)
    larger = jnp.maximum(kept[..., :, None], kept[..., None, :])
    both = jnp.sqrt(kept[..., :, None]) * jnp.sqrt(kept[..., None, :])
    eye = jnp.eye(weights.shape[-1], dtype=bool)
    most = jnp.max(jnp.where(eye, 0.0, back), axis=-1, keepdims=True)
    loop = (back > 0) & (back <= level * both) & (size <= level * larger)
    small = jnp.where(eye, size <= level * most, loop)
    return weights - jax.lax.stop_gradient(jnp.where(small, weights, 0.0))


def changed_rows(weights: Array) -> Array:
    """Give one for states that F does not leave as they are, else zero: (D,) or (T, D)."""
    eye = jnp.eye(weights.shape[-1], dtype=weights.dtype)
    return jnp.any(weights != eye, axis=-1).astype(weights.dtype)


def natural_variances(model: Model) -> Array:
    r"""Give every state a variance in its own units, of about the size that a measurement leaves.

    $1/\sum_n a_{nj}^2/\sigma_n^2$, with $\sigma_n^2$ the larger of the variances of the measurement
    error and of $h_n^\top w_t$ (one if both are zero), and $a_n$ the largest $|h_n|$, carried back
    by $|F|$ until it meets state j. No result depends on it but by rounding; it follows changes of
    units exactly.
    """
    model = jax.lax.stop_gradient(model)

    def largest(array: Array, rank: int) -> Array:
        return jnp.max(jnp.abs(array), axis=0) if array.ndim > rank else jnp.abs(array)

    rows, weights, noise = (
        largest(jnp.asarray(part), 2) for part in (model.rows, model.weights, model.noise)
    )
    if model.correlated is not None:
        error = largest(jnp.diagonal(model.correlated, axis1=-2, axis2=-1), 1)
    else:
        error = largest(jnp.asarray(model.variances), 1)
    moved = (rows * jnp.sqrt(jnp.diagonal(noise))).max(axis=1) ** 2
    scale = jnp.maximum(error, moved)
    scale = jnp.where(scale > 0, scale, 1.0)

    def sight(seen: Array) -> Array:
        return jnp.sum(seen * seen / scale[:, None], axis=0)

    def look_back(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        seen, found = carry
        seen = jnp.matmul(seen, weights, precision="highest")
        return seen, jnp.where(found > 0, found, sight(seen))

    size = len(model.initial_mean)
    _, found = jax.lax.fori_loop(0, size, look_back, (rows, sight(rows)))
    unseen = jnp.where(jnp.diagonal(noise) > 0, jnp.diagonal(noise), 1.0)
    return jnp.where(found > 0, 1.0 / jnp.where(found > 0, found, 1.0), unseen)
