"""Derivatives of a converged smoother, and Laplace's value, against dense oracles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_probability.substrates.jax as tfp
from dynamax.generalized_gaussian_ssm.models import ParamsGGSSM
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM

import elkax
from problems import random_stable, with_missing
from smoothers.linear_checks import FAST_COMPILE, oracle

T, D, N = 6, 2, 1
RNG = np.random.default_rng(5)
EMISSIONS = jnp.asarray(2.0 + RNG.normal(size=(T, N)))
INPUTS = jnp.asarray(RNG.normal(size=(T, 1)))
COUNTS = jnp.asarray([[2.0], [5.0], [1.0], [0.0], [3.0], [7.0]])
THETA = jnp.array([0.9, 0.4, 0.3])


def rotate(a, z):
    return jnp.stack([a * z[0] + jnp.sin(z[1]), 0.8 * z[1] - 0.2 * jnp.cos(z[0])])


def strong_squares(theta):
    """Large residuals: the emission is far from linear, and the noise small."""
    a, q, r = theta
    return ParamsNLGSSM(
        jnp.ones(D),
        jnp.eye(D),
        lambda z: rotate(a, z),
        q * jnp.eye(D),
        lambda z: z[:1] ** 2 + 0.3 * z[1:] ** 3,
        r * jnp.eye(N),
    )


def with_inputs(theta):
    """Noise that varies in time, diagonal R, inputs in both functions."""
    a, q, r = theta
    return ParamsNLGSSM(
        jnp.zeros(D),
        jnp.eye(D),
        lambda z, u: rotate(a, z) + u,
        q * jnp.arange(1.0, T + 1)[:, None, None] * jnp.eye(D),
        lambda z, u: jnp.tanh(z[:1]) + 0.5 * u * z[1:],
        r * jnp.arange(1.0, T + 1)[:, None],
    )


def constrained(theta):
    """A second-order model: no noise in its second state, known exactly at the start."""
    a, q, r = theta
    return ParamsNLGSSM(
        jnp.array([1.0, 0.5]),
        jnp.diag(jnp.array([1.0, 0.0])),
        lambda z: jnp.stack([a * jnp.sin(z[0]) + 0.5 * z[1], z[0]]),
        q * jnp.diag(jnp.array([1.0, 0.0])),
        lambda z: z[:1] + 0.2 * z[1:] ** 2,
        r * jnp.eye(N),
    )


def poisson(theta):
    a, q, r = theta
    return elkax.ParamsDistributionSSM(
        jnp.zeros(D),
        jnp.eye(D),
        lambda z: rotate(a, z),
        q * jnp.eye(D),
        lambda z: tfp.distributions.Poisson(log_rate=r * z[:1] + z[1:]),
    )


CASES = {
    "strong squares": (strong_squares, EMISSIONS.at[2].set(jnp.nan), None),
    "inputs": (with_inputs, EMISSIONS, INPUTS),
    "constrained": (constrained, EMISSIONS, None),
    "Poisson": (poisson, COUNTS.at[1].set(jnp.nan), None),
}
REGULAR = [name for name in CASES if name != "constrained"]


def solve(theta, name, **options):
    make, emissions, inputs = CASES[name]
    options = {"max_iters": 200, "tolerance": 1e-11, **options}
    return elkax.iterated_smoother(make(theta), emissions, inputs, **options)


def laplace(theta, name):
    make, emissions, inputs = CASES[name]
    trajectory = solve(theta, name).trajectory
    return elkax.laplace_log_prob(make(theta), emissions, inputs, trajectory=trajectory)


def linearized(theta, name):
    return solve(theta, name).posterior.marginal_loglik


def smoothed(theta, name):
    """Some number of the trajectory and of the covariances."""
    solution = solve(theta, name)
    covs = solution.posterior.smoothed_covariances
    return jnp.sum(jnp.sin(solution.trajectory)) + jnp.sum(jnp.cos(covs))


@pytest.mark.parametrize(
    "name, value",
    [*((name, laplace) for name in CASES), ("strong squares", linearized), ("inputs", smoothed)],
)
def test_gradient_is_that_of_finite_differences(name, value):
    """In reverse mode; the differences solve the problem anew at each point."""
    program = jax.value_and_grad(partial(value, name=name))
    program = jax.jit(program, compiler_options=FAST_COMPILE)
    _, gradient = program(THETA)
    h = 1e-3
    for i, e in enumerate(h * jnp.eye(len(THETA))):
        near = program(THETA + e)[0] - program(THETA - e)[0]
        far = program(THETA + 2 * e)[0] - program(THETA - 2 * e)[0]
        np.testing.assert_allclose(gradient[i], (8 * near - far) / (12 * h), rtol=2e-6, atol=1e-7)


def test_one_linearized_pass_has_another_gradient():
    """What the gradient would be if the trajectory did not move: 30 % off and more."""

    def fixed_trajectory(theta):
        make, emissions, inputs = CASES["strong squares"]
        trajectory = jax.lax.stop_gradient(solve(theta, "strong squares").trajectory)
        params = make(theta)
        return elkax.laplace_log_prob(params, emissions, inputs, trajectory=trajectory)

    right, wrong = (
        jax.jit(jax.grad(function), compiler_options=FAST_COMPILE)(THETA)
        for function in (partial(laplace, name="strong squares"), fixed_trajectory)
    )
    assert jnp.max(jnp.abs(wrong - right) / jnp.abs(right)) > 0.3


def dense_laplace(make, emissions, inputs, trajectory):
    """Laplace's value from the joint density itself and its dense Hessian."""
    params = make(THETA)
    normal = tfp.distributions.MultivariateNormalFullCovariance

    def joint(flat):
        z = flat.reshape(T, D)
        total = normal(params.initial_mean, params.initial_covariance).log_prob(z[0])
        for t in range(T):
            given = () if inputs is None else (inputs[t],)
            if t:
                q = params.dynamics_covariance
                q = q if q.ndim == 2 else q[t]
                total += normal(params.dynamics_function(z[t - 1], *given), q).log_prob(z[t])
            if not jnp.isfinite(emissions[t, 0]):
                continue
            if isinstance(params, ParamsNLGSSM):
                mean = params.emission_function(z[t], *given)
                r = params.emission_covariance
                r = r[t] if r.shape == (T, N) else r[0]
                total += jnp.sum(tfp.distributions.Normal(mean, jnp.sqrt(r)).log_prob(emissions[t]))
            else:
                distribution = params.emission_distribution(z[t], *given)
                total += jnp.sum(distribution.log_prob(emissions[t]))
        return total

    flat = trajectory.ravel()
    _, log_det = np.linalg.slogdet(-jax.hessian(joint)(flat))
    return joint(flat) + 0.5 * flat.size * np.log(2 * np.pi) - 0.5 * log_det


