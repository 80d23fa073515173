"""Real series: printed values and every statsmodels quantity that has a counterpart here."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from elkax.datasets import load_co2, load_nile, load_sunspots
from oracles import model_arrays, sequential
from problems import Problem, local_level, make_params
from smoothers.linear_checks import QUICK_WAYS, compiled, within

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.tsa.api import SARIMAX, UnobservedComponents


NILE_WAYS = QUICK_WAYS


def nile(gaps=False):
    """Local level at Durbin and Koopman's variances; years 21-40 and 61-80 may be cut out."""
    values = np.array(load_nile().values)
    if gaps:
        values[20:40], values[60:80] = np.nan, np.nan
    return local_level(values)


@pytest.mark.parametrize("backend, form", NILE_WAYS)
def test_nile_with_known_start(backend, form):
    """All printed digits: log-likelihood, smoothed level and its variance (FIELD: statsmodels)."""
    posterior = compiled("lgssm_smoother", backend, form)(*nile()[:2])
    assert float(posterior.marginal_loglik) == pytest.approx(-641.585578459, abs=2e-9)
    # The prior variance of 1e7 costs three digits of the covariance form's first step.
    assert float(posterior.smoothed_means[0, 0]) == pytest.approx(1111.22025757, abs=2e-8)
    assert float(posterior.smoothed_means[-1, 0]) == pytest.approx(798.37029261, abs=2e-8)
    assert float(posterior.smoothed_covariances[0, 0, 0]) == pytest.approx(4030.53276734, abs=2e-8)


@pytest.mark.parametrize("backend, form", NILE_WAYS)
def test_nile_with_forty_years_missing(backend, form):
    posterior = compiled("lgssm_smoother", backend, form)(*nile(gaps=True)[:2])
    assert float(posterior.marginal_loglik) == pytest.approx(-389.626978, abs=1e-6)


@pytest.mark.parametrize("form", ["covariance", "square_root"])
def test_nile_with_exact_diffuse_start(form):
    """Printed to six decimals; the prior variance given in the parameters does not matter."""
    for prior_variance in (0.0, 1.0, 1e7):
        problem = local_level(load_nile().values, prior_variance=prior_variance)
        function = compiled(
            "lgssm_marginal_log_prob", "sequential", form, initial=elkax.ExactDiffuse()
        )
        assert float(function(*problem[:2])) == pytest.approx(-633.464564, abs=1e-6)


def test_diffuse_likelihood_does_not_depend_on_the_level_of_the_data():
    """A start that says nothing: far from the initial mean as good as near it."""
    problem = local_level(load_nile().values)
    function = compiled(
        "lgssm_marginal_log_prob", "sequential", "covariance", initial=elkax.ExactDiffuse()
    )
    # Data of 1e9 are themselves rounded to 1e-7.
    far = float(function(problem.params, problem.emissions + 1e9))
    assert far == pytest.approx(-633.464564, abs=1e-6)
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), problem)
    assert float(function(*single[:2])) == pytest.approx(-633.464564, abs=1e-3)


def from_statsmodels(model, mean, covariance):
    """The same model with z_1 ~ N(mean, covariance), and the series, as a problem of ours."""
    ssm = model.ssm
    selection = ssm["selection"]
    params = make_params(
        mean,
        covariance,
        ssm["transition"],
        selection @ ssm["state_cov"] @ selection.T,
        ssm["design"],
        ssm["obs_cov"],
        b=np.reshape(ssm["state_intercept"], (len(mean), -1))[:, 0],
        d=np.reshape(ssm["obs_intercept"], (1, -1))[:, 0],
    )
    return Problem(params, np.asarray(model.endog, np.float64))


def nile_model(gaps):
    model = UnobservedComponents(np.asarray(nile(gaps).emissions)[:, 0], "llevel")
    model.initialize_known(np.zeros(1), 1e7 * np.eye(1))
    model.loglikelihood_burn = 0
    model.update(np.array([15099.0, 1469.1]))
    return model, np.zeros(1), 1e7 * np.eye(1)


def sunspot_model():
    """AR(2) around a constant, R = 0 and a rank-one Q, from its stationary distribution."""
    model = SARIMAX(load_sunspots().values, order=(2, 0, 0), trend="c")
    model.update(np.array([14.794, 1.3907, -0.6886, 274.76]))
    F, c = model.ssm["transition"], model.ssm["state_intercept"][:, 0]
    Q = model.ssm["selection"] @ model.ssm["state_cov"] @ model.ssm["selection"].T
    mean = np.linalg.solve(np.eye(2) - F, c)
    covariance = np.linalg.solve(np.eye(4) - np.kron(F, F), Q.reshape(-1)).reshape(2, 2)
    return model, mean, covariance


def co2_model():
    """Trend and twelve months of season, thirteen states, over the five missing months."""
    model = UnobservedComponents(load_co2("monthly").values, "lltrend", seasonal=12)
    mean, covariance = np.r_[315.0, np.zeros(12)], 100.0 * np.eye(13)
    model.initialize_known(mean, covariance)
    model.loglikelihood_burn = 0
    model.update(np.array([0.03, 0.03, 1e-5, 1e-3]))
    return model, mean, covariance


MODELS = {
    "nile": lambda: nile_model(False),
    "nile with gaps": lambda: nile_model(True),
    "sunspots": sunspot_model,
    "co2": co2_model,
}


