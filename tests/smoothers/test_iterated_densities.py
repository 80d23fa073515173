"""Emissions with a density: the MAP trajectory by SciPy, the posterior by a grid of all states."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_probability.substrates.jax.distributions as tfd
from scipy.optimize import minimize
from scipy.stats import t as student_t

import elkax
from elkax import ClippedHessian, Fisher, GaussHermite, ParamsDistributionSSM, SigmaPoints, Status
from nonlinear_problems import map_cost
from smoothers.linear_checks import within

T = 8
RNG = np.random.default_rng(4)
MEAN, COV, NOISE = jnp.array([0.3]), jnp.array([[0.5]]), jnp.array([[0.2]])


def dynamics(z):
    return 0.9 * z + 0.2 * jnp.sin(z)


def poisson(z):
    return tfd.Poisson(log_rate=jnp.concatenate([z + 0.5, 0.5 * z]))


def bernoulli(z):
    return tfd.Bernoulli(logits=2.0 * z)


def categorical(z):
    return tfd.Categorical(logits=jnp.stack([0.0 * z, z, -2.0 * z], axis=-1))


def negative_binomial(z):
    return tfd.NegativeBinomial(total_count=4.0, logits=z)


def student(z):
    return tfd.StudentT(df=3.0, loc=z, scale=0.3)


def laplace(z):
    return tfd.Laplace(loc=z, scale=1.0)


# Emissions with missing entries; the one far out of the Student t meets negative curvature.
OUTLIER = RNG.normal(size=(T, 1)) * 0.4
OUTLIER[3] = 4.0
CASES = {
    "poisson": (poisson, ClippedHessian(), RNG.poisson(2.0, (T, 2)).astype(float)),
    "bernoulli": (bernoulli, ClippedHessian(), RNG.binomial(1, 0.6, (T, 1)).astype(float)),
    "categorical": (categorical, ClippedHessian(), RNG.integers(0, 3, (T, 1)).astype(float)),
    "negative binomial": (negative_binomial, Fisher(), RNG.poisson(4.0, (T, 1)).astype(float)),
    "student": (student, ClippedHessian(), OUTLIER),
    # A gradient without any curvature, everywhere but at the kink; the emissions are far from it.
    "laplace": (laplace, ClippedHessian(), np.full((T, 1), 9.0)),
}
for _, _, values in CASES.values():
    values[5] = np.nan
CASES["poisson"][2][2, 1] = np.nan


def negative_log_joint(distribution, emissions):
    """Up to a constant, with missing entries left out by hand."""

    def value(z):
        e = z[1:] - jax.vmap(dynamics)(z[:-1])
        total = 0.5 * jnp.sum((z[0] - MEAN) ** 2) / 0.5 + 0.5 * jnp.sum(e**2) / 0.2
        for t, y in enumerate(np.asarray(emissions)):
            seen = ~np.isnan(y)
            if seen.any():
                density = distribution(z[t]).log_prob(np.where(seen, y, 1.0))
                total = total - jnp.sum(jnp.broadcast_to(density, y.shape)[seen])
        return total

    return value


def smooth(distribution, curvature, emissions, **options):
    params = ParamsDistributionSSM(MEAN, COV, dynamics, NOISE, distribution, curvature)
    function = partial(
        elkax.iterated_smoother, params, max_iters=100, backend=elkax.Sequential(), **options
    )
    # From a constant, which takes less to compile than a pass of the filter.
    smooth = jax.jit(lambda y: function(y, start=MEAN))
    return smooth(jnp.asarray(emissions))


@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_the_mode(name):
    distribution, curvature, emissions = CASES[name]
    solution = smooth(distribution, curvature, emissions)
    assert solution.info.status == Status.CONVERGED
    cost = negative_log_joint(distribution, emissions)
    value = jax.jit(jax.value_and_grad(lambda x: cost(x[:, None])))
    best = minimize(
        lambda x: tuple(np.asarray(part) for part in value(x)),
        np.asarray(solution.trajectory[:, 0]) + 0.1,
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-9},
    )
    np.testing.assert_allclose(solution.info.cost, cost(solution.trajectory), rtol=1e-12)
    within(solution.trajectory[:, 0], best.x, 1e-5, "states")


def grid_moments(distribution, emissions, size=241):
    """Means, deviations and the log-likelihood by filtering and smoothing on a grid."""
    grid = np.linspace(-6, 6, size)
    width = grid[1] - grid[0]
    states = jnp.asarray(grid)[:, None]
    ahead = np.asarray(jax.vmap(dynamics)(states))[:, 0]
    move = np.exp(-0.5 * (grid[None] - ahead[:, None]) ** 2 / 0.2) / np.sqrt(2 * np.pi * 0.2)
    seen = []
    for y in np.asarray(emissions):
        there = ~np.isnan(y)
        density = jax.vmap(lambda z, y=y: distribution(z).log_prob(np.nan_to_num(y)))(states)
        seen.append(np.exp(np.asarray(jnp.sum(jnp.where(there, density, 0.0), axis=1))))
    prior = np.exp(-0.5 * (grid - 0.3) ** 2 / 0.5) / np.sqrt(2 * np.pi * 0.5)
    forward, value = [], 0.0
    for t in range(len(seen)):
        weight = (prior if t == 0 else forward[-1] @ move * width) * seen[t]
        total = weight.sum() * width
        value += np.log(total)
        forward.append(weight / total)
    means, deviations = np.zeros(len(seen)), np.zeros(len(seen))
    backward = np.ones(size)
    for t in range(len(seen) - 1, -1, -1):
        weight = forward[t] * backward
        weight = weight / weight.sum()
        means[t] = weight @ grid
        deviations[t] = np.sqrt(weight @ (grid - means[t]) ** 2)
        if t:
            backward = move @ (seen[t] * backward)
            backward = backward / backward.max()
    return means, deviations, value


@pytest.mark.parametrize("name", ["poisson", "bernoulli"])
def test_posterior_agrees_with_the_exact_one(name):
    """Gaussian averages of gradient and curvature, against a posterior that is a little skewed."""
    distribution, curvature, emissions = CASES[name]
    linearizer = SigmaPoints(GaussHermite(7))
    solution = smooth(distribution, curvature, emissions, linearizer=linearizer)
    assert solution.info.status == Status.CONVERGED
    means, deviations, value = grid_moments(distribution, emissions)
    posterior = solution.posterior
    error = np.asarray(posterior.smoothed_means[:, 0]) - means
    sd = np.sqrt(np.asarray(posterior.smoothed_covariances[:, 0, 0]))
    print(
        f"{name}: means off by {np.max(np.abs(error / deviations)):.3f} sd, sd by "
        f"{np.max(np.abs(sd / deviations - 1)):.3f}, log-likelihood "
        f"{posterior.marginal_loglik:.4f}, exact {value:.4f}"
    )
    within(posterior.smoothed_means[:, 0], means, 0.15 * deviations, "means")
    within(sd, deviations, 0.1 * deviations, "sd")
    within(posterior.marginal_loglik, np.asarray(value), 0.05, "log-likelihood")


# Nearly Gaussian posteriors: about fifty counts each, or single bits that say little.
SAMPLED = {
    "poisson": (lambda z: tfd.Poisson(log_rate=4.0 + z), RNG.poisson(60.0, (T, 1)).astype(float)),
    "bernoulli": (lambda z: tfd.Bernoulli(logits=z), RNG.binomial(1, 0.6, (T, 1)).astype(float)),
}
NUM_DRAWS = 40_000


def importance_moments(cost, mode):
    """Means, deviations and log-integral of exp(-cost), each with its standard error; sample size.

    Draws about the mode have Student t tails in whitened coordinates, which bound the weights.
    """
    hessian = jax.jit(jax.hessian(lambda x: cost(x[:, None])))(mode)
    root = np.linalg.inv(np.linalg.cholesky(hessian)).T
    white = np.random.default_rng(0).standard_t(15, (NUM_DRAWS, T))
    draws = mode + white @ root.T
    log_weights = -np.asarray(jax.jit(jax.vmap(lambda x: cost(x[:, None])))(draws))
    log_weights += np.linalg.slogdet(root)[1] - student_t.logpdf(white, 15).sum(1)
    weights = np.exp(log_weights - log_weights.max())
    value = np.log(weights.mean()) + log_weights.max()
    value_error = weights.std() / weights.mean() / np.sqrt(NUM_DRAWS)
    weights /= weights.sum()
    means = weights @ draws
    square = (draws - means) ** 2
    deviations = np.sqrt(weights @ square)
    # Standard errors of self-normalised averages, by the delta method.
    mean_errors = np.sqrt(weights**2 @ square)
    errors = np.sqrt(weights**2 @ (square - deviations**2) ** 2) / (2 * deviations)
    sampled = (means, mean_errors), (deviations, errors), (value, value_error)
    return *sampled, 1 / np.sum(weights**2)


@pytest.mark.parametrize("name", SAMPLED)
def test_posterior_agrees_with_importance_sampling(name):
    """Within four standard errors of the sampling, and the known distance of mode and mean."""
    distribution, emissions = SAMPLED[name]
    p, q = 0.2, 0.05
    params = ParamsDistributionSSM(
        jnp.zeros(1), p * jnp.eye(1), lambda z: 0.9 * z, q * jnp.eye(1), distribution
    )

    @jax.jit
    def smooth(emissions):
        options = {"start": params.initial_mean, "backend": elkax.Sequential()}
        laplace = elkax.iterated_smoother(params, emissions, **options)
        linearizer = SigmaPoints(GaussHermite(5))
        averaged = elkax.iterated_smoother(params, emissions, linearizer=linearizer, **options)
        trajectory = laplace.trajectory
        return laplace, averaged, elkax.laplace_log_prob(params, emissions, trajectory=trajectory)

    laplace, averaged, value = smooth(jnp.asarray(emissions))
    cost = map_cost(params, emissions)
    *sampled, size = importance_moments(cost, np.asarray(laplace.trajectory[:, 0]))
    (means, mean_errors), (deviations, sd_errors), (exact, error) = sampled
    exact -= 0.5 * (np.log(p) + (T - 1) * np.log(q) + T * np.log(2 * np.pi))
    print(f"{name}: sample size {size:.0f} of {NUM_DRAWS}")
    print(f"  log-likelihood {exact:.4f}, error {error:.4f}, Laplace's value {value:.4f}")
    assert size > 0.8 * NUM_DRAWS
    # What Laplace's value and the deviations are off by themselves is less than the errors.
    assert abs(value - exact) < 4 * error
    # The mode is off the mean by half the skewness, which is 0.13 for 60 counts; the averages of
    # gradient and curvature correct that.
    for label, solution, share in (("Laplace", laplace, 0.07), ("averaged", averaged, 0.0)):
        assert solution.info.status == Status.CONVERGED
        sd = np.sqrt(np.asarray(solution.posterior.smoothed_covariances[:, 0, 0]))
        off = np.asarray(solution.posterior.smoothed_means[:, 0]) - means
        print(
            f"  {label}: means off by {np.max(np.abs(off / deviations)):.4f} sd, "
            f"{np.max(np.abs(off / mean_errors)):.1f} errors; sd off by "
            f"{np.max(np.abs(sd / deviations - 1)):.4f}, "
            f"{np.max(np.abs((sd - deviations) / sd_errors)):.1f} errors"
        )
        assert np.all(np.abs(off) < 4 * mean_errors + share * deviations), label
        assert np.all(np.abs(sd - deviations) < 4 * sd_errors), label
