"""Shared linear-Gaussian test problems: dynamax parameters, emissions and inputs.

Problems of one family have the same shapes and the same structure of parameters, so that one
compiled function serves all of them. Emissions are drawn from the model itself with a fixed seed.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from dynamax.linear_gaussian_ssm.inference import (
    ParamsLGSSMDynamics,
    ParamsLGSSMEmissions,
    ParamsLGSSMInitial,
)

from oracles import model_arrays

# Odd at every halving, so that no level of a tree comes out even, and not a multiple of the number
# of blocks in use. Short, because the program of a tree and its compilation grow with every level.
T_CONTRACT = 7


class Problem(NamedTuple):
    """Parameters, emissions (T, N) with NaN for missing entries, and inputs (T, U) or None."""

    params: Any
    emissions: Any
    inputs: Any = None


def make_params(m0, P0, F, Q, H, R, b=None, B=None, d=None, D=None):
    """Put arrays into `ParamsLGSSM`; None and callables of t stay as they are."""

    def convert(x):
        return x if x is None or callable(x) else jnp.asarray(np.asarray(x, np.float64))

    return ParamsLGSSM(
        initial=ParamsLGSSMInitial(mean=convert(m0), cov=convert(P0)),
        dynamics=ParamsLGSSMDynamics(
            weights=convert(F), bias=convert(b), input_weights=convert(B), cov=convert(Q)
        ),
        emissions=ParamsLGSSMEmissions(
            weights=convert(H), bias=convert(d), input_weights=convert(D), cov=convert(R)
        ),
    )


def _root(C):
    """A square root of a possibly singular covariance."""
    values, vectors = np.linalg.eigh(C)
    return vectors * np.sqrt(np.maximum(values, 0.0))


def simulate(params, num_timesteps, seed, inputs=None):
    """Draw emissions (T, N) from the model."""
    rng = np.random.default_rng(seed)
    p = model_arrays(params, num_timesteps, inputs, np.float64)
    z = p.m0 + _root(p.P0) @ rng.standard_normal(len(p.m0))
    rows = []
    for t in range(num_timesteps):
        if t:
            z = p.F[t] @ z + p.c[t] + _root(p.Q[t]) @ rng.standard_normal(len(z))
        noise = _root(p.R[t]) @ rng.standard_normal(p.R.shape[1])
        rows.append(p.H[t] @ z + p.d[t] + noise)
    return jnp.asarray(np.stack(rows))


def expanded(params, num_timesteps, input_dim):
    """The same model with every parameter written out for every time step."""
    no_inputs = np.zeros((num_timesteps, input_dim))  # so that c and d are the biases alone
    p = model_arrays(params, num_timesteps, no_inputs, np.float64)
    N, D = p.H.shape[1:]

    def weights(value, rows):
        if value is None:
            value = np.zeros((rows, input_dim))
        return np.broadcast_to(np.asarray(value), (num_timesteps, rows, input_dim))

    return make_params(
        p.m0,
        p.P0,
        p.F,
        p.Q,
        p.H,
        p.R,
        b=p.c,
        d=p.d,
        B=weights(params.dynamics.input_weights, D),
        D=weights(params.emissions.input_weights, N),
    )


def covariance(rng, n, *lead):
    """A well-conditioned full covariance."""
    A = rng.standard_normal((*lead, n, n))
    return A @ np.swapaxes(A, -1, -2) / n + 0.3 * np.eye(n)


def stable(rng, n, *lead, radius=0.9):
    """A dense transition matrix with the given spectral norm."""
    A = rng.standard_normal((*lead, n, n))
    return radius * A / np.linalg.norm(A, 2, axis=(-2, -1), keepdims=True)


def random_stable(D, N, T, seed=0, diagonal=None):
    """Time-invariant model with full matrices, biases None, no inputs.

    `diagonal` is None for a full R, "constant" for R of shape (N,), "varying" for (T, N).
    """
    rng = np.random.default_rng(seed)
    R = covariance(rng, N)
    if diagonal == "constant":
        R = rng.uniform(0.2, 1.0, N)
    elif diagonal == "varying":
        R = rng.uniform(0.2, 1.0, (T, N))
    params = make_params(
        rng.standard_normal(D),
        covariance(rng, D),
        stable(rng, D),
        covariance(rng, D),
        rng.standard_normal((N, D)),
        R,
    )
    return Problem(params, simulate(params, T, seed))


def varying(D=2, N=2, T=T_CONTRACT, U=1, seed=1):
    """Everything time-varying, with inputs and biases."""
    rng = np.random.default_rng(seed)
    params = make_params(
        rng.standard_normal(D),
        covariance(rng, D),
        stable(rng, D, T, radius=0.95),
        covariance(rng, D, T),
        rng.standard_normal((T, N, D)),
        covariance(rng, N, T),
        b=rng.standard_normal((T, D)),
        B=rng.standard_normal((T, D, U)),
        d=rng.standard_normal((T, N)),
        D=rng.standard_normal((T, N, U)),
    )
    inputs = jnp.asarray(rng.standard_normal((T, U)))
    return Problem(params, simulate(params, T, seed, inputs), inputs)


def with_inputs(D=2, N=2, T=T_CONTRACT, U=1, seed=2, **changes):
    """Time-invariant model with biases and inputs; `changes` replace m0, P0, F, Q, H or R."""
    rng = np.random.default_rng(seed)
    arrays = {
        "m0": rng.standard_normal(D),
        "P0": covariance(rng, D),
        "F": stable(rng, D),
        "Q": covariance(rng, D),
        "H": rng.standard_normal((N, D)),
        "R": covariance(rng, N),
        "b": rng.standard_normal(D),
        "B": rng.standard_normal((D, U)),
        "d": rng.standard_normal(N),
        "D": rng.standard_normal((N, U)),
    }
    params = make_params(**(arrays | changes))
    inputs = jnp.asarray(rng.standard_normal((T, U)))
    return Problem(params, simulate(params, T, seed, inputs), inputs)


def started(problem, mean, covariance):
    """The problem with another initial distribution."""
    initial = problem.params.initial._replace(mean=jnp.asarray(mean), cov=jnp.asarray(covariance))
    return problem._replace(params=problem.params._replace(initial=initial))


def with_missing(problem, rows=(), entries=()):
    """Replace whole rows and single (t, n) entries of the emissions by NaN."""
    emissions = np.array(problem.emissions)
    emissions[list(rows)] = np.nan
    for t, n in entries:
        emissions[t, n] = np.nan
    return problem._replace(emissions=jnp.asarray(emissions))


def integrated_wiener_matrices(n, dt, intensity=1.0):
    """Transition and covariance of an (n - 1)-times integrated Wiener process."""
    factorial = np.cumprod([1.0, *range(1, 2 * n)])
    F, Q = np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if j >= i:
                F[i, j] = dt ** (j - i) / factorial[j - i]
            a, b = n - 1 - i, n - 1 - j
            Q[i, j] = intensity * dt ** (a + b + 1) / ((a + b + 1) * factorial[a] * factorial[b])
    return F, Q


def integrated_wiener(T=T_CONTRACT, n=3, dt=0.01, N=1, noise=1e-2, seed=3):
    """Smooth path of n states, the leading N of them measured."""
    F, Q = integrated_wiener_matrices(n, dt)
    R = noise**2 * np.eye(N)
    params = make_params(np.zeros(n), np.eye(n), F, Q, np.eye(N, n), R)
    return Problem(params, simulate(params, T, seed))


def constant_velocity(T=T_CONTRACT, dt=0.01, noise=0.1, seed=4):
    """One axis of a constant-velocity target, position measured."""
    F, Q = integrated_wiener_matrices(2, dt)
    params = make_params(
        np.zeros(2), np.eye(2), F, Q, np.array([[1.0, 0.0]]), np.array([[noise**2]])
    )
    return Problem(params, simulate(params, T, seed))


def near_unit_root(T=T_CONTRACT, gap=1e-4, H=((1.0, 0.4),), seed=5):
    """Two slow modes that a rotation mixes, noisy mixtures of them measured."""
    c, s = np.cos(0.3), np.sin(0.3)
    turn = np.array([[c, -s], [s, c]])
    F = turn @ np.diag([1 - gap, 1 - 3 * gap]) @ turn.T
    params = make_params(
        np.zeros(2), np.eye(2), F, np.diag([0.01, 0.02]), np.array(H), 0.5 * np.eye(len(H))
    )
    return Problem(params, simulate(params, T, seed))


def precise_sensor(T=T_CONTRACT, ratio=1e-4, seed=6):
    """Measurement variance that is `ratio` of the state's noise variance."""
    F = np.array([[0.9, 0.2], [-0.1, 0.8]])
    params = make_params(
        np.zeros(2), np.eye(2), F, np.diag([1.0, 0.5]), np.array([[1.0, 0.5]]), np.array([[ratio]])
    )
    return Problem(params, simulate(params, T, seed))


