"""Nonlinear models: linear ones against `LinearGaussianSSM`, gradients, learning, bad input."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_probability.substrates.jax.distributions as tfd
from dynamax.nonlinear_gaussian_ssm.models import NonlinearGaussianSSM as DynamaxModel
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM
from dynamax.parameters import ParameterProperties
from dynamax.utils.bijectors import RealToPSDBijector
from jax.tree_util import Partial

import elkax
from elkax import DistributionSSM, LinearGaussianSSM, NonlinearGaussianSSM, ParamsDistributionSSM
from elkax.smoothers import Info
from problems import with_inputs, with_missing

# Sequential, and from the prior: what compiles fastest.
QUICK = {"start": "prior", "backend": elkax.Sequential()}
FREE, FROZEN = ParameterProperties(), ParameterProperties(trainable=False)
VARIANCE = ParameterProperties(constrainer=RealToPSDBijector())


def affine(weights, input_weights, bias, z, u):
    return weights @ z + input_weights @ u + bias


LINEAR = with_missing(with_inputs(2, 2, 6), rows=(3,), entries=((1, 0),))
NUM_SAMPLES = 4000


def as_nonlinear(params):
    """The same model, its functions pytrees, so that parameters go through jit."""
    initial, dynamics, emissions = params
    return ParamsNLGSSM(
        initial.mean,
        initial.cov,
        Partial(affine, dynamics.weights, dynamics.input_weights, dynamics.bias),
        dynamics.cov,
        Partial(affine, emissions.weights, emissions.input_weights, emissions.bias),
        emissions.cov,
    )


def run(model, method, params, **options):
    function = partial(getattr(model, method), **options)
    return jax.jit(function)(params=params, emissions=LINEAR.emissions, inputs=LINEAR.inputs)


@cache
def linear_posterior(method):
    model = LinearGaussianSSM(2, 2, LINEAR.inputs.shape[1], backend=elkax.Sequential())
    return run(model, method, LINEAR.params)


def linear_model(linearizer):
    options = {"linearizer": linearizer, "damping": elkax.GaussNewton(), **QUICK}
    return NonlinearGaussianSSM(2, 2, LINEAR.inputs.shape[1], **options)


@pytest.mark.parametrize(
    "linearizer, method",
    [
        (elkax.Taylor(), "filter"),
        (elkax.Taylor(), "smoother"),
        (elkax.Taylor(), "marginal_log_prob"),
        (elkax.SigmaPoints(), "marginal_log_prob"),
    ],
)
def test_linear_model_is_the_linear_gaussian_one(linearizer, method):
    got = run(linear_model(linearizer), method, as_nonlinear(LINEAR.params))
    if method == "marginal_log_prob":
        np.testing.assert_allclose(got, linear_posterior("smoother").marginal_loglik, rtol=1e-10)
        return
    expected = linear_posterior(method)
    for name in set(got._fields) - {"predicted_means", "predicted_covariances"}:
        value, other = getattr(got, name), getattr(expected, name)
        np.testing.assert_allclose(value, other, rtol=1e-8, atol=1e-10, err_msg=name)


class Solved(NonlinearGaussianSSM):
    """A model of which the solution is known, so that nothing is iterated."""

    def solve(self, params, emissions, inputs=None):
        trajectory = self.posterior.smoothed_means
        zero = jnp.zeros(())
        return elkax.Solution(self.posterior, trajectory, Info(self.status, *[zero] * 5, None))

    def at(self, posterior, status):
        self.posterior, self.status = posterior, jnp.asarray(status)
        return self


def test_draws_have_the_moments_of_the_posterior(key):
    posterior = linear_posterior("smoother")
    model = Solved(2, 2, LINEAR.inputs.shape[1], linearizer=elkax.SigmaPoints(), **QUICK)
    model = model.at(posterior, elkax.Status.CONVERGED)
    options = {"key": key, "num_samples": NUM_SAMPLES}
    draws = run(model, "posterior_sample", as_nonlinear(LINEAR.params), **options)
    means, covs = posterior.smoothed_means, posterior.smoothed_covariances
    sd = np.sqrt(np.asarray(jnp.diagonal(covs, axis1=1, axis2=2)))
    # Five standard errors of a mean and of a covariance of that many draws.
    error = 5 / np.sqrt(NUM_SAMPLES)
    assert draws.shape == (NUM_SAMPLES, 6, 2)
    assert np.all(np.abs(draws.mean(0) - means) <= error * sd)
    centred = draws - means
    found = jnp.einsum("sti,stj->tij", centred, centred) / NUM_SAMPLES
    assert np.all(np.abs(found - covs) <= np.sqrt(2) * error * sd[:, :, None] * sd[:, None])


def test_no_log_likelihood_and_no_draws_of_what_did_not_converge(key):
    posterior = linear_posterior("smoother")
    model = Solved(2, 2, LINEAR.inputs.shape[1], **QUICK).at(posterior, elkax.Status.MAX_ITERS)
    params = as_nonlinear(LINEAR.params)
    smoothed = run(model, "smoother", params)
    assert np.isnan(smoothed.marginal_loglik) and np.all(np.isfinite(smoothed.smoothed_means))
    assert np.all(np.isnan(run(model, "posterior_sample", params, key=key)))


def swing(theta, z):
    return theta * jnp.sin(z) + 0.3 * z


def test_gradient_follows_the_trajectory_and_is_absent_without_convergence():
    """Three sequences in one batch: whole, with a gap, and too far out for 16 iterations."""
    model = NonlinearGaussianSSM(1, 1, max_iters=16, tolerance=1e-10, **QUICK)

    def value(theta, emissions):
        step = Partial(swing, theta[0])
        one = jnp.eye(1)
        params = ParamsNLGSSM(
            jnp.ones(1), one, step, theta[1] * one, lambda z: z + 0.2 * z**2, 0.1 * one
        )
        return model.marginal_log_prob(params, emissions)

    emissions = jnp.array([[1.0, 1.5, 0.8, 2.0], [1.2, jnp.nan, 1.1, 0.4], [4e6, -4e6, 4e6, -4e6]])
    function = jax.vmap(jax.value_and_grad(value), in_axes=(None, 0))
    function = jax.jit(function)
    theta = jnp.array([0.9, 0.4])
    values, gradients = function(theta, emissions[:, :, None])
    assert np.all(np.isfinite(values[:2])) and np.isnan(values[2])
    assert np.all(np.isnan(gradients[2]))
    h = 1e-3
    for i, e in enumerate(h * jnp.eye(2)):

        def rise(step):
            ahead, behind = (function(theta + s, emissions[:, :, None])[0] for s in (step, -step))
            return (ahead - behind)[:2]

        expected = (8 * rise(e) - rise(2 * e)) / (12 * h)
        np.testing.assert_allclose(gradients[:2, i], expected, rtol=1e-6)


def test_fit_learns_what_stands_in_a_function(key):
    """Minibatches of sequences with gaps and inputs; by the filter, as for all sigma points."""
    model = NonlinearGaussianSSM(1, 1, 1, linearizer=elkax.SigmaPoints())

    def step(theta, z, u):
        return swing(theta["slope"], z) + theta["gain"] * u

    def emission(z, u):
        return z + 0.1 * z**2

    def make(slope, gain, variance):
        theta = {"slope": jnp.array(slope), "gain": jnp.array(gain)}
        one = jnp.eye(1)
        return ParamsNLGSSM(
            jnp.zeros(1), one, Partial(step, theta), variance * one, emission, 0.05 * one
        )

    data_key, input_key, fit_key = jax.random.split(key, 3)
    inputs = jax.random.normal(input_key, (4, 60, 1))
    true = make(1.2, 0.5, 0.1)
    draw = jax.vmap(lambda key, u: model.sample(true, key, 60, u))
    _, emissions = jax.jit(draw)(jax.random.split(data_key, 4), inputs)
    emissions = emissions.at[0, 5:9].set(jnp.nan)
    theta_props = {"slope": FREE, "gain": FROZEN}
    props = ParamsNLGSSM(FROZEN, FROZEN, Partial(step, theta_props), VARIANCE, None, FROZEN)
    fitted, losses = model.fit_sgd(
        make(0.5, 0.5, 1.0),
        props,
        emissions,
        inputs,
        optax.adam(0.1),
        batch_size=2,
        num_epochs=40,
        shuffle=True,
        key=fit_key,
    )
    assert losses.shape == (40,) and losses[-1] < losses[0] - 0.1
    (theta,) = fitted.dynamics_function.args
    print(f"slope {theta['slope']:.3f}, variance {fitted.dynamics_covariance[0, 0]:.3f}")
    # Standard errors on 236 emissions: about 0.05 and 0.02.
    assert abs(theta["slope"] - 1.2) < 0.15 and theta["gain"] == 0.5
    assert abs(fitted.dynamics_covariance[0, 0] - 0.1) < 0.06
    assert fitted.emission_function is emission
    np.testing.assert_allclose(fitted.emission_covariance, 0.05)


def grid_log_likelihood(theta, emissions):
    """Of the Poisson model below, by filtering on a grid of states."""
    grid = np.linspace(-5, 5, 401)
    width = grid[1] - grid[0]

    def normal(x, variance):
        return np.exp(-0.5 * x**2 / variance) / np.sqrt(2 * np.pi * variance)

    move = normal(grid[None] - theta * np.sin(grid)[:, None] - 0.3 * grid[:, None], 0.2)
    density, total = normal(grid, 1.0), 0.0
    for t, y in enumerate(emissions):
        density = density if t == 0 else density @ move * width
        if not np.isnan(y):
            seen = tfd.Poisson(log_rate=1.0 + jnp.asarray(grid)).log_prob(y)
            density = density * np.exp(np.asarray(seen))
        scale = density.sum() * width
        total, density = total + np.log(scale), density / scale
    return total


def test_fit_of_counts_by_laplace():
    """One `ParameterProperties` for a whole function; the value against a grid."""
    model = DistributionSSM(1, 1, **QUICK)

    def make(theta):
        step, one = Partial(swing, jnp.array(theta)), jnp.eye(1)
        return ParamsDistributionSSM(
            jnp.zeros(1), one, step, 0.2 * one, lambda z: tfd.Poisson(log_rate=1.0 + z[0])
        )

    rng, state, counts = np.random.default_rng(3), np.zeros((4, 1)), []
    for _ in range(40):
        state = swing(0.7, state) + np.sqrt(0.2) * rng.normal(size=(4, 1))
        counts.append(rng.poisson(np.exp(1.0 + state)))
    counts = jnp.asarray(np.stack(counts, axis=1), float).at[1, 3:6].set(jnp.nan)
    props = ParamsDistributionSSM(FROZEN, FROZEN, FREE, FROZEN, None)
    fitted, losses = model.fit_sgd(
        make(0.2), props, counts, optimizer=optax.adam(0.1), batch_size=4, num_epochs=30
    )

    def exact(theta):
        return sum(grid_log_likelihood(theta, row[:, 0]) for row in np.asarray(counts))

    (theta,) = fitted.dynamics_function.args
    theta = np.asarray(theta)
    values = {number: exact(number) for number in (0.2, 0.7, float(theta))}
    laplace = -losses[0] * jnp.sum(~jnp.isnan(counts))
    print(f"Laplace {laplace:.3f}, theta {theta:.3f}, exact {values}")
    np.testing.assert_allclose(laplace, values[0.2], rtol=3e-3)
    # The exact maximum is at 0.74, about 0.1 above the value at the truth.
    assert values[float(theta)] > values[0.7]
    assert fitted.curvature == elkax.ClippedHessian()


ONE = jnp.eye(1)
PARAMS = ParamsNLGSSM(jnp.zeros(1), ONE, lambda z: 0.5 * z, ONE, lambda z: z, ONE)
PROPS = ParamsNLGSSM(FREE, FROZEN, None, FROZEN, None, FROZEN)


def test_distributions_of_one_step(key):
    """Singular covariances have draws, and entries are independent where none are joint."""
    model = NonlinearGaussianSSM(2, 2)
    assert isinstance(model, DynamaxModel) and NonlinearGaussianSSM(2, 2, 3).inputs_shape == (3,)
    singular = jnp.diag(jnp.array([1.0, 0.0]))
    params = ParamsNLGSSM(
        jnp.ones(2), singular, lambda z: 2.0 * z, singular, lambda z: z, jnp.array([0.0, 4.0])
    )
    states, emissions = model.sample(params, key, 5)
    np.testing.assert_allclose(states[:, 1], 2.0 ** np.arange(5))
    np.testing.assert_allclose(emissions[:, 0], states[:, 0])
    assert len(np.unique(states[:, 0] / states[0, 0])) == 5
    distribution = model.emission_distribution(params, jnp.zeros(2))
    np.testing.assert_allclose(distribution.stddev(), [0.0, 2.0])
    varying = params._replace(dynamics_covariance=jnp.ones((5, 2, 2)))
    with pytest.raises(ValueError, match=r"params.dynamics_covariance of shape \(2, 2\), the same"):
        model.transition_distribution(varying, jnp.zeros(2))

    def emit(distribution):
        params = ParamsDistributionSSM(jnp.ones(2), singular, lambda z: z, singular, distribution)
        return DistributionSSM(2, 2).emission_distribution(params, jnp.zeros(2))

    y = jnp.array([1.0, 2.0])
    expected = jnp.sum(tfd.Laplace(0.0, 1.0).log_prob(y))
    for made in (lambda z: tfd.Laplace(z, 1.0), lambda z: tfd.Laplace(z[0], 1.0)):
        assert emit(made).sample(seed=key).shape == (2,)
        np.testing.assert_allclose(emit(made).log_prob(y), expected)
    joint = emit(lambda z: tfd.MultivariateNormalDiag(z))
    assert isinstance(joint, tfd.MultivariateNormalDiag)


WRONG_CONSTRUCTION = {
    "state_dim": {"state_dim": 0},
    "input_dim": {"input_dim": -1},
    "linearizer": {"linearizer": elkax.Taylor},
    "damping": {"damping": 1.0},
    "max_iters": {"max_iters": 2.5},
    "backend": {"backend": "sequential"},
    "form": {"form": "cholesky"},
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", WRONG_CONSTRUCTION)
def test_wrong_options_are_named(name):
    options = {"state_dim": 1, "emission_dim": 1, **WRONG_CONSTRUCTION[name]}
    with pytest.raises((ValueError, TypeError), match=name):
        DistributionSSM(**options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", ["filter", "smoother", "marginal_log_prob", "solve"])
@pytest.mark.parametrize(
    "params, emissions, inputs, message",
    [
        ("none", (5, 1), None, "params must be ParamsNLGSSM, got str"),
        (PARAMS._replace(initial_mean=jnp.zeros(2)), (5, 1), None, r"initial_mean .* got \(2,\)"),
        (PARAMS, (5, 2), None, r"emissions must be \(T, 1\), .* got shape \(5, 2\)"),
        (PARAMS, (3, 5, 1), None, r"emissions must be \(T, 1\), .* got shape \(3, 5, 1\)"),
        (PARAMS, (5, 1), (5, 1), r"inputs must be None .* input_dim = 0, got shape \(5, 1\)"),
    ],
)
def test_data_of_another_model_are_named(method, params, emissions, inputs, message):
    inputs = None if inputs is None else jnp.zeros(inputs)
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(NonlinearGaussianSSM(1, 1), method)(params, jnp.zeros(emissions), inputs)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("inputs", [None, (5, 3), (4, 2)])
def test_inputs_of_another_shape_are_named(inputs):
    inputs = None if inputs is None else jnp.zeros(inputs)
    with pytest.raises(ValueError, match=r"inputs must have shape \(5, 2\)"):
        NonlinearGaussianSSM(1, 1, 2).filter(PARAMS, jnp.zeros((5, 1)), inputs)


@pytest.mark.parametrize(
    "params, props, message",
    [
        (PARAMS, PROPS[:3], "props must be ParamsNLGSSM, got tuple"),
        (PARAMS, PROPS._replace(initial_mean=None), "props.initial_mean must be ParameterProp"),
        (
            PARAMS._replace(dynamics_function=Partial(swing, 1.0)),
            PROPS._replace(dynamics_function=Partial(swing)),
            "props.dynamics_function must be ParameterProp",
        ),
        (PARAMS._replace(initial_mean=jnp.array([0])), PROPS, "floating-point numbers, got int"),
        (
            PARAMS._replace(dynamics_function=Partial(swing, "slope")),
            PROPS._replace(dynamics_function=FREE),
            "params.dynamics_function must hold arrays only, got 'slope'",
        ),
    ],
)
def test_properties_that_do_not_fit_are_named(params, props, message):
    with pytest.raises((ValueError, TypeError), match=message):
        NonlinearGaussianSSM(1, 1).fit_sgd(params, props, jnp.zeros((5, 1)))
