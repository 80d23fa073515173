"""Filters and smoothers under dynamax's names: dynamax's own values, and what it lacks."""

from functools import cache, partial

import chex
import dynamax.generalized_gaussian_ssm as dynamax_general
import dynamax.nonlinear_gaussian_ssm as dynamax_nonlinear
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dynamax.generalized_gaussian_ssm.inference import GHKFIntegrals, UKFIntegrals
from dynamax.generalized_gaussian_ssm.models import ParamsGGSSM
from dynamax.nonlinear_gaussian_ssm.inference_ukf import UKFHyperParams
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM

import elkax
from nonlinear_problems import gaussian_params, simulate
from oracles import dense, model_arrays
from problems import make_params
from smoothers.linear_checks import check_filtered, check_smoothed, within

T = 15


def swing(z):
    return jnp.stack([z[0] + 0.2 * z[1], z[1] - 0.3 * jnp.sin(z[0])])


def swing_pushed(z, u):
    return swing(z) + jnp.array([0.0, 0.5]) * u[0]


def look(z):
    return jnp.stack([jnp.sin(z[0]), z[0] * z[1]])


def look_shifted(z, u):
    return look(z) + u


PARAMS = gaussian_params(
    [1.0, 0.0], 0.3 * np.eye(2), swing, 0.05 * np.eye(2), look, 0.1 * np.eye(2)
)
EMISSIONS = jnp.asarray(simulate(PARAMS, T, 1)[1])
INPUTS = jnp.asarray(np.random.default_rng(2).normal(size=(T, 1)))
VARYING = 1 + 0.5 * np.cos(np.arange(T))[:, None, None]
DRIVEN = PARAMS._replace(
    dynamics_function=swing_pushed,
    emission_function=look_shifted,
    dynamics_covariance=PARAMS.dynamics_covariance * VARYING,
    emission_covariance=PARAMS.emission_covariance * VARYING,
)
SCALAR = gaussian_params([0.5], [[0.4]], jnp.sin, [[0.1]], jnp.tanh, [[0.1]])
GENERAL = ParamsGGSSM(
    *PARAMS[:4],
    emission_mean_function=look,
    emission_cov_function=lambda z: (0.1 + 0.2 * z[1] ** 2) * jnp.eye(2),
)


@cache
def jitted(name, params_name, **options):
    """One of our functions with parameters from this file, of emissions and inputs."""
    function, params = getattr(elkax, name), globals()[params_name]
    return jax.jit(lambda y, u=None: function(params, emissions=y, inputs=u, **options))


def agree(ours, theirs, skip=()):
    """dynamax adds 1e-9 to what it solves with; its matrices here have eigenvalues above 0.05."""
    for name, expected in theirs._asdict().items():
        if expected is None or name in skip:
            continue
        actual = getattr(ours, name)
        assert actual.shape == expected.shape, name
        np.testing.assert_allclose(actual, expected, atol=2e-7, rtol=2e-7, err_msg=name)


def test_extended_filter_is_dynamax():
    """Every field, predicted moments included, and its positional arguments."""
    ours = jitted("extended_kalman_filter", "PARAMS")(EMISSIONS)
    agree(ours, jax.jit(partial(dynamax_nonlinear.extended_kalman_filter, PARAMS))(EMISSIONS))
    fields = ["filtered_means"]
    some = jax.jit(lambda y: elkax.extended_kalman_filter(PARAMS, y, None, 1, fields))(EMISSIONS)
    assert some.filtered_covariances is None and some.predicted_means is None
    np.testing.assert_allclose(some.filtered_means, ours.filtered_means, rtol=1e-12)


def test_extended_smoother_is_dynamax():
    """With its own filter, and with a filtered posterior that is given."""
    ours = jitted("extended_kalman_smoother", "PARAMS")(EMISSIONS)
    theirs = jax.jit(partial(dynamax_nonlinear.extended_kalman_smoother, PARAMS))(EMISSIONS)
    agree(ours, theirs)
    given = jitted("extended_kalman_filter", "PARAMS")(EMISSIONS)
    again = jax.jit(partial(elkax.extended_kalman_smoother, PARAMS))(EMISSIONS, given)
    for actual, expected in zip(again, ours, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def test_smoother_of_given_moments_with_singular_predictions():
    """Costates need the innovations, which the given moments do not hold."""
    weights = jnp.array([[0.9, 0.3], [-0.2, 0.8]])
    params = ParamsNLGSSM(
        initial_mean=jnp.zeros(2),
        initial_covariance=jnp.outer(jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0])),
        dynamics_function=lambda z: weights @ z,
        dynamics_covariance=jnp.zeros((2, 2)),
        emission_function=lambda z: z[:1],
        emission_covariance=0.1 * jnp.eye(1),
    )
    emissions = jnp.sin(jnp.arange(6.0))[:, None].at[2].set(jnp.nan) + 2.0
    for form in ("covariance", "square_root"):
        given = elkax.extended_kalman_filter(params, emissions, form=form)
        smoothed = elkax.extended_kalman_smoother(params, emissions, given, form=form)
        chex.assert_trees_all_close(
            smoothed, elkax.extended_kalman_smoother(params, emissions, form=form), rtol=1e-9
        )


