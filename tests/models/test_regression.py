import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from elkax.models import combine, local_level, regression
from elkax.smoothers import ExactDiffuse, lgssm_marginal_log_prob, lgssm_smoother

RNG = np.random.default_rng(11)
T, K = 30, 2
COVARIATES = np.c_[np.ones(T), RNG.standard_normal(T)]
VALUES = COVARIATES @ np.array([2.0, -1.5]) + 0.7 * RNG.standard_normal(T)
VALUES[[4, 17]] = np.nan
SEEN = ~np.isnan(VALUES)


def test_constant_coefficients_with_a_flat_prior_are_ordinary_least_squares():
    variance = 0.6
    params = regression(COVARIATES, emission_variance=variance)
    posterior = lgssm_smoother(params, VALUES[:, None], initial=ExactDiffuse())
    fit = sm.OLS(VALUES[SEEN], COVARIATES[SEEN]).fit()
    normalized = np.linalg.inv(COVARIATES[SEEN].T @ COVARIATES[SEEN])
    for t in (0, T - 1):
        np.testing.assert_allclose(posterior.smoothed_means[t], fit.params, rtol=1e-10)
        np.testing.assert_allclose(
            posterior.smoothed_covariances[t], variance * normalized, rtol=1e-10, atol=1e-13
        )


def test_covariates_as_pandas_and_as_integers(unchecked):
    frame = pd.DataFrame({"one": np.ones(T, int), "year": 1900 + np.arange(T)})
    params = regression(frame, emission_variance=1.0)
    np.testing.assert_array_equal(params.emissions.weights[:, 0], frame)
    assert params.emissions.weights.dtype == jnp.float64


def test_a_proper_prior_gives_the_bayesian_linear_regression_likelihood():
    prior, variance = np.array([4.0, 0.5]), 0.6
    params = regression(
        COVARIATES, 0.0, variance, initial_variance=prior, initial_mean=np.array([1.0, 0.0])
    )
    X = COVARIATES[SEEN]
    cov = X @ np.diag(prior) @ X.T + variance * np.eye(len(X))
    residual = VALUES[SEEN] - X @ np.array([1.0, 0.0])
    expected = -0.5 * (
        len(X) * np.log(2 * np.pi)
        + np.linalg.slogdet(cov)[1]
        + residual @ np.linalg.solve(cov, residual)
    )
    value = lgssm_marginal_log_prob(params, VALUES[:, None])
    np.testing.assert_allclose(value, expected, rtol=1e-11)


def test_random_walk_coefficient_on_a_constant_is_a_local_level():
    level = local_level(0.2, 0.6, 1.0, 9.0)
    walk = regression(np.ones((T, 1)), 0.2, 0.6, 9.0, initial_mean=1.0)
    np.testing.assert_allclose(
        lgssm_marginal_log_prob(walk, VALUES[:, None]),
        lgssm_marginal_log_prob(level, VALUES[:, None]),
        rtol=1e-12,
    )


def test_level_and_regression_equal_statsmodels():
    values = np.cumsum(RNG.standard_normal(T)) + VALUES
    slope = COVARIATES[:, 1:]
    params = combine(
        local_level(0.3, 0.6, initial_variance=100.0), regression(slope, initial_variance=100.0)
    )
    reference = sm.tsa.UnobservedComponents(
        values, level="llevel", exog=slope, mle_regression=False
    )
    reference.ssm.initialize_known(np.zeros(2), 100.0 * np.eye(2))
    reference.ssm.loglikelihood_burn = 0
    expected = reference.loglike([0.6, 0.3])
    np.testing.assert_allclose(
        lgssm_marginal_log_prob(params, values[:, None]), expected, rtol=1e-11
    )


def test_differentiable_in_the_coefficient_variances_under_jit():
    def value(q):
        return lgssm_marginal_log_prob(regression(COVARIATES, q, 0.6), VALUES[:, None])

    compiled = jax.jit(jax.value_and_grad(value))
    q, step = jnp.array([0.1, 0.2]), 1e-5
    gradient = compiled(q)[1]
    for i in range(K):
        change = compiled(q.at[i].add(step))[0] - compiled(q.at[i].add(-step))[0]
        # Central differences of a value near -50: rounding 1e-14 / 1e-5, prior variance 1e7.
        np.testing.assert_allclose(gradient[i], change / (2 * step), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: regression(np.where(np.eye(T, K, k=-3), np.nan, COVARIATES)),
            "covariates must be finite, got nan at time index 3, column 0",
        ),
        (lambda: regression(np.ones(T)), r"covariates must be of shape \(T, K\)"),
        (lambda: regression(np.ones((T, 0))), r"covariates must be of shape \(T, K\)"),
        (lambda: regression(COVARIATES, -1.0), "coefficient_variance must not be negative"),
        (
            lambda: regression(COVARIATES, np.ones(3)),
            r"coefficient_variance must be a scalar or of shape \(2,\), got shape \(3,\)",
        ),
    ],
)
def test_bad_values_are_refused(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
