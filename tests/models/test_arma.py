import jax
import jax.numpy as jnp
import numpy as np
import pytest
from statsmodels.tsa.arima_process import arma_acovf
from statsmodels.tsa.statespace.sarimax import SARIMAX

from elkax.datasets import load_sunspots
from elkax.models import arma
from elkax.smoothers import lgssm_marginal_log_prob

CASES = {
    "white noise": ((), ()),
    "AR(1)": ((0.7,), ()),
    "AR(3)": ((0.5, -0.3, 0.2), ()),
    "MA(2)": ((), (0.8, -1.5)),
    "ARMA(2,1)": ((1.39, -0.69), (0.4,)),
    "ARMA(1,3)": ((-0.6,), (0.3, 0.2, 0.1)),
    "near the unit root": ((0.9995,), (0.2,)),
}


@pytest.mark.parametrize(("ar", "ma"), CASES.values(), ids=CASES)
def test_autocovariances_equal_statsmodels(ar, ma):
    params = arma(ar, ma, 2.5)
    F, P = np.asarray(params.dynamics.weights), np.asarray(params.initial.cov)
    h = np.asarray(params.emissions.weights)[0]
    values, power = [], np.eye(len(F))
    for _ in range(6):
        values.append(h @ power @ P @ h)
        power = F @ power
    expected = arma_acovf(np.r_[1.0, -np.array(ar)], np.r_[1.0, ma], nobs=6, sigma2=2.5)
    # The condition of the Lyapunov equation at a root of 0.9995 is 1000.
    np.testing.assert_allclose(values, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(F @ P @ F.T + params.dynamics.cov, P, rtol=1e-11, atol=1e-12)


def test_sunspots_ar2_with_constant_equals_statsmodels():
    values = load_sunspots().values
    constant, variance = 14.794, 274.76
    phi = np.array([1.3907, -0.6886])
    params = arma(phi, (), variance, mean=constant / (1 - phi.sum()))
    value = lgssm_marginal_log_prob(params, values[:, None])
    # A known value at estimates with more digits than these.
    np.testing.assert_allclose(value, -1307.318168, rtol=0, atol=2e-6)
    reference = SARIMAX(values, order=(2, 0, 0), trend="c")
    np.testing.assert_allclose(value, reference.loglike([constant, *phi, variance]), rtol=1e-11)


def test_arma_with_measurement_noise_and_gaps_equals_statsmodels():
    values = load_sunspots().values[:60].copy()
    values[[3, 4, 30]] = np.nan
    params = arma((0.9, -0.3), (0.5,), 200.0, 30.0, mean=40.0)
    reference = SARIMAX(values - 40.0, order=(2, 0, 1), measurement_error=True)
    expected = reference.loglike([0.9, -0.3, 0.5, 30.0, 200.0])
    value = lgssm_marginal_log_prob(params, values[:, None])
    np.testing.assert_allclose(value, expected, rtol=1e-11)


def test_traced_coefficients_that_are_not_stationary_give_nan():
    build = jax.jit(lambda phi: arma(phi).initial.cov)
    stationary = build(jnp.array([1.39, -0.69]))
    np.testing.assert_allclose(stationary, arma((1.39, -0.69)).initial.cov, rtol=1e-13)
    for phi in ([1.0, 0.0], [0.5, 0.5], [0.5, 0.6], [0.0, -1.2], [2.5, -1.0]):
        assert np.all(np.isnan(build(jnp.array(phi)))), phi


def test_differentiable_in_every_argument():
    values = load_sunspots().values[:40, None]

    def value(theta):
        phi, ma, variance, noise, mean = theta[:2], theta[2:3], theta[3], theta[4], theta[5]
        return lgssm_marginal_log_prob(arma(phi, ma, variance, noise, mean=mean), values)

    theta = jnp.array([1.2, -0.5, 0.3, 250.0, 20.0, 45.0])
    compiled = jax.jit(jax.value_and_grad(value))
    gradient = compiled(theta)[1]
    for i, step in enumerate(1e-5 * np.maximum(np.abs(theta), 1.0)):
        change = compiled(theta.at[i].add(step))[0] - compiled(theta.at[i].add(-step))[0]
        # Central differences: (1e-5)^2 of truncation and 1e-16 / 1e-5 of rounding, times the value.
        np.testing.assert_allclose(gradient[i], change / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arma((1.0,)), r"ar must be the coefficients of a stationary process, got \[1"),
        (lambda: arma((0.5, 0.6)), "ar must be the coefficients of a stationary process"),
        (lambda: arma(0.5), r"ar must be a vector of coefficients, got shape \(\)"),
        (lambda: arma((), np.ones((1, 2))), "ma must be a vector of coefficients"),
        (lambda: arma((0.5,), (), -1.0), "variance must not be negative, got -1"),
        (lambda: arma((0.5,), mean=np.ones(2)), r"mean must be a scalar, got shape \(2,\)"),
    ],
)
def test_bad_values_are_refused(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
