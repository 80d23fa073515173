"""Values that cannot be are one error that names argument, time and remedy; NaN where traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import elkax
from elkax.smoothers.checks import check_symmetric, real_array
from elkax.smoothers.prepare import diffuse_mask
from oracles import dense_log_likelihood, model_arrays
from problems import random_stable, varying, with_inputs
from smoothers.test_bad_input import FUNCTIONS, PROBLEM, every_function, rejected, replaced

pytestmark = pytest.mark.usefixtures("unchecked")
T, N = PROBLEM.emissions.shape
log_prob = elkax.lgssm_marginal_log_prob


def oracle(problem):
    model = model_arrays(problem.params, len(problem.emissions), problem.inputs)
    return float(dense_log_likelihood(model, np.asarray(problem.emissions)))


def made_indefinite(cov):
    """A covariance larger than the two variances allow, none of which is negative."""
    value = 1.01 * np.sqrt(cov[..., 0, 0] * cov[..., 1, 1])
    return cov.at[..., 0, 1].set(value).at[..., 1, 0].set(value)


@pytest.mark.parametrize("units", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("name", ["initial_cov", "dynamics_cov", "emissions_cov"])
def test_indefinite_covariance(name, units):
    group, field = name.split("_")
    cov = getattr(getattr(PROBLEM.params, group), field)
    scale = jnp.ones(len(cov)).at[0].set(units)
    params = replaced(**{name: made_indefinite(scale * cov * scale[:, None])})
    rejected(params, *PROBLEM[1:], rf"params\.{group}\.{field} must be positive semidefinite")


@every_function
def test_indefinite_covariance_in_every_function(call):
    params = replaced(dynamics_cov=made_indefinite(PROBLEM.params.dynamics.cov))
    rejected(params, *PROBLEM[1:], r"params\.dynamics\.cov must be positive semidefinite", call)


@pytest.mark.parametrize("name", ["dynamics_cov", "emissions_cov"])
def test_time_of_an_indefinite_covariance(name):
    problem = varying(D=3, T=6)
    group, field = name.split("_")
    cov = getattr(getattr(problem.params, group), field)
    params = replaced(problem, **{name: cov.at[4].set(made_indefinite(cov[4]))})
    rejected(params, *problem[1:], rf"params\.{group}\.{field}.*time index 4")


def test_entry_of_the_dynamics_that_no_step_uses_is_not_judged():
    problem = varying(D=3, T=6)
    cov = problem.params.dynamics.cov
    params = replaced(problem, dynamics_cov=cov.at[0].set(made_indefinite(cov[0])))
    np.testing.assert_allclose(log_prob(params, *problem[1:]), oracle(problem), rtol=1e-10)


@pytest.mark.parametrize("varies", ["constant", "varying"])
def test_negative_variance_of_a_diagonal_error(varies):
    problem = random_stable(2, 3, 7, diagonal=varies)
    cov = problem.params.emissions.cov.at[..., 1].set(-0.5)
    match = r"params\.emissions\.cov must hold variances >= 0, got -0.5 in entry 1"
    rejected(replaced(problem, emissions_cov=cov), *problem[1:], match)


@pytest.mark.parametrize("bad", [[[0.0, 0.1], [0.1, 1.0]], [[1e24, 0, 0], [0, 1, 2], [0, 2, 1]]])
def test_nothing_covaries_with_a_constant_and_units_do_not_hide_it(bad):
    with pytest.raises(ValueError, match="positive semidefinite"):
        check_symmetric("Q", jnp.array(bad))


@pytest.mark.parametrize("source", [np.float32, np.float64])
def test_rounding_is_not_indefinite(source):
    """Products of every rank and of mixed units, made in float32 or float64 and used in float64."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 20):
        for rank in range(size + 1):
            units = np.exp(5 * rng.standard_normal(size))[:, None]
            root = (units * rng.standard_normal((size, rank))).astype(source)
            check_symmetric("Q", jnp.asarray(root @ root.T, float))
            check_symmetric("Q", jnp.asarray(np.stack([root @ root.T] * 3), float))
    left = jnp.array([[1.0, 1e-17], [1e-17, 1e-40]])  # what a subtraction leaves of zeros
    check_symmetric("Q", left)
    check_symmetric("Q", left.at[1, 1].set(0.0))
    check_symmetric("Q", jnp.array([[jnp.nan, 1.0], [1.0, 1.0]]))  # NaN is no number to judge


@every_function
def test_infinite_emission(call):
    emissions = PROBLEM.emissions.at[3, 1].set(-jnp.inf)
    match = "emissions must be finite.*-inf at time index 3, channel 1"
    rejected(PROBLEM.params, emissions, PROBLEM.inputs, match, call)