def test_inputs_and_time_varying_noise_are_dynamax():
    """Inputs and covariances at t belong to the step into z_t."""
    ours = jitted("extended_kalman_smoother", "DRIVEN")(EMISSIONS, INPUTS)
    theirs = jax.jit(lambda y, u: dynamax_nonlinear.extended_kalman_smoother(DRIVEN, y, inputs=u))(
        EMISSIONS, INPUTS
    )
    agree(ours, theirs)
    filtered = jitted("extended_kalman_filter", "DRIVEN")(EMISSIONS, INPUTS)
    assert filtered.predicted_means.shape == (T - 1, 2)


def test_unscented_is_dynamax():
    """Without inputs, where its smoother has the inputs one step late."""
    hyperparams = UKFHyperParams(0.8, 1.5, 1.0)
    call = partial(dynamax_nonlinear.unscented_kalman_smoother, PARAMS, hyperparams=hyperparams)
    ours = jax.jit(lambda y: elkax.unscented_kalman_smoother(PARAMS, y, hyperparams))(EMISSIONS)
    agree(ours, jax.jit(call)(EMISSIONS))


INTEGRALS = [UKFIntegrals(), GHKFIntegrals(order=5)]


@pytest.mark.parametrize("integrals", INTEGRALS, ids=lambda i: type(i).__name__)
def test_conditional_moments_are_dynamax(integrals):
    """A covariance that depends on the state, through each of its integrals."""
    call = partial(dynamax_general.conditional_moments_gaussian_smoother, GENERAL, integrals)
    ours = jax.jit(lambda y: elkax.conditional_moments_gaussian_smoother(GENERAL, integrals, y))(
        EMISSIONS
    )
    agree(ours, jax.jit(call)(EMISSIONS))


def test_sigma_point_names():
    """Cubature is unscented with (1, 0, 0); Gauss-Hermite of order 3 with one state has kappa 2."""

    def unscented(kappa):
        hyperparams = UKFHyperParams(1.0, 0.0, kappa)
        return jax.jit(lambda y: elkax.unscented_kalman_filter(SCALAR, y, hyperparams))

    emissions = EMISSIONS[:, :1]
    cubature = jitted("cubature_kalman_filter", "SCALAR")(emissions)
    expected = unscented(0.0)(emissions)
    np.testing.assert_allclose(cubature.filtered_means, expected.filtered_means, rtol=1e-12)
    hermite = jitted("gauss_hermite_kalman_filter", "SCALAR", order=3)(emissions)
    expected = unscented(2.0)(emissions)
    np.testing.assert_allclose(hermite.filtered_means, expected.filtered_means, rtol=1e-10)


LINEAR_F, LINEAR_H = np.array([[0.9, 0.3], [-0.2, 0.8]]), np.array([[1.0, 0.5], [0.0, 1.0]])


@cache
def linear():
    """A linear model with missing entries and singular dynamics noise, and its oracle."""
    Q, R, P0 = np.diag([0.5, 0.0]), np.array([[0.4, 0.1], [0.1, 0.6]]), np.eye(2)
    params = gaussian_params(
        np.ones(2),
        P0,
        lambda z: jnp.asarray(LINEAR_F) @ z,
        Q,
        lambda z: jnp.asarray(LINEAR_H) @ z,
        R,
    )
    emissions = EMISSIONS.at[3].set(jnp.nan).at[7, 1].set(jnp.nan)
    arrays = model_arrays(make_params(np.ones(2), P0, LINEAR_F, Q, LINEAR_H, R), T)
    return params, emissions, dense(arrays, emissions)


@pytest.mark.parametrize(
    "linearizer, form",
    [(elkax.Taylor(), "covariance"), (elkax.SigmaPoints(), "square_root")],
    ids=["taylor", "cubature"],
)
def test_linear_model_with_missing_entries(linearizer, form):
    params, emissions, expected = linear()
    smooth = partial(elkax.gaussian_smoother, params, linearizer=linearizer, form=form)
    check_smoothed(jax.jit(smooth)(emissions), expected)


@pytest.mark.parametrize("num_iter", [1, 2, 5, 10])
def test_iterated_update_uses_an_observation_once(num_iter):
    """The variance of a linear model does not fall with the number of iterations."""
    params, emissions, expected = linear()
    filtered = jax.jit(lambda y: elkax.extended_kalman_filter(params, y, num_iter=num_iter))(
        emissions
    )
    check_filtered(filtered, expected)


def test_iterated_update_finds_the_mode():
    """One emission: the iterated update is Gauss-Newton on its MAP cost."""
    params = gaussian_params([1.0], [[0.5]], lambda z: z, [[1.0]], lambda z: jnp.exp(z), [[0.2]])
    filtered = jax.jit(lambda y: elkax.extended_kalman_filter(params, y, num_iter=30))(
        jnp.array([[4.0]])
    )
    z = np.linspace(0.5, 2.0, 2_000_001)
    cost = (z - 1) ** 2 / 0.5 + (4 - np.exp(z)) ** 2 / 0.2
    np.testing.assert_allclose(filtered.filtered_means[0, 0], z[np.argmin(cost)], atol=1e-6)


