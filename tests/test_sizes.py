"""Sizes of one: a batch, a state, an emission, a time step. None of them doubles as a flag."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dynamax.nonlinear_gaussian_ssm import ParamsNLGSSM

import elkax

# (D, N, T)
SIZES = [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 1, 3)]


def draw(state_dim, emission_dim, num_timesteps):
    """A model of dynamax's default parameters and one series from it, in float32."""
    model = elkax.LinearGaussianSSM(state_dim, emission_dim)
    params, props = model.initialize(jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    _, emissions = model.sample(params, jax.random.key(1), num_timesteps)
    return model, params, props, emissions


def online(params, emissions):
    state = elkax.lgssm_online_start(params)
    for emission in emissions:
        state = elkax.lgssm_online_step(params, state, emission)
    return state


FUNCTIONS = {
    "filter": elkax.lgssm_filter,
    "smoother": elkax.lgssm_smoother,
    "log_prob": elkax.lgssm_marginal_log_prob,
    "gradient": lambda p, y: jax.grad(elkax.lgssm_marginal_log_prob)(p, y),
    "forecast": lambda p, y: elkax.lgssm_forecast(p, y, 1),
    "innovations": elkax.lgssm_innovations,
    "disturbances": elkax.lgssm_disturbances,
    "draw": partial(elkax.lgssm_posterior_sample, jax.random.key(2)),
    "one draw of one": lambda p, y: elkax.lgssm_posterior_sample(
        jax.random.key(2), p, y, num_samples=1
    ),
    "online": online,
}


def assert_same(batch, alone):
    """A batch of one holds what one series gives, with one axis more."""
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(alone), strict=True):
        assert a.shape == (1, *b.shape)
        np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_batch_of_one_is_one_series(sizes, name):
    _, params, _, emissions = draw(*sizes)
    alone = FUNCTIONS[name](params, emissions)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(alone))
    assert_same(jax.vmap(partial(FUNCTIONS[name], params))(emissions[None]), alone)
    # What differs between series is batched, whatever it is.
    every = jax.tree.map(lambda leaf: leaf[None], params)
    assert_same(jax.vmap(FUNCTIONS[name])(every, emissions[None]), alone)


@pytest.mark.parametrize("name", ["smoother", "gradient", "draw"])
@pytest.mark.parametrize("backend", [elkax.Blocked(2), elkax.Associative(2)], ids=str)
def test_a_batch_of_one_in_blocks(backend, name):
    _, params, _, emissions = draw(2, 1, 3)
    run = {
        "smoother": partial(elkax.lgssm_smoother, backend=backend),
        "gradient": lambda p, y: jax.grad(elkax.lgssm_marginal_log_prob)(p, y, backend=backend),
        "draw": partial(elkax.lgssm_posterior_sample, jax.random.key(2), backend=backend),
    }[name]
    assert_same(jax.vmap(partial(run, params))(emissions[None]), FUNCTIONS[name](params, emissions))


@pytest.mark.parametrize("name", ["filter", "smoother", "log_prob", "gradient", "forecast", "draw"])
def test_a_batch_of_one_diffuse_series(name):
    params = elkax.local_linear_trend(0.1, 0.01, 1.0)
    emissions = jnp.asarray([[1.0], [2.0], [4.0]])
    alone = FUNCTIONS[name](params, emissions)
    batch = jax.vmap(partial(FUNCTIONS[name], params))(emissions[None])
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-5)


# One step or two leave no error to estimate: EM would rightly stop.
@pytest.mark.parametrize("sizes", [(1, 1, 20), (2, 1, 20), (1, 2, 20)], ids=str)
def test_fits_of_one_series(sizes):
    model, params, props, emissions = draw(*sizes)
    for fit in (
        partial(model.fit_em, num_iters=2, verbose=False),
        partial(model.fit_sgd, num_epochs=2),
    ):
        fitted, values = fit(params, props, emissions)
        again, same = fit(params, props, emissions[None])
        np.testing.assert_allclose(values, same, rtol=1e-4)
        for a, b in zip(jax.tree.leaves(fitted), jax.tree.leaves(again), strict=True):
            assert np.all(np.isfinite(a))
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_nonlinear_smoothers_of_one_series(sizes):
    D, N, T = sizes
    params = ParamsNLGSSM(
        initial_mean=jnp.zeros(D),
        initial_covariance=jnp.eye(D),
        dynamics_function=jnp.sin,
        dynamics_covariance=0.1 * jnp.eye(D),
        emission_function=lambda z: jnp.tile(jnp.cos(z[:1]), N),
        emission_covariance=0.5 * jnp.eye(N),
    )
    emissions = jnp.full((T, N), 0.3)
    for smooth in (
        elkax.extended_kalman_smoother,
        lambda p, y: elkax.iterated_smoother(p, y).posterior,
    ):
        alone = smooth(params, emissions)
        assert_same(jax.vmap(partial(smooth, params))(emissions[None]), alone)