@pytest.mark.parametrize("name", REGULAR)
def test_laplace_value_is_the_dense_one(name):
    make, emissions, inputs = CASES[name]
    trajectory = solve(THETA, name).trajectory
    expected = dense_laplace(make, emissions, inputs, trajectory)
    np.testing.assert_allclose(laplace(THETA, name), expected, rtol=1e-10)


def as_nonlinear(problem):
    initial, dynamics, emissions = problem.params
    return ParamsNLGSSM(
        initial.mean,
        initial.cov,
        lambda z: dynamics.weights @ z + dynamics.bias,
        dynamics.cov,
        lambda z: emissions.weights @ z + emissions.bias,
        emissions.cov,
    )


@pytest.mark.parametrize("singular", [False, True])
def test_laplace_value_of_a_linear_model_is_its_likelihood(singular):
    """Also where P0, Q and an emission have no noise in some direction."""
    problem = with_missing(random_stable(3, 2, T), rows=(2,), entries=((4, 0),))
    if singular:
        initial, dynamics, emissions = problem.params
        one = jnp.diag(jnp.array([1.0, 0.0, 0.0]))
        problem = problem._replace(
            params=problem.params._replace(
                initial=initial._replace(cov=jnp.diag(jnp.array([1.0, 0.5, 0.0]))),
                dynamics=dynamics._replace(cov=one),
                emissions=emissions._replace(cov=jnp.diag(jnp.array([0.0, 0.5]))),
            )
        )
    params = as_nonlinear(problem)
    solution = elkax.iterated_smoother(params, problem.emissions)
    value = elkax.laplace_log_prob(params, problem.emissions, trajectory=solution.trajectory)
    np.testing.assert_allclose(value, oracle(problem).log_likelihood, rtol=1e-9)


def test_no_value_where_the_cost_has_no_minimum():
    """At a maximum of the density in one direction, and for parameters that are not finite."""
    params = ParamsNLGSSM(
        jnp.zeros(1), jnp.eye(1), lambda z: z, jnp.eye(1), lambda z: z**2, 0.01 * jnp.eye(1)
    )
    emissions = jnp.ones((3, 1))
    saddle = jnp.zeros((3, 1))
    assert jnp.isnan(elkax.laplace_log_prob(params, emissions, trajectory=saddle))
    spoiled = params._replace(dynamics_covariance=jnp.full((1, 1), jnp.nan))
    found = elkax.iterated_smoother(params, emissions, start=jnp.ones(1)).trajectory
    assert jnp.isfinite(elkax.laplace_log_prob(params, emissions, trajectory=found))
    assert jnp.isnan(elkax.laplace_log_prob(spoiled, emissions, trajectory=found))


def test_what_minimises_no_cost_is_not_differentiated():
    def value(theta):
        points = elkax.SigmaPoints()
        return jnp.sum(solve(theta, "strong squares", linearizer=points).trajectory)

    with pytest.raises(NotImplementedError, match="with the linearizer Taylor()"):
        jax.grad(value)(THETA)


def test_bad_input():
    params = strong_squares(THETA)
    with pytest.raises(ValueError, match=r"trajectory must be \(T, D\) = \(6, 2\), got shape \(6"):
        elkax.laplace_log_prob(params, EMISSIONS, trajectory=jnp.zeros((6, 3)))
    moments = ParamsGGSSM(
        params.initial_mean,
        params.initial_covariance,
        params.dynamics_function,
        params.dynamics_covariance,
        params.emission_function,
        lambda z: jnp.eye(N),
    )
    with pytest.raises(TypeError, match="for Laplace's method, got ParamsGGSSM"):
        elkax.laplace_log_prob(moments, EMISSIONS, trajectory=jnp.zeros((T, D)))
