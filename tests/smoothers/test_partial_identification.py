"""Diffuse starts of which the data determine a part: that part is given, the rest is marked.

A state that is not determined has mean NaN, variance inf and covariances NaN; everything else is
finite and as if that state were not there.
"""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from exact_oracle import exact
from oracles import model_arrays
from problems import make_params
from random_models import FORMS, check_posterior

T = 12
DIFFUSE = elkax.ExactDiffuse()
RNG = np.random.default_rng(17)
# Eighths, so that float32 holds them.
WALK = np.round(8 * (40 + np.cumsum(RNG.standard_normal(T)) + RNG.standard_normal(T))) / 8
X = np.round(8 * RNG.standard_normal(T)) / 8
DTYPES = {"float64": jnp.float64, "float32": jnp.float32}
RTOL = {"float64": 1e-9, "float32": 1e-4}


@cache
def compiled(function, form, **options):
    function = partial(getattr(elkax, function), form=form, initial=DIFFUSE, **options)
    return jax.jit(function)


def level_and(covariate):
    """A level observed with a regression on one covariate; two states."""
    weights = np.stack([np.ones(T), covariate], axis=1)[:, None]
    noise = np.diag([0.5, 0.0])
    return make_params(np.zeros(2), np.eye(2), np.eye(2), noise, weights, [[1.0]])


def level_alone():
    one = np.eye(1)
    return make_params([0.0], one, one, one / 2, one, one)


def effects_alone(covariates):
    """Constant coefficients and nothing else."""
    K = covariates.shape[1]
    nothing = np.zeros((K, K))
    return make_params(np.zeros(K), np.eye(K), np.eye(K), nothing, covariates[:, None], [[1.0]])


def two_levels():
    return make_params(
        np.zeros(2), np.eye(2), np.eye(2), np.diag([0.5, 0.25]), np.eye(2), np.diag([1.0, 0.5])
    )


one_hot = np.eye(T)[5]
one_hot_at_the_end = np.eye(T)[-1]
CASES = {  # parameters, emissions, rank of the information on the effects
    "a dummy that is still zero": (lambda: level_and(np.zeros(T)), WALK, 1),
    "a dummy for one time": (lambda: level_and(one_hot), WALK, 2),
    "a dummy for the last time": (lambda: level_and(one_hot_at_the_end), WALK, 2),
    "a dummy for a time that is missing": (
        lambda: level_and(one_hot),
        np.where(one_hot, np.nan, WALK),
        1,
    ),
    "a covariate that is one all the time": (lambda: level_and(np.ones(T)), WALK, 1),
    "a dummy alone that is never on": (lambda: effects_alone(np.zeros((T, 1))), WALK, 0),
    "a missing series": (two_levels, np.stack([WALK, np.full(T, np.nan)], axis=1), 1),
    "collinear covariates": (lambda: effects_alone(np.stack([X, 2 * X], axis=1)), WALK, 1),
    "two of three collinear": (
        lambda: effects_alone(np.stack([X, 2 * X, np.ones(T)], axis=1)),
        WALK,
        2,
    ),
    "everything missing": (lambda: level_and(X), np.full(T, np.nan), 0),
}