def test_diagonal_emission_covariance():
    """Variances (N,) and (T, N) are those of the full matrix, which dynamax broadcasts wrongly."""
    full = jitted("extended_kalman_filter", "PARAMS")(EMISSIONS)
    for R in (jnp.full(2, 0.1), jnp.full((T, 2), 0.1)):
        params = PARAMS._replace(emission_covariance=R)
        ours = jax.jit(partial(elkax.extended_kalman_filter, params))(EMISSIONS)
        np.testing.assert_allclose(ours.filtered_means, full.filtered_means, rtol=1e-12)
        np.testing.assert_allclose(ours.marginal_loglik, full.marginal_loglik, rtol=1e-12)


def test_arrays_may_be_traced():
    """The callables are static, the arrays are not: jit, grad and vmap over a parameter."""

    def value(scale, emissions):
        params = PARAMS._replace(dynamics_covariance=scale * PARAMS.dynamics_covariance)
        return elkax.extended_kalman_filter(params, emissions).marginal_loglik

    gradient = jax.jit(jax.vmap(jax.grad(value), (0, None)))(jnp.array([1.0, 2.0]), EMISSIONS)
    both = jax.jit(jax.vmap(value, (0, None)))(jnp.array([1 - 1e-5, 1 + 1e-5]), EMISSIONS)
    np.testing.assert_allclose(gradient[0], (both[1] - both[0]) / 2e-5, rtol=1e-6)


def test_posterior_draws(key):
    """Means and covariances of many draws are those of the smoother, within sampling error."""
    smoothed = jitted("extended_kalman_smoother", "PARAMS")(EMISSIONS)
    draws = jax.jit(
        lambda y: elkax.extended_kalman_posterior_sample(key, PARAMS, y, num_samples=4000)
    )(EMISSIONS)
    sd = np.sqrt(np.diagonal(smoothed.smoothed_covariances, axis1=1, axis2=2))
    # Five standard errors of a mean, and of a covariance between states of unit variance.
    within(draws.mean(0), np.asarray(smoothed.smoothed_means), 5 * sd / np.sqrt(4000), "means")
    centred = (np.asarray(draws) - np.asarray(draws).mean(0)) / sd
    cov = np.einsum("sti,stj->tij", centred, centred) / 4000
    expected = np.asarray(smoothed.smoothed_covariances) / (sd[:, :, None] * sd[:, None, :])
    within(cov, expected, 5 * np.sqrt(2 / 4000), "covariances")
    single = jax.jit(lambda y: elkax.extended_kalman_posterior_sample(key, PARAMS, y))
    assert jax.eval_shape(single, EMISSIONS).shape == (T, 2)


WRONG = {
    "dynamics returns another shape": ({"dynamics_function": lambda z: z[:1]}, "dynamics_function"),
    "emission returns another shape": ({"emission_function": lambda z: z[0]}, "emission_function"),
    "dynamics takes inputs": ({"dynamics_function": swing_pushed}, "dynamics_function"),
    "dynamics is no function": ({"dynamics_function": jnp.eye(2)}, "dynamics_function"),
    "initial covariance": ({"initial_covariance": jnp.eye(3)}, "initial_covariance"),
    "dynamics covariance": ({"dynamics_covariance": jnp.eye(3)}, "dynamics_covariance"),
    "emission covariance": ({"emission_covariance": jnp.eye(3)}, "emission_covariance"),
    "asymmetric": ({"dynamics_covariance": jnp.array([[1.0, 0.5], [0, 1]])}, "symmetric"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_parameters_are_named(name):
    changes, match = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=match):
        elkax.extended_kalman_filter(PARAMS._replace(**changes), EMISSIONS)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_named():
    calls = {
        "emissions": lambda: elkax.extended_kalman_filter(PARAMS, EMISSIONS[:, 0]),
        "inputs": lambda: elkax.extended_kalman_filter(DRIVEN, EMISSIONS, INPUTS[:-1]),
        "num_iter": lambda: elkax.extended_kalman_filter(PARAMS, EMISSIONS, None, 0),
        "output_fields": lambda: elkax.extended_kalman_filter(PARAMS, EMISSIONS, None, 1, ["mean"]),
        "inf_params": lambda: elkax.conditional_moments_gaussian_filter(GENERAL, 3, EMISSIONS),
        "ParamsNLGSSM": lambda: elkax.extended_kalman_filter(3, EMISSIONS),
        "unscented": lambda: elkax.unscented_kalman_filter(
            PARAMS, EMISSIONS, UKFHyperParams(1.0, 0.0, -3.0)
        ),
    }
    for match, call in calls.items():
        with pytest.raises((ValueError, TypeError), match=match):
            call()


def test_functions_of_another_signature():
    with pytest.raises(TypeError, match="dynamics_function must be a function of"):
        elkax.extended_kalman_filter(DRIVEN, EMISSIONS)
    assert isinstance(PARAMS, ParamsNLGSSM)
