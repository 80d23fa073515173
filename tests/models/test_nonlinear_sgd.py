"""Gradient descent on nonlinear models: hard series, gaps, what is counted and what is said."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM
from dynamax.parameters import ParameterProperties
from jax.tree_util import Partial

import elkax
from elkax import NonlinearGaussianSSM

FREE, FROZEN = ParameterProperties(), ParameterProperties(trainable=False)
ONE = jnp.eye(1)
PARAMS = ParamsNLGSSM(jnp.zeros(1), ONE, lambda z: 0.5 * z, ONE, lambda z: z, ONE)
PROPS = ParamsNLGSSM(FREE, FROZEN, None, FROZEN, None, FROZEN)
QUICK = {"start": "prior", "backend": elkax.Sequential()}
MODEL = NonlinearGaussianSSM(1, 1, max_iters=16, tolerance=1e-10, **QUICK)


def swing(theta, z):
    return theta * jnp.sin(z) + 0.3 * z


def fit(emissions, model=MODEL, mean=1.0, bend=0.2, **options):
    """Learn the size of the swing."""
    step = Partial(swing, jnp.array(0.9))
    params = ParamsNLGSSM(
        jnp.full(1, mean), ONE, step, 0.4 * ONE, lambda z: (1 - bend) * z + bend * z**2, 0.1 * ONE
    )
    props = ParamsNLGSSM(FROZEN, FROZEN, FREE, FROZEN, None, FROZEN)
    options = {"optimizer": optax.adam(0.05), "num_epochs": 4} | options
    fitted, losses = model.fit_sgd(params, props, jnp.asarray(emissions)[..., None], **options)
    return fitted.dynamics_function.args[0], losses


GOOD = np.array([[1.0, 1.5, 0.8, 2.0], [1.2, np.nan, 1.1, 0.4]])
# Too far out for the iterations allowed.
HOPELESS = 4e6 * np.array([1.0, -1.0, 1.0, -1.0])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_hopeless_series_is_named_and_the_others_go_on(batch_size):
    said = r"series 1 in 4 of 4 epochs: the smoother ended as MAX_ITERS after 16 iterations"
    with pytest.warns(UserWarning, match=said):
        theta, losses = fit(np.insert(GOOD, 1, HOPELESS, axis=0), batch_size=batch_size)
    expected, others = fit(GOOD, batch_size=min(batch_size, 2))
    np.testing.assert_allclose(losses, others, rtol=1e-6)
    np.testing.assert_allclose(theta, expected, rtol=1e-6)
    assert theta != 0.9


def test_no_step_is_taken_where_every_series_is_hopeless():
    with pytest.warns(UserWarning, match=r"2 of 2 series"):
        theta, losses = fit(np.stack([HOPELESS, -HOPELESS]), batch_size=2)
    assert np.all(np.isnan(losses)) and theta == 0.9


def test_a_saddle_is_named():
    """A state seen by its square, from zero, where the slope vanishes."""
    emissions = np.full((2, 4), 4.0)
    emissions[1] = -1.0
    with pytest.warns(UserWarning, match="series 0 in 2 of 2 epochs: .*(positive definite|SADDLE)"):
        _, losses = fit(emissions, mean=0.0, bend=1.0, batch_size=2, num_epochs=2)
    assert np.all(np.isfinite(losses))


def test_loss_is_per_observed_entry():
    """Padding changes nothing."""
    padded = np.concatenate((GOOD, np.full((2, 5), np.nan)), axis=1)
    (_, losses), (_, same) = fit(GOOD, batch_size=2), fit(padded, batch_size=2)
    np.testing.assert_allclose(losses, same, rtol=1e-9)


class Written(NonlinearGaussianSSM):
    """A model whose log-likelihood is written down."""

    calls = 0

    def marginal_log_prob(self, params, emissions, inputs=None):
        self.calls += 1
        value = -jnp.sum((params.initial_mean - 1.0) ** 2)
        return value * jnp.where(emissions[0, 0] < 0, jnp.nan, 1.0)


def test_fit_passes_over_a_minibatch_without_a_value():
    emissions = jnp.array([1.0, -1.0, 1.0])[:, None, None] * jnp.ones((3, 2, 1))
    with pytest.warns(UserWarning, match="series 1 in 50 of 50 epochs"):
        fitted, losses = Written(1, 1).fit_sgd(PARAMS, PROPS, emissions, optimizer=optax.sgd(0.5))
    assert np.all(np.isfinite(losses))
    np.testing.assert_allclose(fitted.initial_mean, 1.0, atol=1e-6)


def test_fit_traces_the_objective_once():
    """Also from a Python number, which JAX takes for another type than an array."""
    model = Written(1, 1)
    params = PARAMS._replace(dynamics_function=Partial(jnp.multiply, 1.0))
    props = PROPS._replace(dynamics_function=FREE)
    model.fit_sgd(params, props, jnp.zeros((3, 2, 1)), num_epochs=2)
    assert model.calls == 1


def test_many_failures_are_counted_and_not_all_listed():
    emissions = -jnp.ones((30, 2, 1))
    with pytest.warns(UserWarning) as caught:
        Written(1, 1).fit_sgd(PARAMS, PROPS, emissions, num_epochs=1, batch_size=30)
    text = str(caught[0].message)
    assert "30 of 30 series" in text and len(re.findall(r"series \d+ in", text)) == 5