# Each model in one form; the other form is compared with the same numbers in the contract suite.
HOW = {
    "nile": ("blocked", "square_root"),
    "nile with gaps": ("blocked", "covariance"),
    "sunspots": ("blocked", "covariance"),
    "co2": ("sequential", "square_root"),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """Problem, statsmodels' results, and how to run ours."""
    model, mean, covariance = MODELS[request.param]()
    problem = from_statsmodels(model, mean, covariance)
    return (problem.params, problem.emissions), model.ssm.smooth(), HOW[request.param]


def leading(x):
    """Put the time axis of statsmodels, its last, first."""
    return np.moveaxis(x, -1, 0)


# Two float64 programs of different order of operations, standard deviations 1e1 to 3e3 at the
# start against 1e-1 later: relative to the largest entry of each series of numbers.
SM = 1e-8


def same(actual, expected, what):
    expected = leading(expected)
    scale = np.max(np.abs(expected[np.isfinite(expected)]), initial=1e-8)
    within(actual, expected, SM * scale, what)


def test_moments_equal_statsmodels(pair):
    problem, theirs, way = pair
    ours = compiled("lgssm_smoother", *way)(*problem)
    assert float(ours.marginal_loglik) == pytest.approx(theirs.llf_obs.sum(), rel=1e-9)
    same(ours.filtered_means, theirs.filtered_state, "filtered means")
    same(ours.filtered_covariances, theirs.filtered_state_cov, "filtered covariances")
    same(ours.smoothed_means, theirs.smoothed_state, "smoothed means")
    same(ours.smoothed_covariances, theirs.smoothed_state_cov, "smoothed covariances")


def test_innovations_equal_statsmodels(pair):
    problem, theirs, way = pair
    ours = compiled("lgssm_innovations", *way)(*problem)
    missing = np.isnan(np.asarray(problem[1]))
    same(ours.means, theirs.forecasts, "predicted emissions")
    same(ours.covariances, theirs.forecasts_error_cov, "their covariances")
    for name, expected in (
        ("innovations", theirs.forecasts_error),
        ("standardized", theirs.standardized_forecasts_error),
    ):
        actual = np.asarray(getattr(ours, name))
        np.testing.assert_array_equal(np.isnan(actual), missing)
        expected = np.where(missing.T, 0, expected)
        same(np.where(missing, 0, actual), expected, name)


def test_disturbances_equal_statsmodels(pair):
    """Index t of statsmodels is the step out of z_t, ours the step into it."""
    problem, theirs, way = pair
    ours = compiled("lgssm_disturbances", *way)(*problem)
    G = theirs.selection[..., 0]
    into = [
        (theirs.smoothed_state_disturbance, lambda x: G @ x),
        (theirs.smoothed_state_disturbance_cov, lambda x: G @ x @ G.T),
    ]
    (means, to_mean), (covariances, to_cov) = into
    means = np.stack([to_mean(x) for x in leading(means)[:-1]], -1)
    covariances = np.stack([to_cov(x) for x in leading(covariances)[:-1]], -1)
    same(ours.dynamics_means[1:], means, "dynamics disturbances")
    same(ours.dynamics_covariances[1:], covariances, "their covariances")
    same(ours.emission_means, theirs.smoothed_measurement_disturbance, "emission disturbances")
    same(
        ours.emission_covariances,
        theirs.smoothed_measurement_disturbance_cov,
        "their covariances",
    )


def test_sunspots_from_the_stationary_start():
    """The printed log-likelihood; the start is solved for, whatever the parameters say of it."""
    problem = from_statsmodels(*sunspot_model())
    params = problem.params._replace(
        initial=problem.params.initial._replace(
            mean=5 + problem.params.initial.mean, cov=3 * problem.params.initial.cov
        )
    )
    function = compiled(
        "lgssm_marginal_log_prob", "blocked", "covariance", initial=elkax.Stationary()
    )
    value = function(params, problem.emissions)
    assert float(value) == pytest.approx(-1307.318168, abs=2e-6)


def co2_problem(mean, covariance):
    model, _, _ = co2_model()
    return from_statsmodels(model, mean, covariance)


def test_co2_with_approximately_diffuse_start():
    """Prior variance 1e6 and the first thirteen months left out of the printed likelihood."""
    problem = co2_problem(np.zeros(13), 1e6 * np.eye(13))
    whole = compiled("lgssm_marginal_log_prob", "sequential", "square_root")(*problem[:2])
    # 1e6 of prior variance against 1e-5: rounding of 1e-16 x 1e11 in single terms.
    assert float(whole) == pytest.approx(-254.489365, abs=1e-5)
    head = problem._replace(emissions=problem.emissions[:13])
    model = model_arrays(problem.params, 13)
    burnt = float(sequential(model, head.emissions).log_likelihood)
    assert float(whole) - burnt == pytest.approx(-163.468229, abs=1e-5)


def test_co2_with_exact_diffuse_start():
    """All thirteen states diffuse, with the fourth month missing: statsmodels' value."""
    problem = co2_problem(np.zeros(13), np.zeros((13, 13)))
    model = UnobservedComponents(
        load_co2("monthly").values, "lltrend", seasonal=12, use_exact_diffuse=True
    )
    expected = model.loglike([0.03, 0.03, 1e-5, 1e-3])
    assert expected == pytest.approx(-164.638997, abs=1e-6)
    function = compiled(
        "lgssm_marginal_log_prob", "sequential", "covariance", initial=elkax.ExactDiffuse()
    )
    # Thirteen steps with an infinite part lose a few more digits than a regular start.
    assert float(function(*problem[:2])) == pytest.approx(expected, abs=1e-5)
