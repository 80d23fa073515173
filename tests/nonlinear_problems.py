"""Shared nonlinear test problems: parameters, emissions, inputs, the true states; their MAP cost.

States and emissions are drawn in NumPy from the model itself with a fixed seed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_probability.substrates.jax.distributions as tfd
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM
from scipy.optimize import minimize

from elkax import ParamsDistributionSSM


class Problem(NamedTuple):
    """Parameters, emissions (T, N), inputs (T, U) or None, states (T, D), difference or None."""

    params: Any
    emissions: Any
    inputs: Any
    states: Any
    residual: Any = None


def gaussian_params(m0, P0, f, Q, h, R):
    """Put arrays and functions into `ParamsNLGSSM`."""
    m0, P0, Q, R = (jnp.asarray(np.asarray(x, np.float64)) for x in (m0, P0, Q, R))
    return ParamsNLGSSM(m0, P0, f, Q, h, R)


def _root(cov):
    values, vectors = np.linalg.eigh(np.asarray(cov))
    return vectors * np.sqrt(np.maximum(values, 0.0))


def simulate(params, num_timesteps, seed, inputs=None, start=None, draw=None):
    """Draw states and emissions, by `draw(rng, z)` if these are not Gaussian."""
    rng = np.random.default_rng(seed)
    m0, P0, f, Q, h, R = params

    def call(function, z, t):
        z = np.asarray(z)
        return np.asarray(function(z) if inputs is None else function(z, np.asarray(inputs[t])))

    def emit(z, t):
        if draw is not None:
            return draw(rng, z)
        return call(h, z, t) + _root(R) @ rng.standard_normal(R.shape[0])

    states, emissions = [], []
    z = np.asarray(m0) + _root(P0) @ rng.standard_normal(len(m0)) if start is None else start
    for t in range(num_timesteps):
        if t:
            z = call(f, z, t) + _root(Q) @ rng.standard_normal(len(z))
        states.append(z)
        emissions.append(emit(z, t))
    return np.stack(states), np.stack(emissions)


def map_cost(params, emissions, inputs=None, residual=jnp.subtract):
    """The MAP cost as a function of the trajectory, written out for regular covariances.

    Missing entries are left out, which needs R to be diagonal, or entries to be independent.
    """
    m0, P0, f, Q, h, R = params
    apply = jax.vmap(lambda g, z, u: g(z) if inputs is None else g(z, u), (None, 0, 0))
    u = jnp.zeros((len(emissions), 0)) if inputs is None else inputs
    seen = ~jnp.isnan(emissions)
    emissions = jnp.where(seen, emissions, 1.0)

    def square(e, cov):
        return 0.5 * jnp.sum(e * jnp.linalg.solve(cov, e.T).T)

    def misfit(z):
        if isinstance(params, ParamsNLGSSM):
            return square(jnp.where(seen, residual(emissions, apply(h, z, u)), 0.0), R)
        each = jax.vmap(lambda z, u, y: (h(z) if inputs is None else h(z, u)).log_prob(y))
        densities = each(z, u, emissions)
        return -jnp.sum(jnp.where(seen if densities.ndim == 2 else seen.all(1), densities, 0.0))

    def cost(z):
        return (
            square((z[0] - m0)[None], P0) + square(z[1:] - apply(f, z[:-1], u[1:]), Q) + misfit(z)
        )

    return cost


def polished(cost, trajectory):
    """Where L-BFGS gets from a trajectory."""
    shape = trajectory.shape
    value = jax.jit(jax.value_and_grad(lambda x: cost(x.reshape(shape))))
    options = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-16, "gtol": 1e-10}
    result = minimize(
        lambda x: tuple(np.asarray(part) for part in value(x)),
        np.asarray(trajectory).ravel(),
        jac=True,
        method="L-BFGS-B",
        options=options,
    )
    return result.fun


def ungm_dynamics(z, u):
    return 0.5 * z + 25 * z / (1 + z**2) + u


def ungm_emission(z, u):
    return z**2 / 20


def ungm(seed=0, T=100):
    """The univariate nonstationary growth model; its input is 8 cos(1.2 t)."""
    inputs = 8 * np.cos(1.2 * np.arange(T))[:, None]
    params = gaussian_params([0.0], [[5.0]], ungm_dynamics, [[10.0]], ungm_emission, [[1.0]])
    states, emissions = simulate(params, T, seed, inputs)
    return Problem(params, jnp.asarray(emissions), jnp.asarray(inputs), states)


SENSORS = np.array([[-1.5, 0.5], [1.0, 1.0]])


def wrap(y, predicted):
    """The difference of two angles, within half a turn of zero."""
    return (y - predicted + jnp.pi) % (2 * jnp.pi) - jnp.pi


def turn_dynamics(z, dt=0.01):
    """Coordinated turn: position, velocity, turn rate."""
    px, py, vx, vy, w = z
    small = jnp.abs(w) < 1e-6
    safe = jnp.where(small, 1.0, w)
    # Series about zero rate, where the closed form is 0/0.
    sine = jnp.where(small, dt - w**2 * dt**3 / 6, jnp.sin(safe * dt) / safe)
    cosine = jnp.where(small, w * dt**2 / 2, (1 - jnp.cos(safe * dt)) / safe)
    s, c = jnp.sin(w * dt), jnp.cos(w * dt)
    return jnp.stack(
        [
            px + sine * vx - cosine * vy,
            py + cosine * vx + sine * vy,
            c * vx - s * vy,
            s * vx + c * vy,
            w,
        ]
    )


def bearings(z):
    return jnp.arctan2(z[1] - SENSORS[:, 1], z[0] - SENSORS[:, 0])


def coordinated_turn(r=0.5, T=500, seed=0):
    """Bearings-only tracking of a turning target with two sensors."""
    dt, qc, qw = 0.01, 0.01, 0.1
    Q = np.zeros((5, 5))
    for i in (0, 1):
        Q[np.ix_((i, i + 2), (i, i + 2))] = white_acceleration(dt, qc)
    Q[4, 4] = qw * dt
    m0 = np.array([-1.0, -1.0, 0.0, 0.0, 0.0])
    params = gaussian_params(m0, np.eye(5), turn_dynamics, Q, bearings, r**2 * np.eye(2))
    states, emissions = simulate(params, T, seed)
    emissions = (emissions + np.pi) % (2 * np.pi) - np.pi
    return Problem(params, jnp.asarray(emissions), None, states, wrap)


def white_acceleration(dt, q):
    """Covariance of position and velocity when the acceleration is white noise of density q."""
    return q * np.array([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]])


def pendulum_dynamics(z, dt=0.0125, g=9.8):
    """Angle and angular velocity after an Euler step."""
    return jnp.stack([z[0] + dt * z[1], z[1] - dt * g * jnp.sin(z[0])])


def horizontal(z):
    return jnp.sin(z[:1])


def pendulum(T=400, seed=0):
    """A pendulum seen from above, let go horizontally: the parameters of dynamax's notebook.

    Särkkä (2013), Bayesian Filtering and Smoothing, Example 3.7.
    """
    m0, Q = [np.pi / 2, 0.0], white_acceleration(0.0125, 1.0)
    params = gaussian_params(m0, 0.1 * np.eye(2), pendulum_dynamics, Q, horizontal, [[0.3**2]])
    states, emissions = simulate(params, T, seed)
    return Problem(params, jnp.asarray(emissions), None, states)


def runge_kutta(derivative, z, dt):
    """One classical step of fourth order; the stages in a loop, which takes less to compile."""

    def stage(carry, weights):
        slope, total = carry
        slope = derivative(z + weights[0] * dt * slope)
        return (slope, total + weights[1] * dt * slope), None

    weights = jnp.array([[0, 1 / 6], [1 / 2, 1 / 3], [1 / 2, 1 / 3], [1, 1 / 6]])
    return jax.lax.scan(stage, (jnp.zeros_like(z), z), weights)[0][1]


def lorenz63_dynamics(z, dt=0.05):
    linear = np.array([[-10.0, 10.0, 0.0], [28.0, -1.0, 0.0], [0.0, 0.0, -8 / 3]])
    bilinear = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    return runge_kutta(lambda z: linear @ z + z[0] * (bilinear @ z), z, dt)


def first(z):
    return z[:1]


def lorenz63(T=100, seed=0):
    """Lorenz (1963) with the start and the noise of Evensen & van Leeuwen (2000).

    Monthly Weather Review 128(6). They see all three variables every 0.5; here the first one is
    seen at every step of 0.05.
    """
    m0, Q = [1.508870, -1.531271, 25.46091], 0.05 * np.diag([2.0, 12.13, 12.31])
    params = gaussian_params(m0, 2 * np.eye(3), lorenz63_dynamics, Q, first, [[2.0]])
    states, emissions = simulate(params, T, seed)
    return Problem(params, jnp.asarray(emissions), None, states)


def lorenz96_dynamics(z, dt=0.05, force=8.0):
    def derivative(z):
        return (jnp.roll(z, -1) - jnp.roll(z, 2)) * jnp.roll(z, 1) - z + force

    return runge_kutta(derivative, z, dt)


def every_other(z):
    return z[::2]


def lorenz96(D=4, T=100, seed=0):
    """Lorenz & Emanuel (1998), fewer variables than their 40, every other one seen with unit error.

    Journal of the Atmospheric Sciences 55(3): step 0.05, forcing 8. They have no process noise.
    """
    m0, R = 8 + 0.01 * np.eye(D)[0], np.eye((D + 1) // 2)
    params = gaussian_params(m0, np.eye(D), lorenz96_dynamics, 0.05 * np.eye(D), every_other, R)
    states, emissions = simulate(params, T, seed)
    return Problem(params, jnp.asarray(emissions), None, states)


def stochastic_volatility(T=100, seed=0):
    """Returns of scale 0.5 exp(z / 2), z a stationary autoregression.

    Doucet & Johansen (2009), A Tutorial on Particle Filtering and Smoothing, Example 4.
    """
    decay = 0.91
    params = ParamsDistributionSSM(
        jnp.zeros(1),
        jnp.eye(1) / (1 - decay**2),
        lambda z: decay * z,
        jnp.eye(1),
        lambda z: tfd.Normal(0.0, 0.5 * jnp.exp(z / 2)),
    )
    states, emissions = simulate(
        params, T, seed, draw=lambda rng, z: rng.normal(0.0, 0.5 * np.exp(z / 2))
    )
    return Problem(params, jnp.asarray(emissions), None, states)


def ricker(T=50, seed=0):
    """Counts of a population with overcompensation, its logarithm the state; chaotic.

    Wood (2010), Nature 466: log r = 3.8, process noise 0.3, ten counted for a density of one.
    """
    params = ParamsDistributionSSM(
        jnp.zeros(1),
        jnp.eye(1),
        lambda z: z + 3.8 - jnp.exp(z),
        0.3**2 * jnp.eye(1),
        lambda z: tfd.Poisson(log_rate=jnp.log(10.0) + z),
    )
    states, emissions = simulate(
        params, T, seed, draw=lambda rng, z: rng.poisson(10.0 * np.exp(z)).astype(float)
    )
    return Problem(params, jnp.asarray(emissions), None, states)
