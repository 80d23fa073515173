"""What the functions of nonlinear models take: residuals, parameters under jit, data, inputs."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_probability.substrates.jax.distributions as tfd
from dynamax.generalized_gaussian_ssm.inference import EKFIntegrals
from dynamax.generalized_gaussian_ssm.models import ParamsGGSSM
from dynamax.nonlinear_gaussian_ssm.inference_ukf import UKFHyperParams
from dynamax.parameters import ParameterProperties
from jax.tree_util import Partial

import elkax
from elkax.models.learnable import as_learnable
from nonlinear_problems import gaussian_params, wrap

T = 8
ANGLE = gaussian_params([3.0], [[0.2]], lambda z: z + 0.1, [[0.01]], lambda z: z, [[0.05]])
GENERAL = ParamsGGSSM(
    *ANGLE[:4],
    emission_mean_function=lambda z: z,
    emission_cov_function=lambda z: 0.05 * jnp.eye(1),
)
TURNED = jnp.asarray(wrap(3.0 + 0.1 * np.arange(T)[:, None], 0.0))

NAMED = {
    "extended filter": (elkax.extended_kalman_filter, ANGLE),
    "extended smoother": (elkax.extended_kalman_smoother, ANGLE),
    "unscented filter": (elkax.unscented_kalman_filter, ANGLE),
    "unscented smoother": (elkax.unscented_kalman_smoother, ANGLE),
    "cubature filter": (elkax.cubature_kalman_filter, ANGLE),
    "gauss_hermite smoother": (elkax.gauss_hermite_kalman_smoother, ANGLE),
    "moments filter": (
        lambda params, *rest, **options: elkax.conditional_moments_gaussian_filter(
            params, EKFIntegrals(), *rest, **options
        ),
        GENERAL,
    ),
    "moments smoother": (
        lambda params, *rest, **options: elkax.conditional_moments_gaussian_smoother(
            params, EKFIntegrals(), *rest, **options
        ),
        GENERAL,
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_residual_on_a_circle(name):
    """The model is linear but for the circle: each of them is the Kalman filter of the angle."""
    function, params = NAMED[name]
    ours = jax.jit(lambda y: function(params, y, residual=wrap))(TURNED)
    whole = jnp.asarray(3.0 + 0.1 * np.arange(T)[:, None])
    expected = elkax.extended_kalman_filter(ANGLE, whole)
    np.testing.assert_allclose(ours.filtered_means, expected.filtered_means, atol=1e-9)
    np.testing.assert_allclose(ours.marginal_loglik, expected.marginal_loglik, atol=1e-9)


def test_residual_of_draws(key):
    draw = jax.jit(partial(elkax.extended_kalman_posterior_sample, key, ANGLE, residual=wrap))
    assert np.max(np.abs(draw(TURNED) - 3.0 - 0.1 * np.arange(T)[:, None])) < 1.5


def test_unscented_without_hyperparameters():
    """Those of dynamax are the default ones."""
    y = jnp.sin(jnp.arange(T)[:, None])
    for function in (elkax.unscented_kalman_filter, elkax.unscented_kalman_smoother):
        ours, given = function(ANGLE, y), function(ANGLE, y, UKFHyperParams())
        np.testing.assert_array_equal(ours.filtered_means, given.filtered_means)


HESSIAN = elkax.ClippedHessian()


def counts(curvature=HESSIAN, dynamics=lambda z: 0.9 * z):
    return elkax.ParamsDistributionSSM(
        jnp.zeros(1),
        jnp.eye(1),
        dynamics,
        0.1 * jnp.eye(1),
        lambda z: tfd.Poisson(log_rate=z),
        curvature,
    )


COUNTS = jnp.array([0, 1, 1, 2, 3, 1, 0, 2])[:, None]


@pytest.mark.parametrize("curvature", [elkax.ClippedHessian(), elkax.Fisher()])
def test_parameters_under_jit(curvature):
    """Functions and the curvature are static, arrays are not: jit, vmap and grad."""
    params = counts(curvature)

    @jax.jit
    def trajectory(params, y):
        return elkax.iterated_smoother(params, y).trajectory

    expected = elkax.iterated_smoother(params, COUNTS).trajectory
    np.testing.assert_allclose(trajectory(params, COUNTS), expected, rtol=1e-12)
    wider = params._replace(dynamics_covariance=0.3 * jnp.eye(1))
    both = jax.tree.map(lambda *x: jnp.stack(x), params, wider)
    mapped = jax.jit(jax.vmap(trajectory, (0, None)))(both, COUNTS)
    np.testing.assert_allclose(mapped[0], expected, rtol=1e-9)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(trajectory(p, COUNTS))))(params)
    assert isinstance(slope, elkax.ParamsDistributionSSM) and slope.curvature == curvature
    assert np.all(slope.initial_mean != 0)


def test_structure_of_the_parameters():
    theta = (jnp.array(0.9), jnp.array(0.1))
    params = counts(dynamics=Partial(lambda theta, z: theta[0] * z + theta[1], theta))
    assert len(jax.tree.leaves(params)) == 5
    again = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(params))
    assert again.emission_distribution is params.emission_distribution
    assert again.dynamics_function.args == params.dynamics_function.args
    named = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert named[0] == ".initial_mean"


FREE, FROZEN = ParameterProperties(), ParameterProperties(trainable=False)


def affine(theta, z):
    return theta[0] * z + theta[1]


@pytest.mark.parametrize(
    "prop",
    [FREE, Partial(affine, FREE), Partial(affine, (FREE, FREE))],
    ids=["whole", "argument", "each"],
)
@pytest.mark.parametrize("curvature", [elkax.ClippedHessian(), elkax.Fisher()])
def test_properties_of_a_tuple_in_a_partial(prop, curvature):
    """One for all the arrays of a pytree, at any depth."""
    theta = (jnp.array(0.9), jnp.array(0.1))
    params = counts(curvature, Partial(affine, theta))
    props = elkax.ParamsDistributionSSM(FROZEN, FROZEN, prop, FROZEN, None)
    learnable, properties, restore = as_learnable(params, props)
    is_leaf = lambda node: isinstance(node, ParameterProperties)  # noqa: E731
    flags = jax.tree.map(lambda x, p: p.trainable, learnable, properties, is_leaf=is_leaf)
    assert flags.dynamics_function.args == ((True, True),)
    assert flags.initial_mean is False
    assert restore(learnable).curvature == curvature


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prop", [Partial(affine, (FREE,)), Partial(jnp.sin, FREE), None, 3.0])
def test_properties_of_another_structure(prop):
    params = counts(dynamics=Partial(affine, (jnp.array(0.9), jnp.array(0.1))))
    props = elkax.ParamsDistributionSSM(FROZEN, FROZEN, prop, FROZEN, None)
    with pytest.raises(ValueError, match="props.dynamics_function"):
        as_learnable(params, props)


def test_integer_and_bool_emissions():
    """Counts as integers, events as bools, in arrays of NumPy and JAX: what floats give."""
    events = counts()._replace(emission_distribution=lambda z: tfd.Bernoulli(logits=z))
    for params, y in ((counts(), COUNTS), (events, COUNTS > 1)):
        smooth = partial(elkax.iterated_smoother, params)
        expected = smooth(y.astype(float))
        for given in (y, np.asarray(y)):
            np.testing.assert_array_equal(smooth(given).trajectory, expected.trajectory)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), counts())
    assert elkax.gaussian_filter(single, COUNTS).filtered_means.dtype == jnp.float32


class Inputs(NamedTuple):
    push: jax.Array
    on: jax.Array
    row: jax.Array


TABLE = jnp.array([0.1, 0.2, 0.4])
PUSH = jnp.sin(jnp.arange(T))
ON, ROW = jnp.arange(T) % 2 == 0, jnp.arange(T) % 3


def pushed(z, u):
    return z + jnp.where(u.on, u.push, 0.0) + TABLE[u.row]


def pushed_by_array(z, u):
    return z + u


@pytest.mark.parametrize("linearizer", [elkax.Taylor(), elkax.SigmaPoints()])
def test_inputs_may_be_a_pytree(linearizer):
    """A number, a switch and an index at each time, against the array that they stand for."""
    y = jnp.cumsum(jnp.cos(jnp.arange(T)))[:, None]
    tree = Inputs(PUSH, ON, ROW)
    array = (jnp.where(ON, PUSH, 0.0) + TABLE[ROW])[:, None]
    results = []
    for f, u in ((pushed, tree), (pushed_by_array, array)):
        params = ANGLE._replace(dynamics_function=f, emission_function=lambda z, u: jnp.sin(z))
        results.append(
            (
                elkax.gaussian_filter(params, y, u, linearizer=linearizer).filtered_means,
                elkax.iterated_smoother(
                    params, y, u, linearizer=linearizer, start="prior", max_iters=5
                ).trajectory,
            )
        )
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_inputs_of_another_length():
    params = ANGLE._replace(dynamics_function=pushed, emission_function=lambda z, u: z)
    with pytest.raises(ValueError, match=r"inputs\.on must have the leading axis T = 8"):
        elkax.gaussian_filter(params, TURNED, Inputs(PUSH, ON[:-1], ROW))
    with pytest.raises(TypeError, match=r"inputs\.push must"):
        elkax.gaussian_filter(params, TURNED, Inputs("left", ON, ROW))
