"""Exactly diffuse starts."""

import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from elkax.datasets import load_nile
from oracles import LONG, dense, dense_log_likelihood, extend, model_arrays
from problems import (
    Problem,
    local_level,
    make_params,
    simulate,
    stable,
    started,
    with_inputs,
    with_missing,
)
from smoothers.linear_checks import (
    BACKENDS,
    FORMS,
    check_log_likelihood,
    check_moments,
    compiled,
    oracle,
    scales,
    within,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.tsa.api import UnobservedComponents

T = 9


def trend(seed=5):
    """Local linear trend far from its prior."""
    params = make_params(
        [0.0, 0.0], np.eye(2), [[1.0, 1.0], [0.0, 1.0]], np.diag([0.5, 0.1]), [[1.0, 0.0]], [[2.0]]
    )
    emissions = simulate(params, T, seed) + 300.0
    return Problem(params, emissions)


def partly():
    """Three states with inputs; the prior of the second is correlated with the others."""
    return with_inputs(D=3, T=T, F=stable(np.random.default_rng(9), 3, radius=1.0))


DIFFUSE = {  # problem, diffuse components, number of steps that identify them
    "level": (lambda: local_level(load_nile().values[:T]), (True,), 1),
    "trend": (trend, (True, True), 2),
    "trend, first rows missing": (lambda: with_missing(trend(), rows=(0, 2)), (True, True), 4),
    "slope alone": (trend, (False, True), 2),
    "one of three, with inputs": (partly, (False, True, False), 1),
    "three states, two sensors": (partly, (True, True, True), 2),
    "three states, entries missing": (
        lambda: with_missing(partly(), entries=((0, 0), (1, 1), (2, 0), (2, 1), (7, 0))),
        (True, True, True),
        4,
    ),
}


def diffuse_case(name):
    make, components, steps = DIFFUSE[name]
    problem = make()
    whole = all(components) and name != "level"  # so that both ways to say it are tried
    initial = elkax.ExactDiffuse() if whole else elkax.ExactDiffuse(components=components)
    return problem, components, steps, initial


def given(problem):
    """The arguments without inputs that are None, so that equal programs are compiled once."""
    return tuple(x for x in problem if x is not None)


# The components cancel at the start: J has a condition of about 1e4 in these problems.
DIFFUSE_RTOL = 1e-8


HOW = {
    "level": ("blocked", "covariance"),
    "trend": ("sequential", "square_root"),
    "slope alone": ("blocked", "square_root"),
}


@pytest.mark.parametrize("name", DIFFUSE)
def test_exact_diffuse_smoother(name):
    """Against the dense limit; filtered moments are not finite until the data identify them."""
    problem, components, steps, initial = diffuse_case(name)
    backend, form = HOW.get(name, ("blocked", "covariance"))
    ours = compiled("lgssm_smoother", backend, form, initial=initial)(*given(problem))
    expected = oracle(problem, components)
    check_log_likelihood(ours.marginal_loglik, expected.log_likelihood, T, DIFFUSE_RTOL)
    # Rounding is relative to the posterior here: the prior is infinite.
    none = np.zeros_like(expected.prior_covariances)
    moments = expected.smoothed_means, expected.smoothed_covariances, none
    check_moments(
        ours.smoothed_means, ours.smoothed_covariances, *moments, "smoothed", DIFFUSE_RTOL
    )
    size, _ = scales(*moments)
    bound = DIFFUSE_RTOL * size[:-1, :, None] * size[1:, None, :]
    within(ours.smoothed_cross_covariances, expected.cross_moments, bound, "cross moments")
    check_moments(
        ours.filtered_means[steps - 1 :],
        ours.filtered_covariances[steps - 1 :],
        expected.filtered_means[steps - 1 :],
        expected.filtered_covariances[steps - 1 :],
        none[steps - 1 :],
        "filtered",
        DIFFUSE_RTOL,
    )
    for t in range(steps - 1):
        assert not np.all(np.isfinite(ours.filtered_covariances[t])), t


@pytest.mark.parametrize("name", ["level", "trend"])
def test_exact_diffuse_equals_statsmodels(name):
    """Smoothed states of the univariate exact diffuse smoother."""
    problem, _, _, initial = diffuse_case(name)
    kind = {"level": "llevel", "trend": "lltrend"}[name]
    model = UnobservedComponents(np.asarray(problem.emissions)[:, 0], kind, use_exact_diffuse=True)
    values = {"level": [15099.0, 1469.1], "trend": [2.0, 0.5, 0.1]}[name]
    model.update(np.array(values))
    theirs = model.ssm.smooth()
    ours = compiled("lgssm_smoother", "sequential", "square_root", initial=initial)(*problem[:2])
    assert float(ours.marginal_loglik) == pytest.approx(theirs.llf, rel=1e-8)
    np.testing.assert_allclose(ours.smoothed_means, theirs.smoothed_state.T, rtol=1e-7, atol=1e-7)
    covariances = np.moveaxis(theirs.smoothed_state_cov, -1, 0)
    np.testing.assert_allclose(ours.smoothed_covariances, covariances, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["trend", "one of three, with inputs"])
def test_initial_mean_of_a_diffuse_component_does_not_matter(name):
    problem, components, _, initial = diffuse_case(name)
    value = partial(elkax.lgssm_marginal_log_prob, initial=initial)
    mean = problem.params.initial.mean + 10.0 * np.array(components)
    cov = problem.params.initial.cov * (1 + np.diag(5.0 * np.array(components)))
    moved = started(problem, mean, cov)
    assert float(value(*moved)) == pytest.approx(float(value(*problem)), rel=1e-9)


def test_exact_diffuse_forecast_and_draws(key):
    problem, components, _, initial = diffuse_case("trend")
    model = extend(model_arrays(problem.params, T), 3)
    unseen = np.full((3, 1), np.nan)
    expected = dense(model, np.concatenate([problem.emissions, unseen]), components)
    forecast = elkax.lgssm_forecast(*problem[:2], 3, initial=initial)
    np.testing.assert_allclose(
        forecast.emission_means, expected.emission_means[-3:].astype(float), rtol=1e-8
    )
    np.testing.assert_allclose(
        forecast.emission_covariances, expected.emission_covariances[-3:].astype(float), rtol=1e-8
    )
    draws = elkax.lgssm_posterior_sample(key, *problem[:2], num_samples=2000, initial=initial)
    sd = np.sqrt(np.diagonal(expected.smoothed_covariances[:T], axis1=1, axis2=2)).astype(float)
    mean = expected.smoothed_means[:T].astype(float)
    # Six standard errors of a mean and of a standard deviation.
    within(np.mean(draws, 0), mean, 6 * sd / np.sqrt(2000), "mean of the draws ")
    within(np.std(draws, 0), sd, 6 * sd / np.sqrt(2 * 2000), "deviation of the draws ")


@cache
def diffuse_slopes():
    """Fourth-order differences of the dense diffuse likelihood in F, Q and R."""
    problem = trend()
    model = model_arrays(problem.params, T)
    slopes = {}
    for name in ("F", "Q", "R"):

        def value(h, name=name):
            moved = model._replace(**{name: getattr(model, name) * (1 + h)})
            return dense_log_likelihood(moved, problem.emissions, (True, True))

        # Terms of 1e5 in F: at 1e-3 the fifth derivative still shows.
        h = LONG(1e-4)
        steps = 8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))
        slopes[name] = float(steps / (12 * h))
    return slopes