def test_infinite_emission_that_is_traced_or_padding():
    emissions = PROBLEM.emissions.at[4:].set(jnp.inf)
    assert np.isnan(jax.jit(log_prob)(PROBLEM.params, emissions, PROBLEM.inputs))
    head = PROBLEM._replace(emissions=PROBLEM.emissions[:4], inputs=PROBLEM.inputs[:4])
    value = log_prob(PROBLEM.params, emissions, PROBLEM.inputs, length=4)
    np.testing.assert_allclose(value, oracle(head), rtol=1e-10)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@every_function
def test_input_that_is_not_finite(call, bad):
    inputs = PROBLEM.inputs.at[2, 0].set(bad)
    match = f"inputs must be finite.*{bad} at time index 2, input 0.*step into the state"
    rejected(PROBLEM.params, PROBLEM.emissions, inputs, match, call)


def test_first_input_enters_an_observation_but_no_step():
    inputs = PROBLEM.inputs.at[0].set(jnp.nan)
    rejected(PROBLEM.params, PROBLEM.emissions, inputs, "time index 0.*enters an observation")
    params = replaced(emissions_input_weights=None)
    expected = oracle(PROBLEM._replace(params=params))
    np.testing.assert_allclose(log_prob(params, PROBLEM.emissions, inputs), expected, rtol=1e-10)


def unobserved(problem, time=3):
    """One time without an observation, inputs in the emissions alone."""
    dynamics = problem.params.dynamics._replace(input_weights=None)
    params = problem.params._replace(dynamics=dynamics)
    return problem._replace(params=params, emissions=problem.emissions.at[time].set(jnp.nan))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["concrete", "traced"])
def test_input_at_a_time_without_observation(wrap):
    """It changes neither value nor gradient; the mean of the emission there is not known."""
    problem = unobserved(PROBLEM)
    spoiled = problem.inputs.at[3].set(jnp.nan)
    value_and_grad = wrap(jax.value_and_grad(log_prob))
    value, gradient = value_and_grad(problem.params, problem.emissions, spoiled)
    expected = value_and_grad(*problem)
    np.testing.assert_allclose(value, oracle(problem), rtol=1e-10)
    for actual, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-11)
    # An input that enters the next state matters whether there is an observation or not.
    params = PROBLEM.params
    assert np.isnan(jax.jit(log_prob)(params, problem.emissions, spoiled))


def test_mean_of_an_emission_whose_input_is_not_known():
    problem = unobserved(PROBLEM)
    model = elkax.LinearGaussianSSM(3, 2, 1)
    spoiled = problem.inputs.at[3].set(jnp.nan)
    means, deviations = model.posterior_predictive(problem.params, problem.emissions, spoiled)
    expected, spread = model.posterior_predictive(*problem)
    known = np.arange(T) != 3
    np.testing.assert_allclose(means[known], expected[known], rtol=1e-9)
    np.testing.assert_allclose(deviations, spread, rtol=1e-9)
    assert np.all(np.isnan(means[3]))


@pytest.mark.parametrize("diagonal", [True, False])
def test_emission_parameters_of_missing_entries_do_not_matter(diagonal):
    """NaN in rows of H and d, and an infinite variance, of an entry that is missing."""
    problem = varying(D=3, T=6)
    cov = problem.params.emissions.cov
    cov = jnp.diagonal(cov, axis1=1, axis2=2) if diagonal else cov
    problem = problem._replace(
        params=replaced(problem, emissions_cov=cov),
        emissions=problem.emissions.at[2].set(jnp.nan).at[4, 1].set(jnp.nan),
    )
    emission = problem.params.emissions
    noise = cov.at[4, 1].set(jnp.inf) if diagonal else cov.at[4, 1, 1].set(jnp.inf)
    params = replaced(
        problem,
        emissions_weights=emission.weights.at[2].set(jnp.nan).at[4, 1].set(jnp.nan),
        emissions_bias=emission.bias.at[4, 1].set(jnp.nan),
        emissions_cov=noise.at[2].set(jnp.nan),
    )
    value, gradient = jax.jit(jax.value_and_grad(log_prob))(params, *problem[1:])
    np.testing.assert_allclose(value, oracle(problem), rtol=1e-10)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


SINGLE = random_stable(2, 1, 1), random_stable(2, 1, 2), random_stable(1, 1, 5)


@pytest.mark.parametrize("problem", SINGLE, ids=["T = N = 1", "T = D", "D = 1"])
def test_one_axis_and_pandas_where_there_is_one_emission(problem):
    column = np.asarray(problem.emissions)
    expected = oracle(problem)
    frame = pd.DataFrame(column)
    for emissions in (column[:, 0], frame[0], frame, list(column[:, 0]), column.tolist()):
        np.testing.assert_allclose(log_prob(problem.params, emissions), expected, rtol=1e-10)
    weights = problem.params.emissions.weights
    callable_weights = replaced(problem, emissions_weights=lambda t: weights)
    value = log_prob(callable_weights, column[:, 0])
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    traced = jax.jit(log_prob)(problem.params, column[:, 0])
    np.testing.assert_allclose(traced, expected, rtol=1e-10)


