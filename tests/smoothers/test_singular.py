"""Singular innovation covariances, and NaN where a number must not look right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dynamax.linear_gaussian_ssm.inference import make_lgssm_params

import elkax
from problems import Problem, make_params, smooth_trend, with_inputs
from smoothers.linear_checks import (
    BACKENDS,
    WAYS,
    check_smoothed,
    compiled,
    oracle,
    within,
)

T = 7
PROBLEMS = {"sound": smooth_trend(T, R=0.5), "unsound": smooth_trend(T)}


@pytest.mark.parametrize(
    "backend, form",
    [("associative", "covariance"), ("blocked", "covariance"), ("blocked", "square_root")],
)
def test_parallel_backends_give_way_to_the_sequential(backend, form):
    """H Q H^T + R = 0: no block has a summary, yet every innovation covariance is positive."""
    problem = PROBLEMS["unsound"][:2]
    posterior = compiled("lgssm_smoother", backend, form)(*problem)
    plain = compiled("lgssm_smoother", "sequential", form)(*problem)
    check_smoothed(posterior, oracle(PROBLEMS["unsound"]))
    for name, actual, expected in zip(plain._fields, posterior, plain, strict=True):
        # The same loop on the same numbers; the compiler may order a product differently.
        scale = np.max(np.abs(expected))
        within(actual, np.asarray(expected), 1e-12 * scale, name)


def test_a_batch_of_sound_and_unsound_problems():
    """Under `vmap` one member gives way and the other does not."""
    batch = jax.tree.map(lambda *x: jnp.stack(x), *(p[:2] for p in PROBLEMS.values()))
    smooth = partial(elkax.lgssm_smoother, backend=BACKENDS["blocked"])
    posteriors = jax.jit(jax.vmap(smooth))(*batch)
    for i, problem in enumerate(PROBLEMS.values()):
        check_smoothed(jax.tree.map(lambda x, i=i: x[i], posteriors), oracle(problem))


def test_gradient_where_the_parallel_backend_gives_way():
    problem = PROBLEMS["unsound"]

    def gradient(backend):
        value = partial(elkax.lgssm_marginal_log_prob, backend=BACKENDS[backend])
        return jax.jit(jax.grad(value))(*problem[:2])

    gradients = gradient("sequential"), gradient("blocked")
    for plain, blocked in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.all(np.isfinite(plain))
        # Derivatives here reach 1e3; both come from the same loop.
        np.testing.assert_allclose(blocked, plain, rtol=1e-9, atol=1e-8)


def truly_singular(kind):
    """Models whose emissions have a singular joint covariance."""
    one = np.eye(1)
    sensors = [[1.0], [1.0]]
    if kind == "two identical exact sensors":
        params = make_params([0.0], one, 0.9 * one, one, sensors, np.zeros((2, 2)))
    else:
        params = make_params([0.0], 0 * one, 0.9 * one, 0 * one, sensors, np.zeros((2, 2)))
    return Problem(params, jnp.ones((T, 2)))


@pytest.mark.parametrize("backend, form", WAYS)
def test_a_second_exact_sensor_tells_nothing(backend, form):
    """Without a variance of its own it is left out: the density on the support of the data."""
    problem = truly_singular("two identical exact sensors")
    single = make_params([0.0], np.eye(1), [[0.9]], np.eye(1), [[1.0]], np.zeros((1, 1)))
    both = compiled("lgssm_marginal_log_prob", backend, form)(*problem[:2])
    one = elkax.lgssm_marginal_log_prob(single, problem.emissions[:, :1])
    np.testing.assert_allclose(both, one, rtol=1e-12)


@pytest.mark.parametrize("kind", ["two identical exact sensors", "no noise at all"])
@pytest.mark.parametrize("backend, form", WAYS)
def test_what_contradicts_a_certainty_is_impossible(kind, backend, form):
    """Sensors without error that differ, and a state known to be zero that is seen at one."""
    params, emissions, _ = truly_singular(kind)
    emissions = emissions.at[3, 1].add(1e-6)
    value = compiled("lgssm_marginal_log_prob", backend, form)(params, emissions)
    assert value == -np.inf


def test_identical_sensors_of_which_one_is_missing():
    """Only the observed block has to be regular."""
    problem = truly_singular("two identical exact sensors")
    emissions = problem.emissions.at[:, 1].set(jnp.nan)
    single = make_params([0.0], np.eye(1), [[0.9]], np.eye(1), [[1.0]], np.zeros((1, 1)))
    both = elkax.lgssm_marginal_log_prob(problem.params, emissions)
    one = elkax.lgssm_marginal_log_prob(single, emissions[:, :1])
    np.testing.assert_allclose(both, one, rtol=1e-12)


PARAMETERS = [
    ("initial", "mean"),
    ("initial", "cov"),
    ("dynamics", "weights"),
    ("dynamics", "bias"),
    ("dynamics", "input_weights"),
    ("dynamics", "cov"),
    ("emissions", "weights"),
    ("emissions", "bias"),
    ("emissions", "input_weights"),
    ("emissions", "cov"),
]


@pytest.mark.parametrize("group, name", PARAMETERS)
@pytest.mark.parametrize(
    "backend, form", [("sequential", "covariance"), ("blocked", "square_root")]
)
def test_nan_in_a_parameter_gives_a_nan_likelihood(group, name, backend, form):
    """NaN means missing in the emissions and nowhere else."""
    problem = with_inputs()
    part = getattr(problem.params, group)
    spoiled = getattr(part, name).at[(0,) * getattr(part, name).ndim].set(jnp.nan)
    if name == "cov":  # stays symmetric: the last diagonal entry as well
        spoiled = spoiled.at[-1, -1].set(jnp.nan)
    params = problem.params._replace(**{group: part._replace(**{name: spoiled})})
    value = compiled("lgssm_marginal_log_prob", backend, form)(
        params, problem.emissions, problem.inputs
    )
    assert np.isnan(value)


@pytest.mark.parametrize("backend", ["sequential", "blocked"])
@pytest.mark.parametrize("field", ["weights", "cov"])
def test_nan_at_the_last_time_is_not_smoothed_away(field, backend):
    """Nothing is known of singular predictions but by costates, which skip singular innovations."""
    weights, cov = jnp.ones((T, 1, 2)), jnp.ones((T, 1))
    start, dynamics = np.diag([1.0, 0.0]), np.eye(2) * 0.9
    params = make_params(np.zeros(2), start, dynamics, np.zeros((2, 2)), np.ones((1, 2)), np.eye(1))
    spoiled = {"weights": weights.at[-1, 0, 0].set(jnp.nan), "cov": cov.at[-1].set(jnp.nan)}
    emissions = params.emissions._replace(
        **({"weights": weights, "cov": cov} | {field: spoiled[field]})
    )
    smooth = compiled("lgssm_smoother", backend, "covariance")
    posterior = smooth(params._replace(emissions=emissions), jnp.ones((T, 1)))
    assert np.isnan(posterior.marginal_loglik)
    assert np.all(np.isnan(posterior.smoothed_means[:, 0]))


def test_nan_input_gives_a_nan_likelihood():
    problem = with_inputs()
    inputs = problem.inputs.at[4].set(jnp.nan)
    value = compiled("lgssm_marginal_log_prob", "blocked", "square_root")(
        problem.params, problem.emissions, inputs
    )
    assert np.isnan(value)


@pytest.mark.parametrize("form", ["covariance", "square_root"])
def test_indefinite_covariance_gives_a_nan_likelihood(form):
    """A negative emission variance larger than what the state adds."""
    problem = with_inputs(R=np.diag([0.5, 0.5]))
    emissions = problem.params.emissions._replace(cov=jnp.diag(jnp.array([0.5, -1e3])))
    params = problem.params._replace(emissions=emissions)
    backend = {"covariance": "sequential", "square_root": "blocked"}[form]
    value = compiled("lgssm_marginal_log_prob", backend, form)(
        params, problem.emissions, problem.inputs
    )
    assert np.isnan(value)


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 6])
def test_a_singular_covariance_where_blocks_meet(num_blocks):
    """A factor of it is not unique: a jump may give another one than the steps before it."""
    arrays = (
        jnp.zeros(2),
        jnp.diag(jnp.array([0.0, 0.25])),
        jnp.array([[0.0, -1.0], [1.0, 0.0]]),
        jnp.zeros((2, 2)),
        jnp.ones((1, 2)),
        0.25 * jnp.eye(1),
    )
    params = make_lgssm_params(*arrays)
    emissions = jnp.asarray(np.random.default_rng(0).integers(-2, 3, (12, 1)) / 1.0)
    smoothed = elkax.lgssm_smoother(
        params, emissions, form="square_root", backend=elkax.Blocked(num_blocks)
    )
    exact = elkax.lgssm_smoother(params, emissions, form="covariance", backend=elkax.Sequential())
    np.testing.assert_allclose(
        smoothed.smoothed_covariances, exact.smoothed_covariances, atol=1e-14
    )
    np.testing.assert_allclose(smoothed.smoothed_means, exact.smoothed_means, atol=1e-14)