def test_gradient_of_the_exact_diffuse_likelihood():
    problem = trend()
    p = problem.params

    def value(theta):
        dynamics = p.dynamics._replace(
            weights=p.dynamics.weights * theta[0], cov=p.dynamics.cov * theta[1]
        )
        emissions = p.emissions._replace(cov=p.emissions.cov * theta[2])
        params = p._replace(dynamics=dynamics, emissions=emissions)
        return elkax.lgssm_marginal_log_prob(
            params,
            problem.emissions,
            initial=elkax.ExactDiffuse(),
            backend=BACKENDS["blocked"],
        )

    gradient = jax.jit(jax.grad(value))(jnp.ones(3))
    np.testing.assert_allclose(gradient, list(diffuse_slopes().values()), rtol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_observed_determines_nothing(form):
    """No data have the likelihood one; an improper posterior must not look like numbers."""
    problem = with_missing(trend(), rows=range(T))
    smooth = compiled("lgssm_smoother", "sequential", form, initial=elkax.ExactDiffuse())
    ours = smooth(*problem[:2])
    assert abs(ours.marginal_loglik) < 1e-14
    assert np.all(np.isnan(ours.smoothed_means))
    assert np.all(np.isinf(np.diagonal(ours.smoothed_covariances, axis1=1, axis2=2)))
    with pytest.raises(ValueError, match="must hold an observation"):
        elkax.lgssm_smoother(*problem[:2], form=form, initial=elkax.ExactDiffuse())
