r"""The MAP cost of a trajectory, its range-restricted form, and what a linearized model predicts.

$J(z) = \tfrac12\|z_1 - m_0\|^2_{P_0^{-1}} + \tfrac12\sum_t\|z_t - f(z_{t-1})\|^2_{Q_t^{-1}}
+ \tfrac12\sum_t\|y_t - h(z_t)\|^2_{R_t^{-1}}$, or $-\sum_t\log p(y_t \mid z_t)$ for the last term.
Where a covariance is singular the square is that in its range, and what is left over is the
*violation*, which a trajectory of finite cost has not. For linearizers that use a covariance f and
h are expectations over $N(z_t, P_t)$ with $P$ held fixed, and Q and R hold the residual covariance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.linearize import Datum, Linearizer, hessian
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes, transpose
from elkax.smoothers.linearization import Linearized, Noise
from elkax.smoothers.system import Data, System


class Misfit(NamedTuple):
    """How far a trajectory is from model and data, time last.

    Attributes:
        dynamics: whitened (D, T), the initial state at t = 0.
        emission: whitened (K, T).
        extra: further negative log-density (T,).
        violations: (D + K, T), zero if every covariance is regular.
    """

    dynamics: Array
    emission: Array
    extra: Array
    violations: Array

    def cost(self) -> Array:
        """Return the cost, violations left out."""
        squares = jnp.sum(self.dynamics**2) + jnp.sum(self.emission**2)
        return 0.5 * squares + jnp.sum(self.extra)

    def violation(self) -> Array:
        """Return the sum of the sizes of all violations."""
        return jnp.sum(jnp.abs(self.violations))

    def reduction(self, after: "Misfit") -> Array:
        """Return by how much the cost falls, from differences of the terms and not of the sums."""
        extra, dynamics, emission = self._falls(after)
        return jnp.sum(extra) + jnp.sum(dynamics) + jnp.sum(emission)

    def distance(self, after: "Misfit") -> Array:
        """Return the root of the sum of the squares of the differences of all terms."""
        extra, dynamics, emission = self._falls(after)
        return jnp.sqrt(jnp.sum(extra**2) + jnp.sum(dynamics**2) + jnp.sum(emission**2))

    def _falls(self, after: "Misfit") -> tuple[Array, Array, Array]:
        dynamics = 0.5 * (self.dynamics - after.dynamics) * (self.dynamics + after.dynamics)
        emission = 0.5 * (self.emission - after.emission) * (self.emission + after.emission)
        return self.extra - after.extra, dynamics, emission


def measure(
    system: System,
    data: Data,
    linearizer: Linearizer,
    linearized: Linearized,
    means: Array,
    covs: Array | None,
) -> Misfit:
    """Compare a trajectory with model and data.

    Args:
        system: functions of the model.
        data: arrays of the model.
        linearizer: gives the expectations, evaluations at the mean for `Taylor`.
        linearized: gives the covariances.
        means: trajectory (T, D).
        covs: (T, D, D) for linearizers that use them.
    """
    errors = dynamics_errors(system, data, linearizer, means, covs)
    residual, extra = data.map_data(
        lambda datum, mean, cov: system.emission.misfit(linearizer, datum, mean, cov), means, covs
    )
    residual = jnp.where(linearized.model.observed, residual, 0.0)
    return _assemble(linearized, to_lanes(errors), to_lanes(residual), extra)


def dynamics_errors(
    system: System, data: Data, linearizer: Linearizer, means: Array, covs: Array | None
) -> Array:
    """Return $z_1 - m_0$ and $z_t - f(z_{t-1})$, (T, D)."""
    earlier = None if covs is None else covs[:-1]
    inputs = data.later_inputs()

    def predict(mean: Array, cov: Array | None, inputs: PyTree | None) -> Array:
        return linearizer.expect(lambda state: system.advance(state, inputs), mean, cov)

    predicted = jax.vmap(predict)(means[:-1], earlier, inputs)
    return means - jnp.concatenate((data.initial_mean[None], predicted))


def _assemble(linearized: Linearized, errors: Array, residual: Array, extra: Array) -> Misfit:
    return Misfit(
        linearized.dynamics.whiten(errors),
        linearized.emission.whiten(residual),
        extra,
        jnp.concatenate(
            (linearized.dynamics.violation(errors), linearized.emission.violation(residual))
        ),
    )


def predict_change(linearized: Linearized, means: Array, step: Array) -> tuple[Array, Array]:
    """Predict what a step does to the cost and to the violation, by the linearized model.

    Args:
        linearized: the model about `means`.
        means: (T, D).
        step: (T, D).

    Returns:
        By how much the cost falls, and the violation after the step.
    """
    model = linearized.model
    at, moved = to_lanes(means), to_lanes(step)
    weights, rows = to_lanes(model.weights), to_lanes(model.rows)
    offset = to_lanes(model.offset).at[:, 0].set(model.initial_mean)
    errors = at - matvec(weights, _earlier(at)) - offset
    change = moved - matvec(weights, _earlier(moved))
    # Rows and values of the model are already turned, so only their variances are left.
    noise = Noise(None, linearized.emission.pivots)
    residual = to_lanes(model.values) - matvec(rows, at)
    residual_change = -matvec(rows, moved)
    parts = (
        (linearized.dynamics, errors, change),
        (noise, residual, residual_change),
    )
    fall, violation = jnp.zeros((), means.dtype), jnp.zeros((), means.dtype)
    for noise, old, new in parts:
        r, dr = noise.whiten(old), noise.whiten(new)
        fall = fall - 0.5 * jnp.sum(dr * (2 * r + dr))
        violation = violation + jnp.sum(jnp.abs(noise.violation(old) + noise.violation(new)))
    return fall, violation


def _earlier(x: Array) -> Array:
    """Shift the lanes by one time step; the first one meets weights of zero."""
    return jnp.concatenate((x[:, :1], x[:, :-1]), axis=1)


def second_order(
    system: System, data: Data, linearizer: Linearizer, linearized: Linearized, means: Array
) -> Array:
    r"""Return what the linearized model leaves out of the Hessian of the cost, (T, D, D).

    $S_t = -\sum_k (Q_{t+1}^{-1}e_{t+1})_k\nabla^2f_k(z_t) -
    \sum_k (R_t^{-1}v_t)_k\nabla^2h_k(z_t)$: f and h enter the cost at one time
    each, so all of it stands on the diagonal. For a log-density, its own Hessian in place of that
    of the pseudo-observation.

    Args:
        system: functions of the model.
        data: arrays of the model.
        linearizer: one that uses no covariance.
        linearized: the model about `means`.
        means: (T, D).
    """
    emission = system.emission
    errors = to_lanes(dynamics_errors(system, data, linearizer, means, None))
    duals = linearized.dynamics.solve(errors).T
    inputs = data.later_inputs()

    def of_step(mean: Array, dual: Array, inputs: PyTree | None) -> Array:
        return -hessian(lambda z: jnp.vdot(dual, system.advance(z, inputs)))(mean)

    steps = jax.vmap(of_step)(means[:-1], duals[1:], inputs)
    residual, _ = data.map_data(
        lambda datum, mean: emission.misfit(linearizer, datum, mean, None), means
    )
    residual = jnp.where(linearized.model.observed, residual, 0.0)
    duals = linearized.emission.solve(to_lanes(residual)).T

    def of_emission(datum: Datum, mean: Array, dual: Array) -> Array:
        def part(state: Array) -> Array:
            residual, extra = emission.misfit(linearizer, datum, state, None)
            return jnp.vdot(dual, residual) + extra

        return hessian(part)(mean)

    total = data.map_data(of_emission, means, duals).at[:-1].add(steps)
    if emission.quadratic:
        return total
    rows, variances = to_lanes(linearized.model.rows), to_lanes(linearized.model.variances)
    return total - from_lanes(matmul(transpose(rows), rows / variances[:, None]))


def hessian_diagonal(linearized: Linearized) -> Array:
    r"""Return the diagonal of the Gauss-Newton Hessian, (T, D), in the ranges of singular noise."""
    model = linearized.model
    length, size = model.first.shape[0], model.initial_mean.shape[0]
    eye = jnp.broadcast_to(jnp.eye(size, dtype=model.rows.dtype)[..., None], (size, size, length))
    own = linearized.dynamics.curvature(eye)
    later = linearized.dynamics.curvature(to_lanes(model.weights))
    later = jnp.concatenate((later[:, 1:], jnp.zeros((size, 1), later.dtype)), axis=1)
    seen = Noise(None, linearized.emission.pivots).curvature(to_lanes(model.rows))
    return (own + later + seen).T
