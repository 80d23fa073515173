"""Shared nonlinear test problems: dynamax parameters, emissions, inputs and the true states.

States and emissions are drawn in NumPy from the model itself with a fixed seed.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM


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


def simulate(params, num_timesteps, seed, inputs=None, start=None):
    """Draw states and emissions of a model with Gaussian emissions."""
    rng = np.random.default_rng(seed)
    m0, P0, f, Q, h, R = params

    def call(function, z, t):
        z = np.asarray(z)
        return np.asarray(function(z) if inputs is None else function(z, np.asarray(inputs[t])))

    states, emissions = [], []
    z = np.asarray(m0) + _root(P0) @ rng.standard_normal(len(m0)) if start is None else start
    for t in range(num_timesteps):
        if t:
            z = call(f, z, t) + _root(Q) @ rng.standard_normal(len(z))
        states.append(z)
        emissions.append(call(h, z, t) + _root(R) @ rng.standard_normal(R.shape[0]))
    return np.stack(states), np.stack(emissions)


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
        Q[i, i], Q[i, i + 2], Q[i + 2, i], Q[i + 2, i + 2] = (
            qc * dt**3 / 3,
            qc * dt**2 / 2,
            qc * dt**2 / 2,
            qc * dt,
        )
    Q[4, 4] = qw * dt
    m0 = np.array([-1.0, -1.0, 0.0, 0.0, 0.0])
    params = gaussian_params(m0, np.eye(5), turn_dynamics, Q, bearings, r**2 * np.eye(2))
    states, emissions = simulate(params, T, seed)
    emissions = (emissions + np.pi) % (2 * np.pi) - np.pi
    return Problem(params, jnp.asarray(emissions), None, states, wrap)
