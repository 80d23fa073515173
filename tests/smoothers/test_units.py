"""Units: what changes when data, covariates or time are measured in others, and what must not.

With $y' = sy$ and variances $s^2$ times as large, states are s times as large and variances $s^2$
times. A likelihood with r diffuse effects changes by $-(n - r)\\log s$: n entries have another
density, and each effect is measured in the new unit. Models are called with default arguments.
"""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from problems import make_params
from random_models import FORMS

T = 24
RNG = np.random.default_rng(3)
NOISE = RNG.standard_normal(T)
X = RNG.standard_normal((T, 2)) + [3.0, 0.0]
LEVEL = 5.0 + np.cumsum(0.3 * RNG.standard_normal(T)) + 0.5 * NOISE
SEASON = np.tile([2.0, -1.0, -2.0, 1.0], T // 4)
DTYPES = {"float64": jnp.float64, "float32": jnp.float32}
# Powers of two and of ten: to 1e12 and 1e-12 in float64, 1e6 and 1e-6 in float32.
TWOS = {"float64": (40, 13, -27, -40), "float32": (20, 7, -9, -20)}
TENS = {"float64": (12, 5, -5, -12), "float32": (6, 3, -3, -6)}
# In posterior deviations, and for variances relative to themselves: rounding of numbers that are
# 1e2 deviations large, over 24 steps.
ROUNDING = {"float64": 1e-11, "float32": 1e-2}
# Of the terms of a likelihood.
ROUNDING_OF_A_SUM = {"float64": 1e-12, "float32": 1e-4}


def level(s, x):
    return elkax.local_level(0.09 * s * s, 0.25 * s * s)


def trend(s, x):
    moving = elkax.local_linear_trend(0.05 * s * s, 0.01 * s * s, 0.25 * s * s)
    return elkax.combine(moving, elkax.seasonal(4, 0.02 * s * s))


def regression(s, x):
    return elkax.regression(X * x, 0.0, 0.25 * s * s)


MODELS = {  # parameters from the units of y and of the covariates, data, number of effects
    "level": (level, LEVEL, 1),
    "trend and seasonal": (trend, LEVEL + 0.1 * np.arange(T) + SEASON, 5),
    "regression": (regression, X @ [2.0, -1.0] + 0.5 * NOISE, 2),
}


@cache
def compiled(form, options=()):
    return jax.jit(partial(elkax.lgssm_smoother, form=form, **dict(options)))


def solve(name, form, dtype, s=1.0, x=1.0):
    """The posterior in units s of y and x of the covariates; data are exact in every unit of 2."""
    make, y, _ = MODELS[name]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, DTYPES[dtype]), make(s, x))
    y = np.asarray(y, DTYPES[dtype]).astype(np.float64) * s
    return compiled(form)(params, jnp.asarray(y[:, None], DTYPES[dtype]))


def moments(posterior):
    """Filtered and smoothed means and covariances, as float64."""
    return {
        name: np.asarray(getattr(posterior, name), np.float64)
        for name in posterior._fields
        if name.endswith(("_means", "_covariances")) and "cross" not in name
    }


def check_scaled(found, base, factor, rounding, bits):
    """`factor` (D,) times the states; bit for bit, or to rounding."""
    for name, value in moments(base).items():
        actual = moments(found)[name]
        if name.endswith("means"):
            wanted = value * factor
            spread = moments(base)[name.replace("means", "covariances")]
            size = np.sqrt(np.diagonal(spread, axis1=1, axis2=2)) * factor
        else:
            wanted = value * np.outer(factor, factor)
            size = np.sqrt(np.diagonal(wanted, axis1=1, axis2=2))
            size = size[:, :, None] * size[:, None, :]
        if bits:
            np.testing.assert_array_equal(actual, wanted, err_msg=name)
            continue
        known = np.isfinite(wanted)
        np.testing.assert_array_equal(np.isfinite(actual), known, err_msg=name)
        off = np.abs(np.where(known, actual - np.where(known, wanted, 0), 0))
        allowed = np.where(known, rounding * np.where(known, size, 0), 0)
        assert np.all(off <= allowed), (name, np.max(off[known] / size[known]))


