"""A nonlinear system along a trajectory as a linear-Gaussian model that varies in time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.gaussian import Model
from elkax.gaussian.factor import unit_ldl
from elkax.linearize import Affine, Linearizer, Observation
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes, transpose
from elkax.smoothers.system import Data, System


class Noise(NamedTuple):
    r"""A covariance $C = L\,\mathrm{diag}(d)L^\top$, L unit lower, d zero where C is singular.

    Matrix axes first, time last or not at all.

    Attributes:
        inverse: $L^{-1}$ (n, n, *lanes); None where C is diagonal.
        pivots: $d$ (n, *lanes).
    """

    inverse: Array | None
    pivots: Array

    def whiten(self, error: Array) -> Array:
        r"""Return $d^{-1/2}L^{-1}e$, zero where d is: squares add up to the cost in C's range."""
        return self._turn(error) * self._scale()

    def violation(self, error: Array) -> Array:
        r"""Return what of $L^{-1}e$ lies where d is zero, and so should be zero itself."""
        return jnp.where(self.pivots > 0, 0.0, self._turn(error))

    def solve(self, error: Array) -> Array:
        r"""Return $L^{-\top}d^+L^{-1}e$, which is $C^{-1}e$ where C is regular."""
        scaled = self.whiten(error) * self._scale()
        return scaled if self.inverse is None else matvec(transpose(self.inverse), scaled)

    def curvature(self, weights: Array) -> Array:
        r"""Return the diagonal of $A^\top C^+A$ for $A$ (n, m, *lanes)."""
        turned = weights if self.inverse is None else matmul(self.inverse, weights)
        scaled = turned * self._scale()[:, None]
        return jnp.sum(scaled * scaled, axis=0)

    def _turn(self, error: Array) -> Array:
        return error if self.inverse is None else matvec(self.inverse, error)

    def _scale(self) -> Array:
        return jnp.where(
            self.pivots > 0, jax.lax.rsqrt(jnp.where(self.pivots > 0, self.pivots, 1.0)), 0.0
        )


class Linearized(NamedTuple):
    """A system linearized along a trajectory.

    Attributes:
        model: with time-varying rows and uncorrelated measurement errors.
        dynamics: covariance of the step into each state, the initial one at t = 0, lanes T.
        emission: covariance of the observed entries of each emission, lanes T.
        log_scale: logarithm of the factor between each likelihood and its Gaussian density (T,).
    """

    model: Model
    dynamics: Noise
    emission: Noise
    log_scale: Array


def uncorrelated(observation: Observation) -> tuple[Observation, Noise]:
    """Turn correlated errors into uncorrelated ones, over the observed entries.

    Args:
        observation: matrix axes first, any lanes; `cov` has one or two matrix axes.

    Returns:
        The observation with variances, zero rows where missing; and the covariance it had.
    """
    rows, values, cov, observed, log_scale = observation
    rows = jnp.where(observed[:, None], rows, 0.0)
    values = jnp.where(observed, values, 0.0)
    if cov.ndim == rows.ndim and cov.shape[0] == 1:
        cov = cov[:, 0]
    if cov.ndim < rows.ndim:
        variances = jnp.where(observed, cov, 1.0)
        new = Observation(rows, values, variances, observed, log_scale)
        return new, Noise(None, variances)
    size = cov.shape[0]
    eye = jnp.eye(size, dtype=cov.dtype).reshape((size, size) + (1,) * (cov.ndim - 2))
    inverse, pivots = unit_ldl(jnp.where(observed[:, None] & observed[None], cov, eye))
    rows, values = matmul(inverse, rows), matvec(inverse, values)
    return Observation(rows, values, pivots, observed, log_scale), Noise(inverse, pivots)