def test_series_and_frames_in_the_class():
    problem = with_inputs(D=2, N=1, T=6)
    model = elkax.LinearGaussianSSM(2, 1, 1)
    y, u = pd.Series(np.asarray(problem.emissions)[:, 0]), pd.DataFrame(np.asarray(problem.inputs))
    np.testing.assert_allclose(
        model.marginal_log_prob(problem.params, y, u), oracle(problem), rtol=1e-10
    )
    np.testing.assert_allclose(
        model.smoother(problem.params, y, u).smoothed_means,
        model.smoother(*problem).smoothed_means,
        rtol=1e-12,
    )


def test_one_axis_where_there_are_more_emissions():
    """Also where there are as many time steps as emissions."""
    problem = random_stable(2, 3, 3)
    match = r"emissions must be \(T, N\).*N = 3 by params\.emissions\.weights; got shape \(3,\)"
    rejected(problem.params, problem.emissions[:, 0], None, match)


SEVERAL = {
    "batch": jnp.zeros((4, T, N)),
    "list of arrays": [np.zeros((T, N))] * 2,
    "list of ragged arrays": [np.zeros((T, N)), np.zeros((T - 1, N))],
    "list of ragged vectors": [np.zeros(T), np.zeros(T - 1)],
    "list of vectors": [np.zeros(T)] * 4,
}
WITHOUT_FORECAST = [call for name, call in FUNCTIONS.items() if name != "forecast"]


@pytest.mark.parametrize("emissions", SEVERAL.values(), ids=SEVERAL)
def test_several_series_in_one_call(emissions):
    for call in WITHOUT_FORECAST:
        match = r"emissions must be .*jax\.vmap.*length="
        rejected(PROBLEM.params, emissions, PROBLEM.inputs, match, call)


@pytest.mark.parametrize(
    "emissions", [np.zeros((T, N), complex), pd.DataFrame([["a", "b"]] * T), "abc"]
)
def test_emissions_that_are_no_real_numbers(emissions):
    for call in WITHOUT_FORECAST:
        with pytest.raises(TypeError, match=r"emissions must.*real numbers"):
            call(PROBLEM.params, emissions, PROBLEM.inputs)


def test_integers_of_64_bits_in_float32():
    with jax.enable_x64(False):
        np.testing.assert_array_equal(real_array("y", np.array([3_000_000_000, 2])), [3e9, 2])


def test_diffuse_mask_of_a_wrong_length():
    start = elkax.DiffuseInitial(*PROBLEM.params.initial, (True, False))
    match = r"params\.initial\.diffuse must be 3 bools.*got 2"
    rejected(PROBLEM.params._replace(initial=start), *PROBLEM[1:], match)


@pytest.mark.parametrize("marked", [False, True])
def test_nothing_is_known_and_nothing_observed(marked):
    cov = jnp.diag(jnp.full(3, jnp.inf))
    start = PROBLEM.params.initial._replace(cov=cov)
    if marked:
        start = elkax.DiffuseInitial.of(*PROBLEM.params.initial, (True,) * 3)
    params = PROBLEM.params._replace(initial=start)
    rejected(params, jnp.full((T, N), jnp.nan), PROBLEM.inputs, "emissions must hold an observ")
    late = PROBLEM.emissions.at[:4].set(jnp.nan)
    with pytest.raises(ValueError, match="emissions must hold an observation"):
        elkax.lgssm_filter(params, late, PROBLEM.inputs, length=4)


def test_infinite_variances_are_diffuse_states():
    initial = PROBLEM.params.initial
    assert diffuse_mask(initial) == (False,) * 3
    # What else stands in the row of a diffuse state does not matter.
    cov = initial.cov.at[1].set(jnp.nan).at[:, 1].set(jnp.nan).at[1, 1].set(jnp.inf)
    params = replaced(initial_cov=cov, initial_mean=initial.mean.at[1].set(jnp.nan))
    assert diffuse_mask(params.initial) == (False, True, False)
    mask = elkax.ExactDiffuse((False, True, False))
    value = log_prob(params, *PROBLEM[1:], initial=mask)
    model = model_arrays(PROBLEM.params, T, PROBLEM.inputs)
    expected = dense_log_likelihood(model, np.asarray(PROBLEM.emissions), (False, True, False))
    np.testing.assert_allclose(value, float(expected), rtol=1e-9)
