"""Emissions without error: states known exactly, entries without a density, contradictions."""

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

DTYPES = {"float64": jnp.float64, "float32": jnp.float32}
RTOL = {"float64": 1e-12, "float32": 1e-5}
Y = np.array([1.0, 2.0, -1.0, 0.5])
GAPS = np.array([1.0, np.nan, np.nan, 0.5, 2.0, np.nan])
DIFFUSE = elkax.ExactDiffuse()


def autoregression(phi, Q, R):
    one = np.eye(1)
    return make_params([0.0], one, phi * one, Q * one, one, R * one)


def trend(R):
    """A level and a slope, both disturbed."""
    noise = np.diag([0.5, 0.25])
    return make_params(
        np.zeros(2), np.eye(2), [[1.0, 1.0], [0.0, 1.0]], noise, [[1.0, 0.0]], R * np.eye(1)
    )


MODELS = {
    "random walk": partial(autoregression, 1.0, 1.0),
    "autoregression": partial(autoregression, 0.5, 2.0),
    "trend": trend,
}
# The smallest variance of a disturbance, which R is measured by.
NOISE = {"random walk": 1.0, "autoregression": 2.0, "trend": 0.25}


@cache
def compiled(function, form, diffuse=True):
    initial = DIFFUSE if diffuse else None
    return jax.jit(partial(getattr(elkax, function), form=form, initial=initial))


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, DTYPES[dtype]), tree)


def reference(params, y, diffuse=True):
    y = np.asarray(y, np.float64).reshape(len(y), -1)
    D = params.initial.mean.shape[0]
    return exact(model_arrays(params, len(y), dtype=np.float64), y, (diffuse,) * D)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("y", [Y, GAPS], ids=["complete", "gaps"])
