"""Emissions of one time step, turned into affine-Gaussian observations of the state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.linearize.affine import Affine, Linearizer
from elkax.linearize.curvature import ClippedHessian, Curvature
from elkax.scan.lanes import matmul, matvec

Residual = Callable[[Array, Array], Array]


class Observation(NamedTuple):
    r"""An affine-Gaussian observation $y = Hz + N(0, R)$ of one time step.

    Attributes:
        rows: $H$ (K, D).
        values: $y$ (K,), less the offset; any finite number where missing.
        cov: $R$, (K, K), or (K,) where it is diagonal.
        observed: (K,), False where missing.
        log_scale: logarithm of the factor between the likelihood and the Gaussian density.
    """

    rows: Array
    values: Array
    cov: Array
    observed: Array
    log_scale: Array


class Datum(NamedTuple):
    """What is known about the emission of one time step.

    Attributes:
        value: (N,), a harmless number where missing.
        observed: (N,), False where missing.
        noise: emission covariance (N, N) or (N,); None if the emission states its own.
        inputs: (U,) or a pytree, None if there are none.
    """

    value: Array
    observed: Array
    noise: Array | None
    inputs: PyTree | None


@runtime_checkable
class Emission(Protocol):
    """How a state emits; hashable, so that it can be a static argument of a jitted function.

    Attributes:
        quadratic: whether the negative log-density is half the square of the residual, measured in
            the covariance of the observation.
    """

    quadratic: ClassVar[bool]

    def observe(
        self, linearizer: Linearizer, datum: Datum, mean: Array, cov: Array | None
    ) -> Observation:
        """Linearize about $N(m, P)$."""
        ...

    def misfit(
        self, linearizer: Linearizer, datum: Datum, mean: Array, cov: Array | None
    ) -> tuple[Array, Array]:
        r"""Compare a state with the emission.

        Returns:
            The residual (K,), to be measured in the covariance of the linearization, and what
            else the emission adds to the negative log-density.
        """
        ...


def call(function: Callable, state: Array, inputs: PyTree | None) -> Any:
    """Evaluate f(z), or f(z, u) if there are inputs, as dynamax does."""
    return function(state) if inputs is None else function(state, inputs)


@dataclass(frozen=True)
class GaussianEmission:
    r"""$y = h(z, u) + N(0, R)$.

    Args:
        function: $h$, (z) or (z, u) to (N,).
        residual: $(y, \hat y)$ to the difference, for emissions on a circle; $y - \hat y$ if None.
    """

    function: Callable
    residual: Residual | None = None
    quadratic: ClassVar[bool] = True

    def _local(self, datum: Datum, mean: Array) -> Callable[[Array], Array]:
        """Return $h$ as a function of z, free of jumps of the residual about the mean."""
        size = datum.value.shape

        def plain(state: Array) -> Array:
            return jnp.reshape(call(self.function, state, datum.inputs), size)

        difference = self.residual
        if difference is None:
            return plain
        centre = jax.lax.stop_gradient(plain(mean))
        return lambda state: centre + difference(plain(state), centre)

    def _difference(self, value: Array, predicted: Array) -> Array:
        return value - predicted if self.residual is None else self.residual(value, predicted)

    def _noise(self, linearizer: Linearizer, datum: Datum, mean: Array, cov: Array | None) -> Array:
        del linearizer, mean, cov
        assert datum.noise is not None
        return datum.noise

    def observe(
        self, linearizer: Linearizer, datum: Datum, mean: Array, cov: Array | None
    ) -> Observation:
        """Linearize $h$; see `Emission`."""
        affine = linearizer(self._local(datum, mean), mean, cov)
        moved = matvec(affine.weights, mean)
        # The offset leaves through the residual, so that y may be a turn away from it.
        values = self._difference(datum.value, moved + affine.offset) + moved
        noise = add_noise(self._noise(linearizer, datum, mean, cov), affine)
        zero = jnp.zeros((), mean.dtype)
        return Observation(affine.weights, values, noise, datum.observed, zero)

    def misfit(
        self, linearizer: Linearizer, datum: Datum, mean: Array, cov: Array | None
    ) -> tuple[Array, Array]:
        """Return $y - h(z)$; see `Emission`."""
        predicted = linearizer.expect(self._local(datum, mean), mean, cov)
        return self._difference(datum.value, predicted), jnp.zeros((), mean.dtype)


@dataclass(frozen=True)
class MomentEmission(GaussianEmission):
    r"""$E[y \mid z] = h(z, u)$ and $\mathrm{Cov}[y \mid z] = R(z, u)$.

    Args:
        function: $h$, (z) or (z, u) to (N,).
        residual: as `GaussianEmission`.
        moments: $R$, (z) or (z, u) to (N, N).

    References:
        Tronarp, García-Fernández & Särkkä (2018), IEEE Signal Processing Letters 25(3).
    """

    # A default only because the field before it has one.
    moments: Callable = lambda state: jnp.zeros(())

    def _noise(self, linearizer: Linearizer, datum: Datum, mean: Array, cov: Array | None) -> Array:
        size = datum.value.shape * 2

        def covariance(state: Array) -> Array:
            return jnp.reshape(call(self.moments, state, datum.inputs), size)

        return linearizer.expect(covariance, mean, cov, semidefinite=True)


def add_noise(noise: Array, affine: Affine) -> Array:
    """Add what a linearization leaves out to a covariance or to variances."""
    if affine.cov is None:
        return noise
    return affine.cov + (noise if noise.ndim == 2 else jnp.diag(noise))


@dataclass(frozen=True)
class DensityEmission:
    r"""$y \sim p(y \mid z, u)$, a TFP distribution.

    With the gradient g and a positive curvature $\Lambda = U\,\mathrm{diag}(\lambda)U^\top$ of
    $\log p(y \mid z)$ at m, averaged over $N(m, P)$ by a linearizer that uses it: D observations
    $U^\top z$ with the values $U^\top m + \lambda^{-1}U^\top g$ and the variances $1/\lambda$.
    Their gradient at m is g, so a fixed point of the iterated smoother does not depend on the
    curvature. The factor between the likelihood and the Gaussian is that of the averages of their
    logarithms: where the dynamics are linear, averages make the log-likelihood a lower bound.

    Args:
        distribution: (z) or (z, u) to a distribution over the N entries of y, independent (a batch
            of N), or joint (an event of N), which then counts only if no entry is missing.
        curvature: `ClippedHessian()` or `Fisher()`.
    """

    distribution: Callable
    curvature: Curvature = ClippedHessian()
    quadratic: ClassVar[bool] = False

    def log_density(self, datum: Datum, state: Array) -> Array:
        """Return the log-density of the observed entries."""
        distribution = call(self.distribution, state, datum.inputs)
        density = distribution.log_prob(datum.value)
        observed = datum.observed if density.ndim else jnp.all(datum.observed)
        return jnp.sum(jnp.where(observed, density, 0.0))

    def observe(
        self, linearizer: Linearizer, datum: Datum, mean: Array, cov: Array | None
    ) -> Observation:
        """Expand the log-density; see `Emission`."""

        def log_density(state: Array) -> Array:
            return self.log_density(datum, state)

        gradient = linearizer.expect(jax.jacfwd(log_density), mean, cov)
        matrix = self.curvature(
            linearizer,
            log_density,
            lambda state: call(self.distribution, state, datum.inputs),
            datum.observed,
            mean,
            cov,
        )
        values, vectors = jnp.linalg.eigh(matrix)
        largest, square = jnp.max(jnp.abs(values)), jnp.sum(gradient * gradient)
        eps, most = jnp.finfo(mean.dtype).eps, 0.01 * jnp.finfo(mean.dtype).max
        # A direction without curvature gets some, so that its gradient still counts; where there
        # is none at all, as beside the kink of a Laplace density, that of the squared gradient.
        least = jnp.maximum(jnp.sqrt(eps) * largest, eps**2 * jnp.max(jnp.abs(gradient)))
        least = jnp.where(largest > 0, least, jnp.minimum(square, most))
        nothing = (largest == 0) & (square == 0)
        values = jnp.maximum(jnp.abs(values), jnp.where(nothing, 1.0, least))
        observed = jnp.broadcast_to(jnp.any(datum.observed) & ~nothing, mean.shape)
        rows = vectors.T
        shift, moved = matvec(rows, gradient) / values, matvec(rows, mean)
        spread = 0.0 if cov is None else jnp.sum(matmul(rows, cov) * rows, axis=1)
        squares = values * (shift * shift + spread)
        gaussian = 0.5 * jnp.sum(jnp.log(values / (2 * jnp.pi)) - squares)
        centre = linearizer.expect(log_density, mean, cov)
        log_scale = jnp.where(observed[0], centre - gaussian, 0.0)
        return Observation(rows, moved + shift, 1.0 / values, observed, log_scale)

    def misfit(
        self, linearizer: Linearizer, datum: Datum, mean: Array, cov: Array | None
    ) -> tuple[Array, Array]:
        """Return the negative log-density; see `Emission`."""
        value = linearizer.expect(lambda state: self.log_density(datum, state), mean, cov)
        return jnp.zeros_like(mean), -value