def check_value(found, base, change, dtype):
    value, wanted = float(found.marginal_loglik), float(base.marginal_loglik) + change
    terms = T + abs(float(base.marginal_loglik)) + abs(change)
    assert abs(value - wanted) <= ROUNDING_OF_A_SUM[dtype] * terms, (value, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_units_of_the_data(name, dtype, form):
    base = solve(name, form, dtype)
    effects = MODELS[name][2]
    size = np.ones(base.smoothed_means.shape[1])
    assert np.isfinite(base.smoothed_means).all()
    for s, bits in scales(dtype):
        found = solve(name, form, dtype, s)
        check_scaled(found, base, s * size, ROUNDING[dtype], bits)
        check_value(found, base, -(T - effects) * math.log(s), dtype)


def scales(dtype):
    """Units, and whether they change no digit."""
    return [(2.0**k, True) for k in TWOS[dtype]] + [(10.0**k, False) for k in TENS[dtype]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_units_of_covariates(dtype, form):
    """Coefficients scale inversely; y does not change."""
    base = solve("regression", form, dtype)
    for x, bits in scales(dtype):
        found = solve("regression", form, dtype, x=x)
        check_scaled(found, base, np.ones(2) / x, ROUNDING[dtype], bits)
        check_value(found, base, -2 * math.log(x), dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_units_of_time(dtype, form):
    """A slope per c time units is c times as large: the states are changed by diag(1, c)."""
    y = jnp.asarray(MODELS["trend and seasonal"][1][:, None], DTYPES[dtype])
    run = compiled(form, (("initial", elkax.ExactDiffuse()),))

    def posterior(c):
        F, Q = [[1.0, 1.0 / c], [0.0, 1.0]], np.diag([0.05, 0.01 * c * c])
        params = make_params(np.zeros(2), np.eye(2), F, Q, [[1.0, 0.0]], [[0.25]])
        return run(jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]), params), y)

    base = posterior(1.0)
    for c, bits in scales(dtype):
        found = posterior(c)
        check_scaled(found, base, np.array([1.0, c]), ROUNDING[dtype], bits)
        check_value(found, base, math.log(c), dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_other_units(dtype, form):
    """The derivative in a variance falls with the square of the unit."""
    y = np.asarray(LEVEL, DTYPES[dtype]).astype(np.float64)

    @jax.jit
    @jax.grad
    def slope(variances, y):
        return elkax.lgssm_marginal_log_prob(elkax.local_level(*variances), y, form=form)

    def scaled(s):
        variances = jnp.asarray(np.array([0.09, 0.25]) * s * s, DTYPES[dtype])
        found = slope(variances, jnp.asarray((y * s)[:, None], DTYPES[dtype]))
        return np.asarray(found, np.float64) * s * s

    base = scaled(1.0)
    for s, bits in scales(dtype):
        if bits:
            np.testing.assert_array_equal(scaled(s), base)
        else:
            np.testing.assert_allclose(scaled(s), base, rtol=10 * ROUNDING_OF_A_SUM[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_levels_and_coefficients(dtype, form):
    """Numbers that a prior variance of 1e7 pulls towards zero."""
    y = np.asarray(2.4e6 + 200 * NOISE, DTYPES[dtype])[:, None]
    params = jax.tree.map(lambda x: x.astype(DTYPES[dtype]), elkax.local_level(1e3, 4e4))
    posterior = compiled(form)(params, jnp.asarray(y))
    assert np.all(np.abs(np.asarray(posterior.smoothed_means) - 2.4e6) < 400)
    x = 1e-6 * (2 + X[:, :1])
    y = 5e6 * x + 1e-3 * NOISE[:, None]
    # Least squares: with an error of 1e-3, known to about 45.
    wanted, spread = float(x[:, 0] @ y[:, 0] / (x[:, 0] @ x[:, 0])), 1e-3 / np.linalg.norm(x)
    params = jax.tree.map(lambda x: x.astype(DTYPES[dtype]), elkax.regression(x, 0.0, 1e-6))
    posterior = compiled(form)(params, jnp.asarray(y, DTYPES[dtype]))
    assert abs(float(posterior.smoothed_means[-1, 0]) - wanted) <= 0.02 * spread + 1e-6 * wanted
    found = math.sqrt(float(posterior.smoothed_covariances[-1, 0, 0]))
    assert found == pytest.approx(spread, rel=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_a_slope_in_any_unit_of_time(form):
    """The only coupling of a slope is never taken for rounding, however small its unit makes it.

    A spring too weak for its period to be told from infinity changes nothing.
    """
    y = (LEVEL + 0.1 * np.arange(T))[:, None]

    def value(coupling, back=0.0):
        F, none = [[1.0, coupling], [back, 1.0]], np.zeros((2, 2))
        params = make_params(np.zeros(2), np.eye(2), F, none, [[1.0, 0.0]], [[0.25]])
        return solve_diffuse(form, params, y)

    base = value(1.0)
    for exponent in (-100, -60, 60, 100):
        # The slope has a density in its own unit.
        shift = exponent * math.log(2)
        assert value(2.0**exponent) + shift == pytest.approx(base, rel=1e-12)
    assert value(1.0, -1e-30) == pytest.approx(base, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_sine_of_pi_is_zero_in_any_unit_of_the_data(form):
    """A cycle of two steps: its second state is never seen, not through 1.2e-16 either."""
    F = np.eye(3)
    F[1:, 1:] = [[np.cos(np.pi), np.sin(np.pi)], [-np.sin(np.pi), np.cos(np.pi)]]
    exact = np.diag([1.0, -1.0, -1.0])

    def value(F, s):
        Q = np.diag([0.09, 0.0, 0.0]) * s * s
        params = make_params(np.zeros(3), np.eye(3), F, Q, [[1.0, 1.0, 0.0]], [[0.25 * s * s]])
        return solve_diffuse(form, params, LEVEL[:, None] * s)

    base = value(exact, 1.0)
    for s in (1e-12, 1.0, 1e12):
        # Two effects are determined.
        assert value(F, s) + (T - 2) * math.log(s) == pytest.approx(base, rel=1e-11)


def solve_diffuse(form, params, y):
    """The log-likelihood with a diffuse start, the same by filter, smoother and by itself."""
    options = {"form": form, "initial": elkax.ExactDiffuse()}
    value = float(elkax.lgssm_marginal_log_prob(params, y, **options))
    for function in (elkax.lgssm_filter, elkax.lgssm_smoother):
        found = float(function(params, y, **options).marginal_loglik)
        assert found == pytest.approx(value, rel=1e-10)
    return value
