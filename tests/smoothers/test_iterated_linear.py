"""The iterated smoother on linear models: the exact smoother, whatever linearizes and damps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM

import elkax
from elkax import (
    Cubature,
    GaussHermite,
    GaussNewton,
    LevenbergMarquardt,
    SigmaPoints,
    Status,
    Taylor,
)
from oracles import dense, model_arrays
from problems import make_params
from smoothers.linear_checks import BACKENDS, check_smoothed, within

RNG = np.random.default_rng(8)
T, D, N, U = 7, 2, 2, 1
F = np.array([[0.9, 0.3], [-0.2, 0.8]])
B, H, G = RNG.normal(size=(D, U)), RNG.normal(size=(N, D)), RNG.normal(size=(N, U))
Q, R = np.array([[0.5, 0.1], [0.1, 0.3]]), np.array([[0.4, 0.1], [0.1, 0.6]])
INPUTS = RNG.normal(size=(T, U))
EMISSIONS = RNG.normal(size=(T, N)) * 2
EMISSIONS[2] = np.nan
EMISSIONS[4, 0] = np.nan
# The same shapes, so that one compiled function serves all: time-varying and singular.
FACTORS = 1 + 0.5 * np.sin(np.arange(T))[:, None, None]
PROBLEMS = {
    "regular": (Q * FACTORS, R * FACTORS, np.eye(D)),
    "singular Q and P0": (np.diag([0.5, 0.0]) * FACTORS, R * FACTORS, np.diag([0.0, 1.0])),
    "no noise at all in the dynamics": (0 * Q * FACTORS, R * FACTORS, np.eye(D)),
    "one exact sensor": (Q * FACTORS, np.diag([0.0, 0.5]) * FACTORS, np.eye(D)),
}
LINEARIZERS = {
    "taylor": Taylor(),
    "cubature": SigmaPoints(Cubature()),
    "gauss_hermite": SigmaPoints(GaussHermite(3)),
}
# Every linearizer, backend and form, but not every combination: compiling is what takes the time.
WAYS = [
    ("cubature", "sequential", "square_root"),
    ("gauss_hermite", "blocked", "covariance"),
    ("taylor", "associative", "covariance"),
]


def dynamics(z, u):
    return jnp.asarray(F) @ z + jnp.asarray(B) @ u


def emission(z, u):
    return jnp.asarray(H) @ z + jnp.asarray(G) @ u


def oracle(name):
    Q, R, P0 = PROBLEMS[name]
    params = make_params(np.ones(D), P0, F, Q, H, R, B=B, D=G)
    return dense(model_arrays(params, T, INPUTS), EMISSIONS)


def smooth(name, *, max_iters, start="prior", **options):
    Q, R, P0 = map(jnp.asarray, PROBLEMS[name])

    def run(Q, R, P0, emissions, inputs):
        params = ParamsNLGSSM(jnp.ones(D), P0, dynamics, Q, emission, R)
        return elkax.iterated_smoother(
            params, emissions, inputs, max_iters=max_iters, start=start, **options
        )

    return COMPILED.setdefault(
        (max_iters, str(start), *map(str, options.values())),
        jax.jit(run),
    )(Q, R, P0, jnp.asarray(EMISSIONS), jnp.asarray(INPUTS))


COMPILED = {}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("linearizer, backend, form", WAYS)
def test_one_undamped_iteration_is_the_exact_smoother(linearizer, backend, form, name):
    """Of every linearizer; singular covariances take their range-restricted path."""
    solution = smooth(
        name,
        max_iters=1,
        linearizer=LINEARIZERS[linearizer],
        damping=GaussNewton(),
        backend=BACKENDS[backend],
        form=form,
    )
    expected = oracle(name)
    check_smoothed(solution.posterior, expected)
    within(solution.trajectory, np.asarray(expected.smoothed_means, float), 1e-9, "trajectory")
    assert solution.info.constraint_residual <= 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_damped_iteration_converges_to_the_exact_smoother(name):
    solution = smooth(
        name,
        max_iters=60,
        linearizer=Taylor(),
        damping=LevenbergMarquardt(),
        backend=elkax.Sequential(),
    )
    assert solution.info.status == Status.CONVERGED
    expected = oracle(name)
    check_smoothed(solution.posterior, expected)
    within(solution.trajectory, np.asarray(expected.smoothed_means, float), 1e-7, "trajectory")


def test_cost_is_half_the_squared_residuals():
    """Against the sums written out, at the solution."""
    solution = smooth(
        "regular",
        max_iters=1,
        linearizer=Taylor(),
        damping=GaussNewton(),
        backend=BACKENDS["associative"],
        form="covariance",
    )
    z = np.asarray(solution.trajectory)
    Q, R, _ = PROBLEMS["regular"]
    cost = 0.5 * np.sum((z[0] - 1) ** 2)
    for t in range(T):
        if t:
            e = z[t] - F @ z[t - 1] - B @ INPUTS[t]
            cost += 0.5 * e @ np.linalg.solve(Q[t], e)
        o = ~np.isnan(EMISSIONS[t])
        v = (EMISSIONS[t] - H @ z[t] - G @ INPUTS[t])[o]
        cost += 0.5 * v @ np.linalg.solve(R[t][np.ix_(o, o)], v)
    np.testing.assert_allclose(solution.info.cost, cost, rtol=1e-12)


def test_one_time_step():
    def run(emissions):
        params = ParamsNLGSSM(
            jnp.ones(1), jnp.eye(1), lambda z: z, jnp.eye(1), lambda z: 2.0 * z, jnp.eye(1)
        )
        return elkax.iterated_smoother(params, emissions, damping=GaussNewton(), max_iters=2)

    solution = jax.jit(run)(jnp.array([[3.0]]))
    # Prior N(1, 1), y = 2 z + N(0, 1): precision 5, mean (1 + 2 * 3) / 5.
    np.testing.assert_allclose(solution.posterior.smoothed_means, [[1.4]], rtol=1e-12)
    np.testing.assert_allclose(solution.posterior.smoothed_covariances, [[[0.2]]], rtol=1e-12)
    np.testing.assert_allclose(solution.info.cost, 0.5 * (0.4**2 + 0.2**2), rtol=1e-12)