def ar2(T=T_CONTRACT, seed=7):
    """AR(2) in companion form around a mean: rank-one Q and R = 0."""
    phi, var = np.array([1.39, -0.69]), 2.7
    F = np.array([[phi[0], 1.0], [phi[1], 0.0]])
    Q = np.diag([var, 0.0])
    P0 = Q
    for _ in range(2000):  # the stationary covariance, by iteration: the roots have modulus 0.83
        P0 = F @ P0 @ F.T + Q
    params = make_params(
        np.zeros(2), P0, F, Q, np.array([[1.0, 0.0]]), np.zeros((1, 1)), d=np.array([14.8])
    )
    return Problem(params, simulate(params, T, seed))


def smooth_trend(T=T_CONTRACT, seed=8, R=0.0):
    """Integrated random walk measured without noise: H Q H^T + R is exactly zero."""
    params = make_params(
        np.zeros(2),
        np.eye(2),
        np.array([[1.0, 1.0], [0.0, 1.0]]),
        np.diag([0.0, 0.3]),
        np.array([[1.0, 0.0]]),
        np.array([[R]]),
    )
    return Problem(params, simulate(params, T, seed))


def contract_problems():
    """Problems with D = 2, N = 2, T = 7, U = 1, every parameter written out in time."""
    companion = np.array([[1.2, 1.0], [-0.5, 0.0]])
    rank_one = np.outer([1.0, 0.4], [1.0, 0.4])
    zero = np.zeros((2, 2))
    problems = {
        "regular": with_inputs(),
        "varying": varying(),
        "zero Q": with_inputs(Q=zero),
        "zero P0": with_inputs(P0=zero),
        "zero Q and P0": with_inputs(P0=zero, Q=zero),
        "rank-one Q, one exact sensor": with_inputs(
            F=companion, Q=rank_one, H=np.eye(2), R=np.diag([0.0, 0.4])
        ),
        "rank-one R": with_inputs(R=np.array([[0.25, 0.5], [0.5, 1.0]])),
        "zero R": with_inputs(R=zero),
        "missing rows": with_missing(varying(), rows=(0, 1, 4, 6)),
        "missing entries": with_missing(
            varying(), rows=(5,), entries=((0, 1), (2, 0), (3, 1), (4, 0), (6, 1))
        ),
        "nothing seen": with_missing(varying(), rows=range(T_CONTRACT)),
        "vague prior": with_inputs(P0=1e7 * np.eye(2)),
        "near-unit root": with_inputs(F=np.array([[0.9999, 0.1], [0.0, 0.9998]])),
        "precise sensors": with_inputs(R=1e-4 * np.eye(2)),
        "constant velocity": constant_velocity(),
        "AR(2), R = 0": ar2(),
        "smooth trend, R = 0": smooth_trend(),
    }
    return {name: written_out(with_blind_sensor(problem)) for name, problem in problems.items()}


