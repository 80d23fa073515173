import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statsmodels.api as sm

from elkax.datasets import load_nile, load_sunspots
from elkax.models import (
    arma,
    combine,
    local_level,
    local_linear_trend,
    maximum_likelihood,
    seasonal,
    transform_errors,
)
from elkax.smoothers import ExactDiffuse, Stationary, lgssm_marginal_log_prob

NILE = load_nile().values[:, None]


def nile_model(theta):
    # Durbin & Koopman start from N(0, 1e7) where they do not start exactly diffuse.
    return local_level(jnp.exp(theta["level"]), jnp.exp(theta["noise"]), 0.0, 1e7)


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
    assert fit.converged and fit.expected_gain <= 1.5e-8 and 0 < fit.iterations < 15
    assert fit.message.startswith("converged: ") and ";" not in fit.message
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
    assert fit.expected_gain > 1e-3 and "raise max_iters" in fit.message
    np.testing.assert_allclose(fit.gradient_norm, np.sqrt(2 * fit.expected_gain))


def test_start_at_the_maximum_takes_no_iteration(capsys):
    there = {"level": 7.29199697, "noise": 9.62242922}
    fit = maximum_likelihood(nile_model, there, NILE, tolerance=1e-6)
    assert fit.converged and fit.iterations == 0
    assert capsys.readouterr().out == ""


