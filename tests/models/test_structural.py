import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statsmodels.api as sm

from elkax.datasets import load_co2
from elkax.models import (
    combine,
    local_level,
    local_linear_trend,
    seasonal,
    trigonometric_seasonal,
)
from elkax.smoothers import ExactDiffuse, lgssm_innovations, lgssm_marginal_log_prob

RNG = np.random.default_rng(5)
T = 40
SERIES = np.cumsum(RNG.standard_normal(T)) + np.tile([2.0, -1.0, 0.5, -1.5], T // 4)
SERIES[[5, 6, 20]] = np.nan


def unobserved_components(values, initial_variance, **specification):
    """statsmodels' model with every state N(0, initial_variance) and the likelihood of all data."""
    model = sm.tsa.UnobservedComponents(values, **specification)
    size = model.k_states
    model.ssm.initialize_known(np.zeros(size), initial_variance * np.eye(size))
    model.ssm.loglikelihood_burn = 0
    return model


@pytest.mark.parametrize(
    ("specification", "build", "count"),
    [
        ({"level": "llevel"}, lambda r, q: local_level(q, r, initial_variance=50.0), 2),
        (
            {"level": "lltrend"},
            lambda r, q, s: local_linear_trend(q, s, r, initial_variance=50.0),
            3,
        ),
        (
            {"level": "rwalk", "seasonal": 4},
            lambda q, s: combine(
                local_level(q, 0.0, initial_variance=50.0),
                seasonal(4, s, initial_variance=50.0),
            ),
            2,
        ),
        (
            {"irregular": True, "freq_seasonal": [{"period": 4}]},
            lambda r, s: trigonometric_seasonal(4, s, r, initial_variance=50.0),
            2,
        ),
        (
            {"irregular": True, "freq_seasonal": [{"period": 7, "harmonics": 2}]},
            lambda r, s: trigonometric_seasonal(7, s, r, initial_variance=50.0, harmonics=2),
            2,
        ),
    ],
    ids=["level", "trend", "dummy seasonal", "harmonics", "two harmonics of three"],
)
def test_log_likelihood_equals_statsmodels(specification, build, count):
    variances = np.array([0.7, 0.3, 0.05])[:count]
    reference = unobserved_components(SERIES, 50.0, **specification)
    value = lgssm_marginal_log_prob(build(*variances), SERIES[:, None])
    # Rounding of two float64 filters over 40 steps with prior variance 50.
    np.testing.assert_allclose(value, reference.loglike(variances), rtol=1e-11)


def test_trend_and_seasonal_on_monthly_co2_with_its_gaps():
    # The four numbers are, in statsmodels' order, the variances of irregular, level, slope and
    # seasonal. The data are means of the measured weeks of each month, 5 of 526 without any.
    # Its default starts every state from N(0, 1e6) and leaves the first 13 time steps, as many as
    # there are states, out of the likelihood: -163.468229. With all steps it is -254.489365.
    variances = np.array([0.03, 0.03, 1e-5, 1e-3])
    values = load_co2("monthly").values
    specification = {"level": "lltrend", "seasonal": 12}
    r, level, slope, season = variances
    params = combine(
        local_linear_trend(level, slope, r, initial_variance=1e6),
        seasonal(12, season, initial_variance=1e6),
    )
    emissions = values[:, None]

    innovations = lgssm_innovations(params, emissions)
    v, s = innovations.innovations[:, 0], innovations.covariances[:, 0, 0]
    log_densities = np.asarray(-0.5 * (jnp.log(2 * jnp.pi * s) + v**2 / s))
    np.testing.assert_allclose(np.nansum(log_densities[13:]), -163.468229, rtol=1e-8)
    default = sm.tsa.UnobservedComponents(values, **specification)
    np.testing.assert_allclose(np.nansum(log_densities[13:]), default.loglike(variances), rtol=1e-9)
    # A prior variance of 1e6 beside a slope variance of 1e-5 costs two digits more.
    known = unobserved_components(values, 1e6, **specification)
    np.testing.assert_allclose(
        lgssm_marginal_log_prob(params, emissions), known.loglike(variances), rtol=1e-9
    )
    diffuse = sm.tsa.UnobservedComponents(values, **specification)
    diffuse.ssm.initialize_diffuse()
    diffuse.ssm.loglikelihood_burn = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a burn-in, which is none
        expected = diffuse.loglike(variances)
    value = lgssm_marginal_log_prob(params, emissions, initial=ExactDiffuse())
    np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_the_two_seasonals_repeat_and_sum_to_zero_without_noise():
    for build, s in ((seasonal, 5), (trigonometric_seasonal, 5), (trigonometric_seasonal, 6)):
        params = build(s, 0.0)
        weights = np.asarray(params.dynamics.weights)
        size = weights.shape[0]
        period = size + 1
        state, values = RNG.standard_normal(size), []
        for _ in range(2 * period):
            values.append((np.asarray(params.emissions.weights) @ state)[0])
            state = weights @ state
        np.testing.assert_allclose(values[:period], values[period:], atol=1e-12)
        np.testing.assert_allclose(np.sum(values[:period]), 0.0, atol=1e-12)


BUILDERS = {
    "level": lambda v: local_level(v[0], v[1]),
    "trend": lambda v: local_linear_trend(v[0], v[2], v[1]),
    "seasonal": lambda v: seasonal(3, v[0], v[1]),
    "harmonics": lambda v: trigonometric_seasonal(3, v[0], v[1]),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_differentiable_in_the_variances_and_under_jit(build):
    def total(v):
        params = build(v)
        leaves = jax.tree.leaves((params.dynamics, params.emissions))
        return sum(jnp.sum(leaf**2) for leaf in leaves)

    v = jnp.array([0.3, 0.2, 0.1])
    gradient = jax.jit(jax.grad(total))(v)
    step = 1e-3
    direct = [(total(v + step * e) - total(v - step * e)) / (2 * step) for e in jnp.eye(3)]
    # The sum is quadratic in the variances, so the difference is exact up to rounding / step.
    np.testing.assert_allclose(gradient, direct, atol=1e-11)
    assert np.any(gradient != 0)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_dtype_follows_the_variances(build):
    single = build(jnp.array([0.3, 0.2, 0.1], jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(single)} == {jnp.dtype("float32")}
    double = build([1, 2, 3])
    assert {leaf.dtype for leaf in jax.tree.leaves(double)} == {jnp.dtype("float64")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: local_level(-1.0, 1.0), "level_variance must not be negative"),
        (lambda: local_level(1.0, -1.0), "emission_variance must not be negative"),
        (lambda: local_level(jnp.ones(2), 1.0), r"level_variance must be a scalar, got shape \(2,"),
        (lambda: local_linear_trend(1.0, -1.0, 1.0), "slope_variance must not be negative"),
        (
            lambda: local_linear_trend(1.0, 1.0, 1.0, jnp.ones(3), 1.0),
            r"initial_mean must be a scalar or of shape \(2,\), got shape \(3,\)",
        ),
        (lambda: seasonal(1, 1.0), "period must be an integer of at least 2, got 1"),
        (lambda: seasonal(4, -1.0), "variance must not be negative"),
        (lambda: trigonometric_seasonal(1, 1.0), "period must be an integer of at least 2, got 1"),
        (
            lambda: trigonometric_seasonal(12, 1.0, harmonics=7),
            "harmonics must be an integer from 1 to 6 at period 12, got 7",
        ),
    ],
)
def test_bad_values_are_refused(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
