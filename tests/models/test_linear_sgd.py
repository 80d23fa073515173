"""Gradient descent on linear-Gaussian models."""

import dynamax.linear_gaussian_ssm as dynamax_models
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import elkax
from elkax.models import LinearGaussianSSM
from elkax.smoothers import lgssm_marginal_log_prob
from elkax.smoothers.diffuse_initial import DiffuseInitial
from smoothers.test_compilation import count_compilations


def walks(series=3, length=12, channels=2):
    steps = np.random.default_rng(1).standard_normal((series, length, channels))
    return jnp.asarray(np.cumsum(steps, axis=1))


def objective(params, emissions, **options):
    each = [lgssm_marginal_log_prob(params, y, **options) for y in emissions]
    return -float(sum(each)) / emissions.size


@pytest.fixture(scope="module")
def setup():
    model = LinearGaussianSSM(2, 2)
    return model, *model.initialize(jr.key(0))


def test_descent_is_that_of_dynamax_and_ends_at_the_best(setup):
    model, params, props = setup
    fitted, losses = model.fit_sgd(params, props, walks(), batch_size=2, num_epochs=6)
    theirs = dynamax_models.LinearGaussianSSM(2, 2)
    expected, expected_losses = theirs.fit_sgd(params, props, walks(), batch_size=2, num_epochs=6)
    # dynamax adds 1e-9 to what it inverts.
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), fitted, expected
    )
    again, same = model.fit_sgd(params, props, walks(), batch_size=2, num_epochs=6, shuffle=True)
    assert np.all(np.isfinite(same)) and not np.allclose(same, losses, rtol=1e-12)


def test_one_series_without_biases_and_with_variances():
    model = LinearGaussianSSM(2, 1, 0, False, False)
    params, props = model.initialize(jr.key(0), emission_covariance=jnp.array([0.3]))
    emissions = walks(1, 20, 1)
    fitted, losses = model.fit_sgd(params, props, emissions[0, :, 0], num_epochs=20)
    assert fitted.dynamics.bias is None and fitted.emissions.bias is None
    assert fitted.emissions.cov.shape == (1,) and fitted.emissions.cov[0] != 0.3
    np.testing.assert_allclose(losses[0], objective(params, emissions), rtol=1e-10)
    assert objective(fitted, emissions) < losses[-1] < losses[0]


def test_loss_is_per_observed_entry(setup):
    """Padding changes nothing."""
    model, params, props = setup
    padded = jnp.concatenate((walks(), jnp.full((3, 20, 2), jnp.nan)), axis=1)
    options = {"batch_size": 3, "num_epochs": 2}
    _, losses = model.fit_sgd(params, props, walks(), **options)
    _, same = model.fit_sgd(params, props, padded, **options)
    np.testing.assert_allclose(losses, same, rtol=1e-9)


def test_frozen_parameters_pass_through_no_constraint(setup):
    """A singular covariance, and a function of t."""
    model, params, _ = setup
    _, props = model.initialize(jr.key(0))
    props.dynamics.cov.trainable = False
    props.emissions.weights.trainable = False
    weights = params.emissions.weights

    def over_time(t):
        return weights * (1 + 0.1 * t)

    params = params._replace(
        dynamics=params.dynamics._replace(cov=jnp.diag(jnp.array([1.0, 0.0]))),
        emissions=params.emissions._replace(weights=over_time),
    )
    fitted, losses = model.fit_sgd(params, props, walks(), batch_size=3, num_epochs=5)
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]
    np.testing.assert_array_equal(fitted.dynamics.cov, params.dynamics.cov)
    assert fitted.emissions.weights is over_time

    props.dynamics.cov.trainable = True
    with pytest.raises(ValueError, match=r"params\.dynamics\.cov is trainable and lies on"):
        model.fit_sgd(params, props, walks())
    props.emissions.weights.trainable = True
    with pytest.raises(ValueError, match=r"params\.emissions\.weights is a function of t"):
        model.fit_sgd(params, props, walks())


def test_steps_to_where_nothing_is_finite_are_not_taken(setup):
    model, params, props = setup
    emissions = walks()
    with pytest.warns(UserWarning, match="of 8 steps were not taken, because the log posterior"):
        fitted, losses = model.fit_sgd(
            params, props, emissions, None, optax.sgd(1e6), batch_size=3, num_epochs=8
        )
    assert np.isfinite(losses[0]) and not np.all(np.isfinite(losses))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fitted))
    assert objective(fitted, emissions) <= losses[0] + 1e-12


def test_diffuse_states_are_left_alone():
    emissions = 50.0 + walks(2, 15, 1)
    model = LinearGaussianSSM(2, 1, 0, False, False, initial=elkax.ExactDiffuse((True, False)))
    params, props = model.initialize(
        jr.key(0),
        dynamics_weights=jnp.array([[1.0, 1.0], [0.0, 0.9]]),
        emission_weights=jnp.array([[1.0, 0.0]]),
    )
    options = {"batch_size": 2, "num_epochs": 4}
    fitted, losses = model.fit_sgd(params, props, emissions, **options)
    start = objective(params, emissions, initial=model.initial)
    np.testing.assert_allclose(losses[0], start, rtol=1e-10)
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(fitted.initial.cov[0], params.initial.cov[0])
    assert fitted.initial.cov[1, 1] != params.initial.cov[1, 1]

    record = DiffuseInitial.of(params.initial.mean, params.initial.cov, (True, False))
    plain = LinearGaussianSSM(2, 1, 0, False, False)
    same, values = plain.fit_sgd(params._replace(initial=record), props, emissions, **options)
    np.testing.assert_allclose(values, losses, rtol=1e-12)
    assert isinstance(same.initial, DiffuseInitial) and same.initial.diffuse == (True, False)
    np.testing.assert_array_equal(same.initial.cov[0], [np.inf, 0.0])
    np.testing.assert_allclose(same.initial.cov[1, 1], fitted.initial.cov[1, 1], rtol=1e-9)


def test_a_second_descent_compiles_nothing():
    def fit(emissions):
        model = LinearGaussianSSM(2, 2)
        params, props = model.initialize(jr.key(0))
        return model.fit_sgd(params, props, emissions, batch_size=3, num_epochs=2)

    first, second = walks(), walks() + 1.0
    fit(first)
    assert count_compilations(lambda: fit(second)) == 0