def with_blind_sensor(problem):
    """Give a problem of one sensor a second one that measures nothing and never reports."""
    if problem.emissions.shape[1] == 2:
        return problem
    e = problem.params.emissions
    emissions = e._replace(
        weights=jnp.concatenate([e.weights, jnp.zeros((1, 2))]),
        bias=None if e.bias is None else jnp.append(e.bias, 0.0),
        cov=jnp.diag(jnp.append(jnp.diagonal(e.cov), 1.0)),
    )
    seen = problem.emissions
    return problem._replace(
        params=problem.params._replace(emissions=emissions),
        emissions=jnp.concatenate([seen, jnp.full_like(seen, jnp.nan)], axis=1),
    )


def written_out(problem, input_dim=1):
    """A problem with its parameters in time and inputs in place, zero where it had none."""
    T = problem.emissions.shape[0]
    inputs = jnp.zeros((T, input_dim)) if problem.inputs is None else problem.inputs
    return Problem(expanded(problem.params, T, input_dim), problem.emissions, inputs)


def local_level(values, level_variance=1469.1, noise_variance=15099.0, prior_variance=1e7):
    """Random walk plus noise on a given series, started at mean zero; the Nile's variances."""
    one = np.ones((1, 1))
    params = make_params(
        [0.0],
        prior_variance * one,
        one,
        level_variance * one,
        one,
        noise_variance * one,
        b=[0.0],
        d=[0.0],
    )
    return Problem(params, jnp.asarray(np.asarray(values, np.float64)).reshape(-1, 1))