@pytest.mark.parametrize("name", MODELS)
def test_states_measured_without_error(name, y, dtype, form):
    params = MODELS[name](0.0)
    posterior = compiled("lgssm_smoother", form)(cast(params, dtype), cast(y[:, None], dtype))
    check_posterior(posterior, reference(params, y), RTOL[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_an_autoregression(form):
    """The state is what is measured, and the likelihood that of its steps."""
    posterior = compiled("lgssm_smoother", form)(autoregression(0.5, 2.0, 0.0), Y[:, None])
    np.testing.assert_allclose(posterior.smoothed_means[:, 0], Y, rtol=1e-14)
    np.testing.assert_allclose(posterior.smoothed_covariances, 0.0, atol=1e-14)
    steps = Y[1:] - 0.5 * Y[:-1]
    value = -0.5 * (4 * math.log(2 * math.pi) + 3 * math.log(2) + steps @ steps / 2)
    assert float(posterior.marginal_loglik) == pytest.approx(value, rel=1e-14)


def scaled(params, theta):
    """F, Q and R times `theta`, to which R adds the last."""
    dynamics = params.dynamics._replace(
        weights=params.dynamics.weights * theta[0], cov=params.dynamics.cov * theta[1]
    )
    emissions = params.emissions._replace(cov=params.emissions.cov + theta[2])
    return params._replace(dynamics=dynamics, emissions=emissions)


@cache
def value_and_slope(form):
    def value(theta, params, y):
        moved = scaled(params, theta)
        return elkax.lgssm_marginal_log_prob(moved, y, form=form, initial=DIFFUSE)

    return jax.jit(jax.value_and_grad(value))


@cache
def slopes(name, gaps):
    """Fourth-order differences of the exact likelihood at R = 0."""
    y, params, h = GAPS if gaps else Y, MODELS[name](0.0), 1e-3
    out = []
    for k in range(3):

        def value(step, k=k):
            theta = np.array([1.0, 1.0, 0.0])
            theta[k] += step
            return reference(scaled(params, theta), y).log_likelihood

        out.append((8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h))
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_at_and_near_no_error(name, gaps, form):
    """In F, Q and R: R = 0 is the limit, and no R > 0 on the way there is worse."""
    y = (GAPS if gaps else Y)[:, None]
    wanted = slopes(name, gaps)
    value = reference(MODELS[name](0.0), y).log_likelihood
    for ratio in (0.0, 1e-300, 1e-100, 1e-30, 1e-24, 1e-20, 1e-18, 1e-16, 1e-13):
        theta = jnp.array([1.0, 1.0, ratio * NOISE[name]])
        ours, slope = value_and_slope(form)(theta, MODELS[name](0.0), y)
        # R moves the value by its slope, of order one here; differences leave 1e-9.
        np.testing.assert_allclose(ours, value, rtol=1e-11, err_msg=str(ratio))
        np.testing.assert_allclose(slope, wanted, rtol=1e-7, atol=1e-7, err_msg=str(ratio))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_moments_near_no_error(name, form):
    expected = reference(MODELS[name](0.0), GAPS)
    for ratio in (1e-300, 1e-30, 1e-18, 1e-15):
        params = MODELS[name](ratio * NOISE[name])
        posterior = compiled("lgssm_smoother", form)(params, GAPS[:, None])
        check_posterior(posterior, expected, 1e-10)


def constant(m0=0.0, P0=1.0):
    """A state that never changes, measured without error."""
    return make_params([m0], [[P0]], np.eye(1), np.zeros((1, 1)), np.eye(1), np.zeros((1, 1)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("diffuse", [True, False])
def test_entries_of_variance_zero_are_left_out(diffuse, dtype, form):
    """The first value has a density; it tells all others, which have none."""
    y = np.full((5, 1), 0.7)
    value = -0.5 * (math.log(2 * math.pi) + (0.0 if diffuse else 0.49))
    run = compiled("lgssm_smoother", form, diffuse)
    posterior = run(cast(constant(), dtype), cast(y, dtype))
    assert float(posterior.marginal_loglik) == pytest.approx(value, rel=RTOL[dtype])
    np.testing.assert_allclose(posterior.smoothed_means, y, rtol=RTOL[dtype])
    np.testing.assert_allclose(posterior.smoothed_covariances, 0.0, atol=RTOL[dtype])
    slope = jax.grad(partial(elkax.lgssm_marginal_log_prob, form=form))(cast(constant(), dtype), y)
    assert np.isfinite(slope.initial.cov).all()


@pytest.mark.parametrize("form", FORMS)
def test_identical_sensors_without_error(form):
    """The second tells what the first has told."""
    one = np.eye(1)
    params = make_params([0.0], one, 0.5 * one, one, [[1.0], [1.0]], np.zeros((2, 2)))
    single = make_params([0.0], one, 0.5 * one, one, [[1.0]], np.zeros((1, 1)))
    y = Y[:, None]
    both = elkax.lgssm_marginal_log_prob(params, np.hstack([y, y]), form=form)
    alone = elkax.lgssm_marginal_log_prob(single, y, form=form)
    np.testing.assert_allclose(both, alone, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_the_data_is_no_contradiction(dtype, form):
    """A rotation: from the third time on data repeat what is known, to their last digit only."""
    c, s = math.cos(0.7), math.sin(0.7)
    params = make_params(
        np.zeros(2), np.eye(2), [[c, -s], [s, c]], np.zeros((2, 2)), [[1.0, 0.0]], [[0.0]]
    )
    times = np.arange(24)
    y = (3 * np.cos(0.7 * times) - 2 * np.sin(0.7 * times))[:, None]
    params, data = cast(params, dtype), cast(y, dtype)
    for diffuse in (True, False):
        value = float(compiled("lgssm_marginal_log_prob", form, diffuse)(params, data))
        # The first two entries alone have a density.
        first = compiled("lgssm_marginal_log_prob", form, diffuse)(params, data.at[2:].set(jnp.nan))
        assert value == pytest.approx(float(first), rel=1e-4 if dtype == "float32" else 1e-12)


@cache
def compiled_gradient(form, diffuse):
    initial = DIFFUSE if diffuse else None
    value = partial(elkax.lgssm_marginal_log_prob, form=form, initial=initial)
    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("diffuse", [True, False])
def test_a_contradiction_has_no_likelihood(diffuse, dtype, form):
    """Minus infinity, not NaN, and a derivative of zero; moments stay those of what is known."""
    y = np.array([[0.7], [0.7], [0.8], [0.7]])
    params, data = cast(constant(), dtype), cast(y, dtype)
    assert reference(constant(), y, diffuse).log_likelihood == -math.inf
    value, slope = compiled_gradient(form, diffuse)(params, data)
    assert float(value) == -math.inf
    for leaf in jax.tree.leaves(slope):
        np.testing.assert_array_equal(leaf, 0.0)
    posterior = compiled("lgssm_filter", form, diffuse)(params, data)
    assert float(posterior.marginal_loglik) == -math.inf
    np.testing.assert_allclose(posterior.filtered_means, 0.7, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("second", [2.0, 3.0], ids=["consistent", "contradiction"])
def test_only_its_own_standardized_innovation_is_nan(second, form):
    """Two independent states: one constant and exact, one a noisy random walk."""
    walk = np.diag([0.0, 1.0])
    params = make_params(np.zeros(2), np.eye(2), np.eye(2), walk, np.eye(2), walk)
    single = make_params([0.0], np.eye(1), np.eye(1), np.eye(1), np.eye(1), np.eye(1))
    y = np.stack([[2.0, second, 2.0, 2.0], Y], axis=1)
    found = elkax.lgssm_innovations(params, y, form=form)
    alone = elkax.lgssm_innovations(single, Y[:, None], form=form)
    np.testing.assert_allclose(found.standardized[:, 1], alone.standardized[:, 0], rtol=1e-12)
    assert float(found.standardized[0, 0]) == pytest.approx(2.0)
    assert np.isnan(found.standardized[1:, 0]).all()
    np.testing.assert_allclose(found.innovations[:2, 0], [2.0, second - 2.0], atol=1e-12)