def test_progress_is_printed_when_asked(capsys):
    fit = maximum_likelihood(nile_model, start(), NILE, tolerance=1e-2, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == fit.iterations and "log-likelihood -64" in lines[-1]


@pytest.mark.parametrize("beyond", [np.nan, np.inf], ids=["nan", "no variance"])
def test_points_where_the_likelihood_is_not_finite_are_stepped_back_from(beyond):
    def build(theta):
        params = nile_model(theta)
        # A wall close behind the maximum, at 9.6224.
        return jax.tree.map(lambda x: jnp.where(theta["noise"] < 9.65, x, beyond), params)

    fit = maximum_likelihood(build, {"level": 9.0, "noise": 5.0}, NILE)
    assert fit.converged, fit.message
    np.testing.assert_allclose(fit.estimate["noise"], 9.62242922, atol=1e-6)


def ar2_model(theta):
    mean, first, second, log_variance = theta
    return arma(jnp.stack([first, second]), (), jnp.exp(log_variance), mean=mean)


def ar2_series(seed=0, mean=50.0, length=300):
    rng = np.random.default_rng(seed)
    x = np.zeros(length + 200)
    for t in range(2, len(x)):
        x[t] = 0.6 * x[t - 1] + 0.2 * x[t - 2] + rng.normal()
    return x[200:] + mean


@pytest.mark.parametrize("mean", [50.0, 1e4])
def test_an_autoregression_about_a_mean_in_float32_from_zeros(mean):
    # Rounded, so that the reference sees the same data: at 1e4 that is 0.005 nats.
    values = ar2_series(mean=mean).astype(np.float32).astype(float)
    with jax.enable_x64(False):
        fit = maximum_likelihood(ar2_model, np.zeros(4), values[:, None])
    assert fit.converged and fit.estimate.dtype == jnp.float32, fit.message
    # About zero, where the reference finds the maximum; the mean moves with the data.
    reference = sm.tsa.SARIMAX(values - mean, order=(2, 0, 0), trend="c")
    found = reference.fit(disp=0)
    found = reference.fit(found.params, method="nm", maxiter=4000, xtol=1e-9, ftol=1e-12, disp=0)
    constant, first, second, variance = found.params
    expected = [mean + constant / (1 - first - second), first, second, np.log(variance)]
    # float32 rounds the gradient to a thousandth of a standard error.
    assert np.all(np.abs(fit.estimate - np.array(expected)) < 0.01 * fit.standard_errors)
    np.testing.assert_allclose(fit.log_likelihood, found.llf, rtol=1e-5)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_units_of_data_and_parameters_do_not_matter(x64):
    values = ar2_series(1)
    with jax.enable_x64(x64):
        fit = maximum_likelihood(ar2_model, np.zeros(4), values[:, None])
        for unit in (2.0**-10, 2.0**10):
            start = np.array([0.0, 0.0, 0.0, 2 * np.log(unit)])
            scaled = maximum_likelihood(ar2_model, start, unit * values[:, None])
            assert scaled.converged, scaled.message
            change = (scaled.estimate - start) / np.array([unit, 1.0, 1.0, 1.0]) - fit.estimate
            close = 1e-2 if not x64 else 1e-6
            assert np.all(np.abs(change) < close * fit.standard_errors)
            shift = len(values) * np.log(unit)
            np.testing.assert_allclose(
                scaled.log_likelihood + shift, fit.log_likelihood, rtol=1e-5 if not x64 else 1e-12
            )

        def in_other_units(theta):
            return ar2_model(theta * np.array([1e4, 1e-3, 30.0, 1e-2]))

        other = maximum_likelihood(in_other_units, np.zeros(4), values[:, None])
        assert other.converged, other.message
        change = other.estimate * np.array([1e4, 1e-3, 30.0, 1e-2]) - fit.estimate
        assert np.all(np.abs(change) < close * fit.standard_errors)


def trend_model(theta):
    return local_linear_trend(*jnp.exp(theta))


def seasonal_model(theta):
    level, slope, pattern, noise = jnp.exp(theta)
    return combine(local_linear_trend(level, slope, noise), seasonal(12, pattern))


def structural_series(seed, unit, length=160, seasonal_noise=0.3):
    """Simulate trend, season and noise about a level of five units."""
    rng = np.random.default_rng(seed)
    level, slope, pattern, values = 5.0, 0.0, rng.normal(size=12), []
    for t in range(length):
        values.append(level + pattern[t % 12] + rng.normal(scale=0.5))
        level += slope + rng.normal(scale=0.3)
        slope += rng.normal(scale=0.05)
        pattern[t % 12] += rng.normal(scale=seasonal_noise)
    return unit * np.array(values)


def level_model(theta):
    return local_level(*jnp.exp(theta))


# Build, number of parameters, where statsmodels has each, its name of the trend.
STRUCTURES = {
    "local level": (level_model, 2, [1, 0], "llevel"),
    "trend": (trend_model, 3, [1, 2, 0], "lltrend"),
    "trend and season": (seasonal_model, 4, [1, 2, 3, 0], "lltrend"),
}


@pytest.mark.parametrize("unit", [1.0, 2e5], ids=["size 5", "size 1e6"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_structural_models_in_float32_end_where_statsmodels_does(name, unit):
    build, size, order, trend = STRUCTURES[name]
    values = structural_series(3, unit)
    season = {"seasonal": 12} if "season" in name else {}
    reference = sm.tsa.UnobservedComponents(values / unit, trend, use_exact_diffuse=True, **season)
    found = reference.fit(disp=0, maxiter=500)
    found = reference.fit(found.params, method="nm", maxiter=4000, xtol=1e-9, ftol=1e-12, disp=0)
    expected = np.log(found.params[order]) + 2 * np.log(unit)
    with jax.enable_x64(False):
        far = maximum_likelihood(build, np.zeros(size), values[:, None], initial=ExactDiffuse())
        near = np.full(size, np.log(np.var(values) / size))
        near = maximum_likelihood(build, near, values[:, None], initial=ExactDiffuse())
    for fit in (far, near):
        assert fit.converged and np.all(np.isfinite(fit.standard_errors)), fit.message
        assert np.all(np.abs(fit.estimate - expected) < 0.05 * fit.standard_errors)


def test_not_finite_at_the_start_is_refused():
    with pytest.raises(ValueError, match="must be finite at the start, got nan"):
        maximum_likelihood(nile_model, {"level": np.nan, "noise": 9.0}, NILE)


def test_a_start_without_a_stationary_distribution_is_named():
    values = ar2_series()[:, None]
    message = "no stationary distribution"
    with pytest.raises(ValueError, match=message):
        maximum_likelihood(ar2_model, np.array([0.0, 0.9, 0.3, 0.0]), values)

    def random_walk(theta):
        return local_level(jnp.exp(theta[0]), jnp.exp(theta[1]))

    with pytest.raises(ValueError, match=message):
        maximum_likelihood(random_walk, np.zeros(2), values, initial=Stationary())
    with pytest.raises(ValueError, match="emissions.cov that is not finite"):
        maximum_likelihood(random_walk, np.array([0.0, 1e4]), values)


def test_a_call_that_is_traced_is_refused():
    message = "cannot run inside jit"
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda y: maximum_likelihood(nile_model, start(), y).estimate)(NILE)
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda s: maximum_likelihood(nile_model, s, NILE).estimate)(start())
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda: maximum_likelihood(nile_model, start(), NILE).estimate)()


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_a_variance_that_is_zero_has_no_standard_error_and_is_named(x64):
    rng = np.random.default_rng(0)
    # White noise whose first differences are a little too rough for a level that moves.
    noise = rng.normal(size=100)
    values = (5.0 + noise - 0.2 * np.concatenate([[0.0], noise[:-1]]))[:, None]
    with jax.enable_x64(x64):
        zero = {"level": 0.0, "noise": 0.0}
        fit = maximum_likelihood(nile_model, zero, values, initial=ExactDiffuse())
    assert fit.converged and fit.estimate["level"] < -8, fit.message
    assert np.isnan(fit.standard_errors["level"])
    assert "theta['level'] (now -" in fit.message and "ran to the boundary" in fit.message
    assert "theta['noise']" not in fit.message
    # Without the level's noise the model is a mean and white noise.
    variance = np.var(values, ddof=1)
    np.testing.assert_allclose(np.exp(fit.estimate["noise"]), variance, rtol=1e-3)
    np.testing.assert_allclose(fit.standard_errors["noise"], np.sqrt(2 / 99), rtol=1e-3)


def test_a_number_that_nothing_depends_on_is_named():
    def build(theta):
        return nile_model({"level": theta["level"], "noise": theta["noise"] + 0.0 * theta["idle"]})

    fit = maximum_likelihood(build, {"idle": 0.0, **start()}, NILE)
    assert fit.converged and np.isnan(fit.standard_errors["idle"])
    assert "the data do not determine theta['idle']" in fit.message
    assert np.isfinite(fit.standard_errors["level"])


def test_a_variance_drowned_by_another_is_found_again():
    # The slope's variance is 7e17 times too small to have a slope of its own in the likelihood.
    values = structural_series(3, 1.0, seasonal_noise=0.0)[:, None]
    best = maximum_likelihood(trend_model, np.zeros(3), values, initial=ExactDiffuse())
    there = best.estimate.at[1].add(-41.0)
    fit = maximum_likelihood(trend_model, there, values, initial=ExactDiffuse())
    assert fit.converged, fit.message
    np.testing.assert_allclose(fit.estimate, best.estimate, atol=1e-6)


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
