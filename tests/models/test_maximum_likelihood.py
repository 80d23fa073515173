from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.datasets import load_nile, load_sunspots
from elkax.models import arma, local_level, maximum_likelihood, transform_errors
from elkax.smoothers import ExactDiffuse, lgssm_marginal_log_prob

NILE = load_nile().values[:, None]


def nile_model(theta):
    return local_level(jnp.exp(theta["level"]), jnp.exp(theta["noise"]))


def start(dtype=float):
    return {"level": jnp.asarray(9.0, dtype), "noise": jnp.asarray(9.0, dtype)}


@pytest.mark.parametrize(
    ("initial", "log_likelihood", "noise", "level"),
    [
        # A Nelder-Mead search on statsmodels' likelihood, to 1e-9 in the logarithms, ends at
        # these; its own fits stop earlier (15069 and 1484, 15068 and 1485) at lower values.
        (None, -641.5855783461, 15099.6850, 1468.5009),
        (ExactDiffuse(), -633.4645636362, 15098.5184, 1469.1767),
    ],
    ids=["start N(0, 1e7)", "exact diffuse"],
)
def test_local_level_of_the_nile(initial, log_likelihood, noise, level):
    fit = maximum_likelihood(nile_model, start(), NILE, initial=initial)
    assert fit.converged and fit.gradient_norm <= 1.5e-8 and 0 < fit.iterations < 30
    np.testing.assert_allclose(fit.log_likelihood, log_likelihood, rtol=1e-12)
    # The search without derivatives leaves half the digits.
    np.testing.assert_allclose(fit.params.emissions.cov[0, 0], noise, rtol=1e-6)
    np.testing.assert_allclose(fit.params.dynamics.cov[0, 0], level, rtol=1e-6)
    # Durbin & Koopman (2012), Sec. 2.10.
    np.testing.assert_allclose(noise, 15099, rtol=1e-3)
    np.testing.assert_allclose(level, 1469.1, rtol=1e-3)


def test_covariance_is_the_inverse_of_the_second_differences():
    fit = maximum_likelihood(nile_model, start(), NILE)
    top = np.array([fit.estimate["level"], fit.estimate["noise"]])

    @jax.jit
    def value(x):
        return lgssm_marginal_log_prob(nile_model({"level": x[0], "noise": x[1]}), NILE)

    step = 1e-3
    a, b = step * np.eye(2)
    hessian = [
        [value(top + p + q) - value(top + p - q) - value(top - p + q) + value(top - p - q)]
        for p, q in ((a, a), (a, b), (b, b))
    ]
    aa, ab, bb = np.ravel(hessian) / (4 * step**2)
    # Second differences: step^2 of truncation, 1e-13 / step^2 of rounding.
    expected = np.linalg.inv(-np.array([[aa, ab], [ab, bb]]))
    np.testing.assert_allclose(fit.covariance, expected, rtol=1e-5)
    errors = [fit.standard_errors["level"], fit.standard_errors["noise"]]
    np.testing.assert_allclose(errors, np.sqrt(np.diag(fit.covariance)), rtol=1e-12)


def test_sunspots_ar2_with_constant():
    values = load_sunspots().values[:, None]

    def build(theta):
        phi, log_variance, mean = theta
        return arma(phi, (), jnp.exp(log_variance), mean=mean)

    fit = maximum_likelihood(build, (np.zeros(2), 6.0, 50.0), values)
    assert fit.converged, fit.message
    phi, log_variance, mean = fit.estimate
    # A Nelder-Mead search on statsmodels' likelihood ends at these.
    np.testing.assert_allclose(fit.log_likelihood, -1307.318169031849, rtol=1e-12)
    np.testing.assert_allclose(phi, [1.39065571, -0.68857119], atol=1e-7)
    np.testing.assert_allclose(log_variance, 5.61589932, atol=1e-7)
    np.testing.assert_allclose(mean * (1 - phi.sum()), 14.79430264, atol=1e-5)
    constant = transform_errors(lambda t: t[2] * (1 - t[0].sum()), fit.estimate, fit.covariance)
    assert 0 < constant < 5


