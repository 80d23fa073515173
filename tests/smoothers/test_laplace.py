"""Derivatives of a converged smoother, and Laplace's value, against dense oracles."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_probability.substrates.jax as tfp
from dynamax.generalized_gaussian_ssm.models import ParamsGGSSM
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM

import elkax
from problems import random_stable, with_missing
from smoothers.linear_checks import oracle

T, D, N = 6, 2, 1
RNG = np.random.default_rng(5)
EMISSIONS = jnp.asarray(2.0 + RNG.normal(size=(T, N)))
INPUTS = jnp.asarray(RNG.normal(size=(T, 1)))
COUNTS = jnp.asarray([[2.0], [5.0], [1.0], [0.0], [3.0], [7.0]])
THETA = jnp.array([0.9, 0.4, 0.3])


def rotate(a, z):
    return jnp.stack([a * z[0] + jnp.sin(z[1]), 0.8 * z[1] - 0.2 * jnp.cos(z[0])])


def strong_squares(theta):
    """Large residuals: the emission is far from linear, and the noise small.

    Inputs in both functions, Q that varies in time, diagonal R.
    """
    a, q, r = theta
    scale = jnp.linspace(1.0, 1.5, T)
    return ParamsNLGSSM(
        jnp.ones(D),
        jnp.eye(D),
        lambda z, u: rotate(a, z) + 0.1 * u,
        q * scale[:, None, None] * jnp.eye(D),
        lambda z, u: z[:1] ** 2 + 0.3 * z[1:] ** 3 + 0.1 * u * z[1:],
        r * scale[:, None],
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
    "strong squares": (strong_squares, EMISSIONS.at[2].set(jnp.nan), INPUTS),
    "constrained": (constrained, EMISSIONS, None),
    "Poisson": (poisson, COUNTS.at[1].set(jnp.nan), None),
}
REGULAR = [name for name in CASES if name != "constrained"]


def solve(theta, name, **options):
    make, emissions, inputs = CASES[name]
    options = {"start": "prior", "max_iters": 200, "tolerance": 1e-11, **options}
    return elkax.iterated_smoother(make(theta), emissions, inputs, **options)


def laplace_at(trajectory, theta, name):
    make, emissions, inputs = CASES[name]
    return elkax.laplace_log_prob(make(theta), emissions, inputs, trajectory=trajectory)


def laplace(solution, theta, name):
    return laplace_at(solution.trajectory, theta, name)


def linearized(solution, theta, name):
    return solution.posterior.marginal_loglik


def smoothed(solution, theta, name):
    """Some number of the trajectory and of the covariances."""
    covs = solution.posterior.smoothed_covariances
    return jnp.sum(jnp.sin(solution.trajectory)) + jnp.sum(jnp.cos(covs))


VALUES = {"strong squares": (laplace, linearized, smoothed)}


@cache
def program(name):
    """Values of one solution, their gradients in reverse mode, and its trajectory."""
    values = VALUES.get(name, (laplace,))

    def values_and_trajectory(theta):
        solution = solve(theta, name)
        found = [value(solution, theta, name) for value in values]
        return jnp.stack(found), solution.trajectory

    def run(theta):
        found, pull_back, trajectory = jax.vjp(values_and_trajectory, theta, has_aux=True)
        gradients = [pull_back(e)[0] for e in jnp.eye(len(values))]
        return found, jnp.stack(gradients), trajectory

    return jax.jit(run)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_finite_differences(name):
    """The differences solve the problem anew at each point."""
    _, gradients, _ = program(name)(THETA)
    h = 1e-3
    for i, e in enumerate(h * jnp.eye(len(THETA))):

        def rise(step, name=name):
            return program(name)(THETA + step)[0] - program(name)(THETA - step)[0]

        expected = (8 * rise(e) - rise(2 * e)) / (12 * h)
        np.testing.assert_allclose(gradients[:, i], expected, rtol=2e-6, atol=1e-7)


def test_one_linearized_pass_has_another_gradient():
    """What the gradient would be if the trajectory did not move: 30 % off and more."""
    _, (right, *_), trajectory = program("strong squares")(THETA)
    fixed = partial(laplace_at, trajectory, name="strong squares")
    wrong = jax.jit(jax.grad(fixed))(THETA)
    assert jnp.max(jnp.abs(wrong - right) / jnp.abs(right)) > 0.3


def dense_laplace(make, emissions, inputs, trajectory):
    """Laplace's value from the joint density itself and its dense Hessian."""
    params = make(THETA)
    normal = tfp.distributions.MultivariateNormalFullCovariance
    missing = np.isnan(np.asarray(emissions))[:, 0]

    def joint(flat):
        z = flat.reshape(T, D)
        total = normal(params.initial_mean, params.initial_covariance).log_prob(z[0])
        for t in range(T):
            given = () if inputs is None else (inputs[t],)
            if t:
                q = params.dynamics_covariance
                q = q if q.ndim == 2 else q[t]
                total += normal(params.dynamics_function(z[t - 1], *given), q).log_prob(z[t])
            if missing[t]:
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
    value, hessian = jax.jit(lambda z: (joint(z), jax.hessian(joint)(z)))(flat)
    _, log_det = np.linalg.slogdet(-hessian)
    return value + 0.5 * flat.size * np.log(2 * np.pi) - 0.5 * log_det


@pytest.mark.parametrize("name", REGULAR)
def test_laplace_value_is_the_dense_one(name):
    make, emissions, inputs = CASES[name]
    (value, *_), _, trajectory = program(name)(THETA)
    expected = dense_laplace(make, emissions, inputs, trajectory)
    np.testing.assert_allclose(value, expected, rtol=1e-10)


def as_nonlinear(params):
    initial, dynamics, emissions = params
    return ParamsNLGSSM(
        initial.mean,
        initial.cov,
        lambda z: dynamics.weights @ z,
        dynamics.cov,
        lambda z: emissions.weights @ z,
        emissions.cov,
    )


@jax.jit
def solve_and_evaluate(params, emissions):
    params = as_nonlinear(params)
    trajectory = elkax.iterated_smoother(params, emissions, start="prior").trajectory
    return elkax.laplace_log_prob(params, emissions, trajectory=trajectory)


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
    value = solve_and_evaluate(problem.params, problem.emissions)
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
    found = jnp.ones((3, 1))
    assert jnp.isfinite(elkax.laplace_log_prob(params, emissions, trajectory=found))
    assert jnp.isnan(elkax.laplace_log_prob(spoiled, emissions, trajectory=found))


@pytest.mark.parametrize("which", [0, 1])
def test_what_minimises_no_cost_is_not_differentiated(which):
    """Neither in what the functions close over (a) nor in an array (q)."""

    def value(number):
        theta = [*THETA]
        theta[which] = number
        # From the prior, which takes less to trace than a pass of the filter.
        options = {"linearizer": elkax.SigmaPoints(), "max_iters": 2, "start": "prior"}
        solution = elkax.iterated_smoother(constrained(theta), EMISSIONS, **options)
        return jnp.sum(solution.trajectory)

    with pytest.raises(NotImplementedError, match="with the linearizer Taylor()"):
        jax.eval_shape(jax.grad(value), THETA[which])


def test_bad_input():
    params = constrained(THETA)
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
