"""What can be known to be wrong before an iterated smoother runs is named."""

import jax.numpy as jnp
import pytest
import tensorflow_probability.substrates.jax.distributions as tfd

import elkax
from nonlinear_problems import gaussian_params

pytestmark = pytest.mark.usefixtures("unchecked")
EYE = jnp.eye(2)
PARAMS = gaussian_params([0.0, 0.0], EYE, lambda z: z, EYE, lambda z: z[:1], [[1.0]])
EMISSIONS = jnp.zeros((5, 1))
OPTIONS = {
    "linearizer": [elkax.Taylor, "taylor", None],
    "damping": [elkax.LevenbergMarquardt, 1.0],
    "max_iters": [-1, 2.5, True],
    "start": ["filter", jnp.zeros((4, 2)), jnp.zeros(3)],
    "form": ["cholesky"],
    "backend": ["sequential", elkax.Sequential],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in OPTIONS.items() for v in values])
def test_wrong_options_are_named(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        elkax.iterated_smoother(PARAMS, EMISSIONS, **{name: value})


def distribution_params(distribution):
    return elkax.ParamsDistributionSSM(jnp.zeros(2), EYE, lambda z: z, EYE, distribution)


DISTRIBUTIONS = {
    "three entries for one emission": lambda z: tfd.Normal(jnp.zeros(3), 1.0),
    "no distribution": lambda z: z,
    "takes inputs": lambda z, u: tfd.Normal(z[:1], 1.0),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_wrong_distributions_are_named(name):
    params = distribution_params(DISTRIBUTIONS[name])
    with pytest.raises((ValueError, TypeError), match="emission_distribution"):
        elkax.iterated_smoother(params, EMISSIONS)


def test_residual_of_a_density():
    params = distribution_params(lambda z: tfd.Normal(z[:1], 1.0))
    with pytest.raises(ValueError, match="residual"):
        elkax.iterated_smoother(params, EMISSIONS, residual=jnp.subtract)


def test_average_of_covariances_with_a_negative_weight():
    """Conditional moments need a rule whose averages of covariances are covariances."""
    with pytest.raises(ValueError, match="central weight"):
        elkax.SigmaPoints(elkax.Unscented(0.1, 2.0, 0.0)).expect(
            lambda z: jnp.outer(z, z), jnp.zeros(2), EYE, semidefinite=True
        )