def test_float32_converges_to_its_own_tolerance():
    fit = maximum_likelihood(nile_model, start(jnp.float32), np.asarray(NILE, np.float32))
    assert fit.converged and fit.estimate["level"].dtype == jnp.float32
    # The prior variance of 1e7 beside 1e3 costs four of seven digits of the first variances.
    np.testing.assert_allclose(fit.params.emissions.cov[0, 0], 15099.68, rtol=0.02)
    np.testing.assert_allclose(fit.params.dynamics.cov[0, 0], 1468.50, rtol=0.1)


def test_a_search_that_is_cut_off_is_not_converged():
    fit = maximum_likelihood(nile_model, start(), NILE, max_iters=2)
    assert not fit.converged and fit.iterations == 2
    assert fit.gradient_norm > 1e-4 and "above" in fit.message


def test_start_at_the_maximum_takes_no_iteration(capsys):
    there = {"level": 7.29199697, "noise": 9.62242922}
    fit = maximum_likelihood(nile_model, there, NILE, tolerance=1e-6)
    assert fit.converged and fit.iterations == 0
    assert capsys.readouterr().out == ""


def test_progress_is_printed_when_asked(capsys):
    fit = maximum_likelihood(nile_model, start(), NILE, tolerance=1e-2, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == fit.iterations and "log-likelihood -64" in lines[-1]


class Refusals(float):
    """A number that counts how often something was added to it from the left."""

    count = 0

    def __radd__(self, other):
        self.count += 1
        return other + float(self)


def test_points_where_the_likelihood_is_not_finite_are_stepped_back_from(monkeypatch):
    refusals = Refusals(10.0)
    # The function of the same name hides the module in its package.
    monkeypatch.setattr(import_module("elkax.models.maximum_likelihood"), "REFUSAL", refusals)

    def build(theta):
        params = nile_model(theta)
        # A wall close behind the maximum, at 9.6224.
        return jax.tree.map(lambda x: jnp.where(theta["noise"] < 9.65, x, jnp.nan), params)

    fit = maximum_likelihood(build, {"level": 9.0, "noise": 5.0}, NILE)
    assert refusals.count > 0
    assert fit.converged, fit.message
    np.testing.assert_allclose(fit.estimate["noise"], 9.62242922, atol=1e-6)


def test_not_finite_at_the_start_is_refused():
    with pytest.raises(ValueError, match="must be finite at the start, got nan"):
        maximum_likelihood(nile_model, {"level": np.nan, "noise": 9.0}, NILE)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, ((), NILE), "start must hold at least one number"),
        (TypeError, ({"level": "nine"}, NILE), "start must hold real numbers"),
        (TypeError, ({"level": 1j}, NILE), "start must hold real numbers"),
        (ValueError, (start(), np.full((3, 1), np.nan)), "emissions must hold at least one number"),
    ],
)
def test_bad_arguments_are_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        maximum_likelihood(nile_model, *arguments)


def test_delta_method():
    theta = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(0.5)}
    covariance = jnp.array([[0.04, 0.01, 0.0], [0.01, 0.09, 0.0], [0.0, 0.0, 0.25]])

    def function(t):
        return {"sum": t["a"].sum(), "exp": jnp.exp(t["b"])}

    errors = transform_errors(function, theta, covariance)
    np.testing.assert_allclose(errors["sum"], np.sqrt(0.04 + 0.09 + 0.02), rtol=1e-12)
    np.testing.assert_allclose(errors["exp"], 0.5 * np.exp(0.5), rtol=1e-12)
    unknown = covariance.at[2].set(jnp.nan).at[:, 2].set(jnp.nan)
    errors = transform_errors(function, theta, unknown)
    np.testing.assert_allclose(errors["sum"], np.sqrt(0.15), rtol=1e-12)
    assert np.isnan(errors["exp"])
    with pytest.raises(ValueError, match=r"must be of shape \(3, 3\) for the 3 numbers"):
        transform_errors(function, theta, jnp.eye(2))