def linearize(
    system: System, data: Data, linearizer: Linearizer, means: Array, covs: Array | None
) -> Linearized:
    """Linearize every step and every emission about the moments of a trajectory.

    Args:
        system: functions of the model.
        data: arrays of the model.
        linearizer: how.
        means: (T, D).
        covs: (T, D, D), None unless the linearizer uses them.
    """
    earlier = None if covs is None else covs[:-1]
    inputs = data.later_inputs()

    def one_step(mean: Array, cov: Array | None, inputs: PyTree | None) -> Affine:
        return linearizer(lambda state: system.advance(state, inputs), mean, cov)

    steps = jax.vmap(one_step)(means[:-1], earlier, inputs)
    observation = data.map_data(
        lambda datum, mean, cov: system.emission.observe(linearizer, datum, mean, cov), means, covs
    )
    return assemble(data, steps, Observation(*map(to_lanes, observation)))


def assemble(data: Data, steps: Affine, observation: Observation) -> Linearized:
    """Put linearized steps and emissions together.

    Args:
        data: arrays of the model.
        steps: the steps into the states at t = 1, ..., T - 1, leading axis T - 1.
        observation: time last.
    """
    length, size = data.values.shape[0], data.initial_mean.shape[0]
    noise = data.noise if data.noise.ndim == 2 else data.noise.at[0].set(0.0)
    if steps.cov is not None:
        noise = jnp.broadcast_to(noise, (length, size, size)).at[1:].add(steps.cov)
    observation, emission = uncorrelated(observation)
    rows, values, variances, observed, log_scale = map(from_lanes, observation)
    model = Model(
        initial_mean=data.initial_mean,
        initial_cov=data.initial_cov,
        weights=_after_nothing(steps.weights),
        offset=_after_nothing(steps.offset),
        noise=noise,
        rows=rows,
        variances=variances,
        values=values,
        observed=observed,
        first=(jnp.arange(length) == 0).astype(values.dtype),
    )
    return Linearized(model, _dynamics_noise(model), emission, log_scale)


def _after_nothing(steps: Array) -> Array:
    """Put zeros at t = 0, into which no step leads."""
    return jnp.concatenate((jnp.zeros((1, *steps.shape[1:]), steps.dtype), steps))


def _dynamics_noise(model: Model) -> Noise:
    length = model.first.shape[0]
    start = unit_ldl(model.initial_cov)
    if model.noise.ndim == 2:
        steps = [
            jnp.broadcast_to(part[..., None], (*part.shape, length - 1))
            for part in unit_ldl(model.noise)
        ]
    else:
        steps = unit_ldl(to_lanes(model.noise[1:]))
    both = zip(start, steps, strict=True)
    return Noise(*(jnp.concatenate((one[..., None], rest), axis=-1) for one, rest in both))


def damp(model: Model, means: Array, precision: Array) -> Model:
    r"""Add the pseudo-observations $\bar z_t = z_t + N(0, \Pi_t^{-1})$.

    The smoothed mean is then the minimum of the model's cost plus
    $\tfrac12\sum_t\|z_t - \bar z_t\|^2_{\Pi_t}$: a Levenberg-Marquardt step from $\bar z$.

    Args:
        model: a linearized model.
        means: $\bar z$ (T, D).
        precision: $\Pi$, (T, D) where it is diagonal or (T, D, D); eigenvalues that are not
            positive are left out.

    References:
        Särkkä & Svensson (2020), arXiv:2003.12371.
    """
    length, size = means.shape
    rows = jnp.broadcast_to(jnp.eye(size, dtype=means.dtype), (length, size, size))
    if precision.ndim == 3:
        precision, vectors = jnp.linalg.eigh(precision)
        rows = jnp.swapaxes(vectors, 1, 2)
    # NaN counts as observed, so that it stays visible.
    observed = ~(precision <= 0)
    values = from_lanes(matvec(to_lanes(rows), to_lanes(means)))
    variances = 1.0 / jnp.where(observed, precision, 1.0)
    return model._replace(
        rows=jnp.concatenate((model.rows, rows), axis=1),
        variances=jnp.concatenate((model.variances, variances), axis=1),
        values=jnp.concatenate((model.values, values), axis=1),
        observed=jnp.concatenate((model.observed, observed), axis=1),
    )
