"""Draws from the posterior and from the model, judged by the exact moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from oracles import dense, model_arrays
from problems import random_stable, varying, with_inputs, with_missing
from smoothers.linear_checks import BACKENDS, FEW_WAYS, oracle, within

T, DRAWS = 7, 4000
ZERO = np.zeros((2, 2))


def singular(**changes):
    """Time-varying parameters in which Q, P0 or R are replaced."""
    problem = varying(D=2, N=2, T=T)
    params = problem.params
    if "P0" in changes:
        params = params._replace(initial=params.initial._replace(cov=jnp.asarray(changes["P0"])))
    if "Q" in changes:
        cov = jnp.broadcast_to(jnp.asarray(changes["Q"]), (T, 2, 2))
        params = params._replace(dynamics=params.dynamics._replace(cov=cov))
    if "R" in changes:
        cov = jnp.broadcast_to(jnp.asarray(changes["R"]), (T, 2, 2))
        params = params._replace(emissions=params.emissions._replace(cov=cov))
    return problem._replace(params=params)


PROBLEMS = {
    "time-varying, missing": with_missing(singular(), rows=(3,), entries=((0, 0), (5, 1))),
    "zero Q": singular(Q=ZERO),
    "zero P0": singular(P0=ZERO),
    "rank-one Q": singular(Q=np.outer([1.0, 0.5], [1.0, 0.5])),
    "zero Q and P0": singular(Q=ZERO, P0=ZERO),
    "zero R": singular(R=ZERO),
}


def check_draws(draws, mean, covariance):
    """Sample mean and covariance within six standard errors of the exact ones.

    One of the about 150 numbers of a test exceeds that by chance once in a million tests; the keys
    are fixed besides. Where a variance is zero the draws differ by rounding alone.
    """
    draws = np.asarray(draws, np.float64).reshape(draws.shape[0], -1)
    assert np.all(np.isfinite(draws))
    mean, covariance = mean.astype(float), covariance.astype(float)
    n, variance = draws.shape[0], np.maximum(np.diag(covariance), 0)
    size = 1 + np.max(np.abs(mean))
    within(draws.mean(0), mean, 6 * np.sqrt(variance / n) + 1e-7 * size, "sample mean ")
    spread = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    centred = draws - mean
    sample = centred.T @ centred / n
    within(sample, covariance, 6 * spread + 1e-7 * size**2, "sample covariance ")


_SAMPLERS = {}


def sampler(backend, form):
    if (backend, form) not in _SAMPLERS:

        def sample(key, problem, length):
            options = {"backend": BACKENDS[backend], "form": form, "length": length}
            return elkax.lgssm_posterior_sample(key, *problem, num_samples=DRAWS, **options)

        _SAMPLERS[backend, form] = jax.jit(sample)
    return _SAMPLERS[backend, form]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend, form", FEW_WAYS)
def test_posterior_draws_have_the_posterior_moments(name, backend, form, key):
    """Joint over all times: means, variances and every cross-covariance."""
    problem = PROBLEMS[name]
    draws = sampler(backend, form)(key, problem, T)
    assert draws.shape == (DRAWS, T, 2)
    expected = oracle(problem)
    check_draws(draws, expected.joint_mean, expected.joint_covariance)


def test_call_of_dynamax(key):
    """Key first, one draw, jitter after the inputs; the same key gives the same draw."""
    problem = with_inputs(T=T)
    sample = elkax.lgssm_posterior_sample
    one = sample(key, *problem)
    assert one.shape == (T, 2)
    np.testing.assert_array_equal(one, sample(key, *problem, 0.0))
    # A jitter of variance 0.01 moves a draw by about 0.1.
    moved = np.std(np.asarray(sample(key, *problem, 0.01) - one))
    assert 0.02 < moved < 0.5
    other = sample(jax.random.split(key)[0], *problem)
    assert np.all(np.abs(np.asarray(one - other)) > 0)
    old_key = jax.random.PRNGKey(3)
    assert jax.eval_shape(lambda k: sample(k, *problem), old_key).shape == (T, 2)
    for count in (1, 5):
        many = jax.eval_shape(lambda k, n=count: sample(k, *problem, num_samples=n), key)
        assert many.shape == (count, T, 2)


def test_draws_of_a_ragged_series(key):
    """A draw at length 4 has the moments of the first four steps, whatever follows them."""
    problem = PROBLEMS["zero P0"]
    spoilt = problem._replace(emissions=problem.emissions.at[4:].set(1e6))
    draws = sampler("blocked", "covariance")(key, spoilt, 4)
    model = model_arrays(problem.params, T, problem.inputs)
    model = model._replace(**{name: getattr(model, name)[:4] for name in "FcQHdR"})
    expected = dense(model, problem.emissions[:4])
    check_draws(draws[:, :4], expected.joint_mean, expected.joint_covariance)


@pytest.mark.parametrize("backend", ["sequential", "blocked"])
def test_joint_draws_have_the_moments_of_the_model(backend, key):
    problem = varying(D=2, N=2, T=T)

    def sample(key):
        return elkax.lgssm_joint_sample(
            problem.params, key, T, problem.inputs, backend=BACKENDS[backend]
        )

    states, emissions = jax.jit(jax.vmap(sample))(jax.random.split(key, DRAWS))
    assert states.shape == (DRAWS, T, 2) and emissions.shape == (DRAWS, T, 2)
    model = model_arrays(problem.params, T, problem.inputs)
    unseen = dense(model, np.full((T, 2), np.nan))
    check_draws(states, unseen.joint_mean, unseen.joint_covariance)
    rows = np.arange(T)
    for t in rows:
        check_draws(emissions[:, t], unseen.emission_means[t], unseen.emission_covariances[t])
    noise = emissions - jnp.einsum("tnd,btd->btn", problem.params.emissions.weights, states)
    noise = noise - model.d.astype(float)
    check_draws(noise[:, 2], np.zeros(2), model.R[2])


def test_joint_draws_are_reproducible_and_may_be_singular(key):
    problem = PROBLEMS["zero Q and P0"]
    first = elkax.lgssm_joint_sample(problem.params, key, T, problem.inputs)
    again = elkax.lgssm_joint_sample(problem.params, key, T, problem.inputs)
    other = elkax.lgssm_joint_sample(problem.params, jax.random.key(1), T, problem.inputs)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(np.isfinite(first[0])) and np.all(np.isfinite(first[1]))
    expected = oracle(with_missing(problem, rows=range(T))).smoothed_means
    within(first[0], expected, 1e-9 * (1 + np.abs(expected)), "noise-free states ")
    assert np.any(np.asarray(first[1] != other[1]))


def test_joint_draws_without_inputs_and_with_diagonal_covariance(key):
    problem = random_stable(2, 3, T, diagonal="varying")
    states, emissions = elkax.lgssm_joint_sample(problem.params, key, T)
    assert states.shape == (T, 2) and emissions.shape == (T, 3)
    one_step = random_stable(2, 3, T)
    states, emissions = elkax.lgssm_joint_sample(one_step.params, key, num_timesteps=1)
    assert states.shape == (1, 2) and emissions.shape == (1, 3)
