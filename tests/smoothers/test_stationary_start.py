"""Stationary starts."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov

import elkax
from elkax.datasets import load_nile
from oracles import dense_log_likelihood, model_arrays
from problems import (
    Problem,
    ar2,
    make_params,
    random_stable,
    simulate,
    started,
    with_inputs,
)
from smoothers.linear_checks import (
    check_smoothed,
    compiled,
    oracle,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.tsa.api import SARIMAX

T = 7


def slow(gap):
    """Stable dynamics of spectral radius 1 - gap, with a bias."""
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((2, 2))
    F = vectors @ np.diag([1 - gap, 0.5]) @ np.linalg.inv(vectors)
    params = make_params(
        np.zeros(2),
        np.eye(2),
        F,
        np.eye(2),
        rng.standard_normal((1, 2)),
        np.eye(1),
        b=np.array([0.3, -0.2]),
    )
    return Problem(params, simulate(params, T, 3))


def stationary(problem):
    """The problem started at its stationary moments, by scipy."""
    dynamics = problem.params.dynamics
    F, Q = np.asarray(dynamics.weights), np.asarray(dynamics.cov)
    b = np.zeros(len(F)) if dynamics.bias is None else np.asarray(dynamics.bias)
    mean = np.linalg.solve(np.eye(len(F)) - F, b)
    return started(problem, mean, solve_discrete_lyapunov(F, Q, method="direct"))


# What scipy's own solution loses grows as 1 / gap.
STATIONARY = {
    "two states": (lambda: random_stable(2, 1, T), 1e-9),
    "AR(2), R = 0": (ar2, 1e-9),
    "spectral radius 0.99": (partial(slow, 1e-2), 1e-9),
    "spectral radius 0.99999": (partial(slow, 1e-5), 1e-7),
}


@pytest.mark.parametrize("name", STATIONARY)
def test_stationary_start(name):
    make, rtol = STATIONARY[name]
    problem = with_biases(make())
    smooth = compiled("lgssm_smoother", "blocked", "covariance", initial=elkax.Stationary())
    check_smoothed(smooth(*problem[:2]), oracle(stationary(problem)), rtol)


def with_biases(problem):
    """Write absent biases as zeros, so that the problems share one program."""
    p = problem.params
    D, N = p.emissions.weights.shape[::-1]
    dynamics, emissions = p.dynamics, p.emissions
    if dynamics.bias is None:
        dynamics = dynamics._replace(bias=jnp.zeros(D))
    if emissions.bias is None:
        emissions = emissions._replace(bias=jnp.zeros(N))
    return problem._replace(params=p._replace(dynamics=dynamics, emissions=emissions))


def test_stationary_start_equals_statsmodels():
    model = SARIMAX(load_nile().values, order=(2, 0, 1), trend="c")
    values = np.array([300.0, 0.9, -0.2, 0.3, 2e4])
    expected = model.loglike(values)
    ssm = model.ssm
    Q = ssm["selection"] @ ssm["state_cov"] @ ssm["selection"].T
    params = make_params(
        np.zeros(2),
        np.eye(2),
        ssm["transition"],
        Q,
        ssm["design"],
        ssm["obs_cov"],
        b=ssm["state_intercept"][:, 0],
    )
    emissions = jnp.asarray(load_nile().values)[:, None]
    value = elkax.lgssm_marginal_log_prob(params, emissions, initial=elkax.Stationary())
    assert float(value) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("radius", [1.0, 1.05])
def test_no_stationary_distribution_gives_nan(radius):
    F = radius * np.array([[0.6, -0.8], [0.8, 0.6]])
    problem = random_stable(2, 1, 9)
    dynamics = problem.params.dynamics._replace(weights=jnp.asarray(F))
    params = problem.params._replace(dynamics=dynamics)
    value = elkax.lgssm_marginal_log_prob(params, problem.emissions, initial=elkax.Stationary())
    assert np.isnan(value)


def test_stationary_start_needs_constant_dynamics():
    problem = with_inputs()
    F = jnp.broadcast_to(problem.params.dynamics.weights, (T, 2, 2))
    params = problem.params._replace(dynamics=problem.params.dynamics._replace(weights=F))
    with pytest.raises((ValueError, TypeError), match="(?i)stationary"):
        elkax.lgssm_filter(params, *problem[1:], initial=elkax.Stationary())


def test_gradient_through_the_stationary_start():
    """The start moves with the dynamics."""
    problem = random_stable(2, 1, 9)
    weights, noise = problem.params.dynamics.weights, problem.params.dynamics.cov

    def at(theta):
        dynamics = problem.params.dynamics._replace(
            weights=theta[0] * weights, cov=theta[1] * noise
        )
        return problem._replace(params=problem.params._replace(dynamics=dynamics))

    def value(theta):
        p = at(theta)
        return elkax.lgssm_marginal_log_prob(p.params, p.emissions, initial=elkax.Stationary())

    def expected(theta):
        p = stationary(at(theta))
        return float(dense_log_likelihood(model_arrays(p.params, 9), p.emissions))

    gradient = jax.jit(jax.grad(value))(jnp.ones(2))
    h = 1e-3
    for i, direction in enumerate(np.eye(2)):
        slope = (
            8 * (expected(1 + h * direction) - expected(1 - h * direction))
            - (expected(1 + 2 * h * direction) - expected(1 - 2 * h * direction))
        ) / (12 * h)
        # scipy's float64 start limits the difference quotient to 1e-14 / h.
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-8, abs=1e-9)
