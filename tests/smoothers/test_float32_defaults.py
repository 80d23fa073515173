"""The default call: float32, default arguments, one series, against float64 on the same numbers.

The aim: moments within 2 % of a posterior deviation plus eps times the largest term that was added
to get them; gradients within 1 % of the root of the information.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax

T = 72
EPS = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng(21)
TIMES = np.arange(T)
SEASON = np.sin(2 * np.pi * TIMES / 12)
# Of size 5, as most data are of some size.
DATA = 5 + 0.02 * TIMES + 0.03 * np.cumsum(RNG.standard_normal(T)) + 0.1 * RNG.standard_normal(T)
COVARIATES = np.stack([SEASON, TIMES / T], axis=1)


def with_seasonal(level, slope, season, error):
    return elkax.combine(elkax.local_linear_trend(level, slope, error), elkax.seasonal(12, season))


def with_regression(level, error):
    rows = jnp.asarray(COVARIATES, jnp.asarray(level).dtype)
    return elkax.combine(elkax.local_level(level, error), elkax.regression(rows))


MODELS = {  # from variances, the variances, data
    "level": (elkax.local_level, (1e-3, 1e-2), DATA),
    "trend": (elkax.local_linear_trend, (1e-3, 1e-4, 1e-2), DATA),
    "smooth trend": (elkax.local_linear_trend, (0.0, 1e-4, 1e-2), DATA),
    "trend and seasonal": (with_seasonal, (1e-3, 1e-4, 1e-4, 1e-2), DATA + SEASON),
    "level and regression": (with_regression, (1e-3, 1e-2), DATA + COVARIATES @ [1.0, -2.0]),
}
# What is called when nothing is named, and a form by name.
CALLS = {"default": {}, "square_root": {"form": "square_root"}}
# float64 needs the exactly diffuse start by name only for as long as it is not the default.
REFERENCE = {"form": "square_root", "initial": elkax.ExactDiffuse()}


@cache
def functions(name, call):
    """Smoother, and likelihood with its gradient in the variances."""
    make, options = MODELS[name][0], REFERENCE if call == "reference" else CALLS[call]

    def value(variances, y):
        return elkax.lgssm_marginal_log_prob(make(*variances), y, **options)

    def smooth(variances, y):
        return elkax.lgssm_smoother(make(*variances), y, **options)

    return jax.jit(smooth), jax.jit(jax.value_and_grad(value))


def arguments(name, dtype):
    """Variances and data as float32 has them."""
    _, variances, y = MODELS[name]
    single = np.asarray(variances, np.float32), np.asarray(y, np.float32)[:, None]
    return tuple(jnp.asarray(x, dtype) for x in single)


@cache
def reference(name):
    smooth, slope = functions(name, "reference")
    given = arguments(name, jnp.float64)
    return smooth(*given), slope(*given), information(name)


def information(name):
    """Curvature of the float64 likelihood in each variance, by differences of its gradient."""
    _, slope = functions(name, "reference")
    variances, y = arguments(name, jnp.float64)
    out = []
    for k, variance in enumerate(variances):
        h = 1e-4 * float(jnp.maximum(variance, 1e-6))
        up, down = variances.at[k].add(h), variances.at[k].add(0.0 if variance == 0 else -h)
        width = float(up[k] - down[k])
        out.append(abs(float(slope(up, y)[1][k] - slope(down, y)[1][k])) / width)
    return np.array(out)


def check_against(posterior, wanted, size):
    """Means within 2 % of a deviation, deviations within 2 %, and never a negative variance."""
    for what in ("filtered", "smoothed"):
        means, covariances = (
            np.asarray(getattr(posterior, f"{what}_{x}"), np.float64)
            for x in ("means", "covariances")
        )
        other_means, other = (
            np.asarray(getattr(wanted, f"{what}_{x}")) for x in ("means", "covariances")
        )
        variances = np.diagonal(other, axis1=1, axis2=2)
        known = np.isfinite(variances).all(axis=1)
        sd = np.sqrt(variances[known])
        off = np.abs(means[known] - other_means[known])
        assert np.all(off <= 0.02 * sd + EPS * size), (what, "means", np.max(off / sd))
        ours = np.diagonal(covariances, axis1=1, axis2=2)[known]
        assert np.all(ours >= 0), (what, np.min(ours))
        off = np.abs(np.sqrt(ours) - sd) / sd
        assert np.all(off <= 0.02), (what, "deviations", np.max(off))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_moments(name, call):
    wanted, _, _ = reference(name)
    posterior = functions(name, call)[0](*arguments(name, jnp.float32))
    assert posterior.smoothed_means.dtype == jnp.float32
    check_against(posterior, wanted, float(np.max(np.abs(MODELS[name][2]))))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_likelihood_and_gradient(name, call):
    _, (wanted, slope), curvature = reference(name)
    value, ours = functions(name, call)[1](*arguments(name, jnp.float32))
    assert value.dtype == jnp.float32
    # A twentieth of what a comparison of models looks at; it sums T terms of order one.
    assert abs(float(value) - float(wanted)) <= 0.05, (float(value), float(wanted))
    off = np.abs(np.asarray(ours, np.float64) - np.asarray(slope))
    assert np.all(off <= 0.01 * np.sqrt(curvature)), (ours, slope, np.sqrt(curvature))


@cache
def proper(call, length, dtype):
    """A trend with a proper start, its moments and gradient in all variances."""
    options = {"form": "square_root"} if call == "reference" else CALLS[call]

    def params(variances):
        return elkax.local_linear_trend(*variances[:3], initial_variance=variances[3])

    def value(variances, y):
        return elkax.lgssm_marginal_log_prob(params(variances), y, **options)

    def smooth(variances, y):
        return elkax.lgssm_smoother(params(variances), y, **options)

    smooth, slope = jax.jit(smooth), jax.jit(jax.value_and_grad(value))

    def run(variances, y):
        single = np.asarray(variances, np.float32), np.asarray(y, np.float32)[:, None]
        given = tuple(jnp.asarray(x, dtype) for x in single)
        return smooth(*given), slope(*given)

    return run


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [1e-5, 1e-4, 1e-3, 1e-2, 1.0])
def test_a_wide_proper_start(error, call):
    """P0 = 1e3 I, eight digits above the errors: float32 has seven."""
    variances = [error / 10, error / 100, error, 1e3]
    y = 5 + np.sqrt(error) * (RNG_WALK + RNG_NOISE)
    posterior, (value, _) = proper(call, T, jnp.float32)(variances, y)
    wanted, (other, _) = proper("reference", T, jnp.float64)(variances, y)
    check_against(posterior, wanted, 10.0)
    # Rounding of y, against the deviation of an innovation, counts in every term.
    assert abs(float(value) - float(other)) <= 0.05 + T * 5 * EPS / np.sqrt(error)


RNG_WALK = np.cumsum(np.random.default_rng(4).standard_normal(T)) / 3
RNG_NOISE = np.random.default_rng(5).standard_normal(T)


@pytest.mark.parametrize("call", CALLS)
def test_a_slope_that_the_data_pin_down(call):
    """Smoothing shrinks its variance from 10 to 1e-6 over 3,000 steps."""
    length = 3000
    rng = np.random.default_rng(6)
    walk = np.cumsum(0.05 * rng.standard_normal(length))
    y = 0.01 * np.arange(length) + walk + rng.standard_normal(length)
    variances = [3e-3, 0.0, 1.0, 10.0]
    posterior, _ = proper(call, length, jnp.float32)(variances, y)
    wanted, _ = proper("reference", length, jnp.float64)(variances, y)
    assert 5e-7 < float(wanted.smoothed_covariances[0, 1, 1]) < 5e-6
    check_against(posterior, wanted, float(np.max(np.abs(y))))


@pytest.mark.parametrize("name", ["trend", "trend and seasonal"])
def test_without_jit(name):
    """As most people call it: nothing but parameters and data."""
    variances, y = arguments(name, jnp.float32)
    params = MODELS[name][0](*variances)
    wanted, (value, _), _ = reference(name)
    found = elkax.lgssm_marginal_log_prob(params, y)
    assert abs(float(found) - float(value)) <= 0.05
    posterior = elkax.lgssm_smoother(params, y)
    check_against(posterior, wanted, float(np.max(np.abs(MODELS[name][2]))))