@cache
def case(name):
    make, emissions, rank = CASES[name]
    params, emissions = make(), np.asarray(emissions).reshape(T, -1)
    D = params.initial.mean.shape[0]
    expected = exact(model_arrays(params, T, dtype=np.float64), emissions, (True,) * D)
    return params, emissions, rank, expected


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, DTYPES[dtype]), tree)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_what_the_data_determine_is_given(name, dtype, form):
    """Every moment and the likelihood, and what is open; `rank` is found by counting."""
    params, emissions, rank, expected = case(name)
    assert expected.rank == rank
    posterior = compiled("lgssm_smoother", form)(cast(params, dtype), cast(emissions, dtype))
    check_posterior(posterior, expected, RTOL[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a dummy that is still zero", "a missing series"])
def test_the_rest_is_as_if_what_is_open_were_not_there(name, form):
    params, emissions, _, _ = case(name)
    both = compiled("lgssm_smoother", form)(params, emissions)
    alone = compiled("lgssm_smoother", form)(level_alone(), emissions[:, :1])
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(both.marginal_loglik, alone.marginal_loglik, **close)
    for what in ("filtered", "smoothed"):
        means, covariances = f"{what}_means", f"{what}_covariances"
        np.testing.assert_allclose(getattr(both, means)[:, 0], getattr(alone, means)[:, 0], **close)
        np.testing.assert_allclose(
            getattr(both, covariances)[:, 0, 0], getattr(alone, covariances)[:, 0, 0], **close
        )
        assert np.isnan(getattr(both, means)[:, 1]).all()
        assert np.isposinf(getattr(both, covariances)[:, 1, 1]).all()
        assert np.isnan(getattr(both, covariances)[:, 0, 1]).all()


@pytest.mark.parametrize("form", FORMS)
def test_collinear_covariates_have_the_likelihood_of_one(form):
    """x and 2x carry b + 2c alone: J = j (1, 2)^T (1, 2), whose pseudo-determinant is 5 j."""
    params, emissions, _, _ = case("collinear covariates")
    both = compiled("lgssm_marginal_log_prob", form)(params, emissions)
    one = compiled("lgssm_marginal_log_prob", form)(effects_alone(X[:, None]), emissions)
    np.testing.assert_allclose(both, one - math.log(5) / 2, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_predictions_that_are_determined_are_finite(form):
    """Forecasts of x and 2x are those of x; what nothing tells has variance inf."""
    future = np.array([1.5, -2.0])
    x = np.concatenate([X, future])
    emissions = WALK[:, None]
    forecast = partial(elkax.lgssm_forecast, form=form, initial=DIFFUSE)
    both = forecast(effects_alone(np.stack([x, 2 * x], axis=1)), emissions, 2)
    one = forecast(effects_alone(x[:, None]), emissions, 2)
    np.testing.assert_allclose(both.emission_means, one.emission_means, rtol=1e-11)
    np.testing.assert_allclose(both.emission_covariances, one.emission_covariances, rtol=1e-11)
    assert np.isnan(both.state_means).all()
    params, emissions, _, _ = case("a missing series")
    both = forecast(params, emissions, 2)
    one = forecast(level_alone(), emissions[:, :1], 2)
    np.testing.assert_allclose(both.emission_means[:, 0], one.emission_means[:, 0], rtol=1e-12)
    np.testing.assert_allclose(
        both.emission_covariances[:, 0, 0], one.emission_covariances[:, 0, 0], rtol=1e-12
    )
    assert np.isnan(both.emission_means[:, 1]).all()
    assert np.isposinf(both.emission_covariances[:, 1, 1]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a dummy that is still zero", "a missing series"])
def test_draws_of_what_is_determined(name, form, key):
    params, emissions, _, expected = case(name)
    draws = compiled("lgssm_posterior_sample", form, num_samples=2000)(key, params, emissions)
    first = np.asarray(draws)[:, :, 0]
    mean, sd = expected.smoothed_means[:, 0], np.sqrt(expected.smoothed_covariances[:, 0, 0])
    # Six standard errors of a mean and of a standard deviation; NaN fails.
    assert np.all(np.abs(first.mean(0) - mean) <= 6 * sd / math.sqrt(2000))
    assert np.all(np.abs(first.std(0) - sd) <= 6 * sd / math.sqrt(4000))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in CASES if "everything" not in name])
def test_gradient_with_what_is_open_held_fixed(name, form):
    """In scalings of Q and R, against differences of the exact likelihood."""
    params, emissions, _, _ = case(name)
    D = params.initial.mean.shape[0]
    model = model_arrays(params, T, dtype=np.float64)

    def value(q, r):
        moved = model._replace(Q=model.Q * q, R=model.R * r)
        return exact(moved, emissions, (True,) * D).log_likelihood

    h = 1e-2  # of fourth order; what is left is below 1e-7
    wanted = [
        (8 * (value(*step(h)) - value(*step(-h))) - (value(*step(2 * h)) - value(*step(-2 * h))))
        / (12 * h)
        for step in (lambda h: (1 + h, 1.0), lambda h: (1.0, 1 + h))
    ]

    @jax.jit
    @jax.grad
    def slope(theta):
        dynamics = params.dynamics._replace(cov=params.dynamics.cov * theta[0])
        errors = params.emissions._replace(cov=params.emissions.cov * theta[1])
        moved = params._replace(dynamics=dynamics, emissions=errors)
        return elkax.lgssm_marginal_log_prob(moved, emissions, form=form, initial=DIFFUSE)

    np.testing.assert_allclose(slope(jnp.ones(2)), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_line_in_calendar_years_in_float32(form):
    """Columns (1, year) differ by 1 in 200 only; least squares in float64 is the reference."""
    years = np.arange(1990.0, 2021.0)
    rng = np.random.default_rng(2)
    y = np.round(8 * (3 + 0.5 * (years - 2000) + rng.standard_normal(len(years)))) / 8
    covariates = np.stack([np.ones_like(years), years], axis=1)
    cov = np.linalg.inv(covariates.T @ covariates)
    wanted = np.linalg.lstsq(covariates, y, rcond=None)[0]
    params = cast(effects_alone(covariates), "float32")
    posterior = compiled("lgssm_smoother", form)(params, cast(y[:, None], "float32"))
    eps = float(np.finfo(np.float32).eps)
    sd = np.sqrt(np.diag(cov))
    # The largest term added to get them is the intercept, of about 1e3.
    size = np.abs(wanted[0]) * np.array([1.0, 1 / 2000])
    off = np.abs(np.asarray(posterior.smoothed_means) - wanted)
    assert np.all(off <= 0.02 * sd + eps * size), np.max(off / sd)
    np.testing.assert_allclose(posterior.smoothed_covariances, np.tile(cov, (31, 1, 1)), rtol=0.04)
    residual = y - covariates @ wanted
    value = -0.5 * (31 * math.log(2 * math.pi) + residual @ residual - np.linalg.slogdet(cov)[1])
    assert float(posterior.marginal_loglik) == pytest.approx(value, abs=0.05)


def fixed_line(dtype):
    """A trend that nothing disturbs."""
    params = make_params(
        np.zeros(2), np.eye(2), [[1.0, 1.0], [0.0, 1.0]], np.zeros((2, 2)), [[1.0, 0.0]], [[1.0]]
    )
    return cast(params, dtype)


def moving_level(dtype):
    return cast(level_alone(), dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "make, dtype, length",
    [
        (moving_level, "float64", 200),
        (moving_level, "float32", 200),
        (fixed_line, "float64", 200),
        (fixed_line, "float32", 200),
        (fixed_line, "float32", 2500),
    ],
)
def test_filtered_moments_do_not_depend_on_later_data(make, dtype, length, form):
    """With twice as many data the first half is the same."""
    rng = np.random.default_rng(8)
    y = cast(5 + 0.01 * np.arange(2 * length) + rng.standard_normal(2 * length), dtype)[:, None]
    run = compiled("lgssm_filter", form)
    half, whole = run(make(dtype), y[:length]), run(make(dtype), y)
    first = np.asarray(half.filtered_covariances)
    later = np.asarray(whole.filtered_covariances)[:length]
    D = first.shape[-1]
    finite = np.isfinite(first).all(axis=(1, 2))
    np.testing.assert_array_equal(finite, np.arange(length) >= D - 1)
    np.testing.assert_array_equal(np.isfinite(later).all(axis=(1, 2)), finite)
    sd = np.sqrt(np.diagonal(first[finite], axis1=1, axis2=2))
    off = np.abs(np.asarray(half.filtered_means) - np.asarray(whole.filtered_means)[:length])
    # Other blocks of time and another scale of the proper part round differently.
    rounding = {"float64": 1e-9, "float32": 1e-2}[dtype]
    size = 10 * float(jnp.finfo(DTYPES[dtype]).eps) * float(jnp.max(jnp.abs(y)))
    assert np.all(off[finite] <= rounding * sd + size)
    scale = sd[:, :, None] * sd[:, None, :]
    assert np.all(np.abs(first[finite] - later[finite]) <= rounding * scale)


@pytest.mark.parametrize("form", FORMS)
def test_a_fixed_line_of_5000_times_in_float32(form):
    """Filtered level and slope are least squares on the data so far."""
    length = 5000
    rng = np.random.default_rng(8)
    y = np.asarray(5 + 0.01 * np.arange(length) + rng.standard_normal(length), np.float32)
    posterior = compiled("lgssm_filter", form)(fixed_line("float32"), jnp.asarray(y)[:, None])
    for t in (1, 2, 10, 100, 999, 2500, 4999):
        columns = np.stack([np.ones(t + 1), np.arange(-t, 1)], axis=1)
        cov = np.linalg.inv(columns.T @ columns)
        wanted = cov @ columns.T @ y[: t + 1].astype(np.float64)
        sd = np.sqrt(np.diag(cov))
        off = np.abs(np.asarray(posterior.filtered_means[t]) - wanted)
        # Rounding of y, about 50, in the level; the slope is a difference of two over t steps.
        eps = 4e-6 * np.array([1.0, 1.0 / (t + 1)])
        assert np.all(off <= 0.02 * sd + eps), (t, off / sd)
        variances = np.diag(np.asarray(posterior.filtered_covariances[t]))
        np.testing.assert_allclose(variances, np.diag(cov), rtol=0.04, err_msg=str(t))


def cycles(period, harmonics):
    """A moving level and fixed cycles, as statsmodels writes them, with sin(pi) = 1.2e-16."""
    D = 1 + 2 * len(harmonics)
    F, h = np.eye(D), np.zeros((1, D))
    h[0, 0] = 1
    for k, harmonic in enumerate(harmonics):
        angle = 2 * np.pi * harmonic / period
        block = slice(1 + 2 * k, 3 + 2 * k)
        F[block, block] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        h[0, 1 + 2 * k] = 1
    noise = np.diag([1.0] + [0.0] * (D - 1))
    return F, make_params(np.zeros(D), np.eye(D), F, noise, h, [[1.0]])


def without_sine(F, params):
    """The same with what sin(pi) rounds to put to zero."""
    F = np.where(np.abs(F) < 1e-6, 0.0, F)
    return params._replace(dynamics=params.dynamics._replace(weights=jnp.asarray(F)))


ALIASED = {  # period, harmonics: those that differ, harmonics with the frequency of another
    "two of three": (4, (1, 2, 3), (1, 2), (1, 3)),
    "half of a period": (8, (1, 2, 3, 4), (1, 2, 3, 4), ()),
    "two of five": (8, (1, 2, 3, 4, 5), (1, 2, 3, 4), (3, 5)),
    "four of six": (8, (1, 2, 3, 4, 5, 6), (1, 2, 3, 4), (2, 3, 5, 6)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALIASED)
def test_cycles_of_one_frequency_do_not_part(name, dtype, form):
    """F is rounded and drifts; the likelihood is that of what differs, at 2 for 1 in a sum of two.

    Every function decides alike, at every length, and no state is lost again once it is known.
    """
    period, harmonics, distinct, aliased = ALIASED[name]
    length = 603
    y = 5 + np.cumsum(np.random.default_rng(0).standard_normal(length))
    y = cast(y[:, None], dtype)
    params = cast(cycles(period, harmonics)[1], dtype)
    F, alone = cycles(period, distinct)
    alone = cast(without_sine(F, alone), "float64")
    smoothed = compiled("lgssm_smoother", form)(params, y)
    reduced = compiled("lgssm_smoother", form)(alone, cast(y, "float64"))
    wanted = float(reduced.marginal_loglik) - len(aliased) * math.log(2) / 2
    rtol = {"float64": 1e-10, "float32": 1e-3}[dtype]
    for function in ("lgssm_filter", "lgssm_smoother"):
        found = compiled(function, form)(params, y).marginal_loglik
        assert float(found) == pytest.approx(wanted, rel=rtol), function
    found = compiled("lgssm_marginal_log_prob", form)(params, y)
    assert float(found) == pytest.approx(wanted, rel=rtol)
    # The sine of half a period is never seen.
    known = [True]
    for harmonic in harmonics:
        known += [harmonic not in aliased, harmonic not in aliased and 2 * harmonic != period]
    for means in (smoothed.filtered_means[period:], smoothed.smoothed_means):
        np.testing.assert_array_equal(np.isfinite(means), np.tile(known, (len(means), 1)))
    deviations = np.sqrt(np.asarray(reduced.smoothed_covariances)[:, 0, 0])
    off = np.abs(np.asarray(smoothed.smoothed_means)[:, 0] - reduced.smoothed_means[:, 0])
    assert np.all(off <= 10 * rtol * deviations), np.max(off / deviations)
