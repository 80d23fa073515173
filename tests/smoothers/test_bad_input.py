"""What can be known to be wrong before running is one clear error that names the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from problems import random_stable, varying, with_inputs
from smoothers.linear_checks import within

PROBLEM = with_inputs(D=3, T=6)  # N = 2, U = 1
# Outside the tests nothing checks the annotations of shapes: the errors have to be our own.
pytestmark = pytest.mark.usefixtures("unchecked")
KEY = jax.random.key(0)
FUNCTIONS = {
    "filter": elkax.lgssm_filter,
    "smoother": elkax.lgssm_smoother,
    "log-likelihood": elkax.lgssm_marginal_log_prob,
    "sample": lambda *args, **kw: elkax.lgssm_posterior_sample(KEY, *args, **kw),
    "innovations": elkax.lgssm_innovations,
    "disturbances": elkax.lgssm_disturbances,
    "forecast": lambda params, y, u=None, **kw: elkax.lgssm_forecast(
        params, y, 2, u, jnp.zeros((2, 1)), **kw
    ),
}
every_function = pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)


def replaced(problem=PROBLEM, **parts):
    """Replace parameters given as group_name=value."""
    params = problem.params
    for key, value in parts.items():
        group, name = key.split("_", 1)
        part = getattr(params, group)._replace(**{name: value})
        params = params._replace(**{group: part})
    return params


def rejected(params, emissions, inputs, match, call=elkax.lgssm_filter, **options):
    with pytest.raises((ValueError, TypeError), match=f"(?is){match}"):
        call(params, emissions, inputs, **options)


eye = jnp.eye(3)
WRONG_SHAPES = {
    "initial_mean": jnp.zeros(2),
    "initial_cov": jnp.eye(2),
    "dynamics_weights": jnp.eye(2),
    "dynamics_bias": jnp.zeros(2),
    "dynamics_input_weights": jnp.zeros((3, 2)),
    "dynamics_cov": jnp.eye(4),
    "emissions_weights": jnp.zeros((2, 4)),
    "emissions_bias": jnp.zeros(3),
    "emissions_input_weights": jnp.zeros((2, 3)),
    "emissions_cov": jnp.eye(3),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_wrong_shape_of_a_parameter(name):
    params = replaced(**{name: WRONG_SHAPES[name]})
    # The number of states may be read off the initial mean; its covariance then does not fit.
    message = "initial" if name == "initial_mean" else name.replace("_", ".", 1)
    rejected(params, PROBLEM.emissions, PROBLEM.inputs, message)


NOT_SQUARE = {
    "initial_cov": jnp.ones((3, 2)),
    "dynamics_cov": jnp.ones((3, 2)),
    "dynamics_weights": jnp.ones((3, 2)),
    "emissions_cov": jnp.ones((2, 1)),
}


@pytest.mark.parametrize("name", NOT_SQUARE)
def test_matrix_that_is_not_square(name):
    params = replaced(**{name: NOT_SQUARE[name]})
    rejected(params, PROBLEM.emissions, PROBLEM.inputs, name.replace("_", ".", 1))


@pytest.mark.parametrize("name", ["initial_cov", "dynamics_cov", "emissions_cov"])
@every_function
def test_asymmetric_covariance(call, name):
    group, field = name.split("_", 1)
    cov = getattr(getattr(PROBLEM.params, group), field).at[0, 1].add(0.1)
    message = f"{group}.{field}.*symmetric"
    rejected(replaced(**{name: cov}), PROBLEM.emissions, PROBLEM.inputs, message, call)


def test_asymmetric_in_one_time_step():
    problem = varying(D=3, T=6)
    cov = problem.params.dynamics.cov.at[4, 0, 1].add(0.1)
    params = replaced(problem, dynamics_cov=cov)
    rejected(params, problem.emissions, problem.inputs, "dynamics.cov.*symmetric")


def test_rounding_is_not_asymmetry():
    """What a product of float32 matrices leaves is accepted, as it is with traced arrays."""
    params = replaced(dynamics_cov=PROBLEM.params.dynamics.cov.at[0, 1].multiply(1 + 1e-7))
    params32, y, u = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), (params, PROBLEM.emissions, PROBLEM.inputs)
    )
    assert np.isfinite(elkax.lgssm_marginal_log_prob(params32, y, u))


def test_no_time_steps():
    for call in FUNCTIONS.values():
        rejected(PROBLEM.params, jnp.zeros((0, 2)), jnp.zeros((0, 1)), "emissions", call)
    with pytest.raises((ValueError, TypeError), match="num_timesteps"):
        elkax.lgssm_joint_sample(PROBLEM.params, KEY, 0, jnp.zeros((0, 1)))


@pytest.mark.parametrize(
    "emissions",
    [jnp.zeros(6), jnp.zeros((6, 3)), jnp.zeros((2, 6, 2))],
    ids=["one axis", "three sensors", "a batch"],
)
@every_function
def test_wrong_shape_of_the_emissions(call, emissions):
    rejected(PROBLEM.params, emissions, PROBLEM.inputs, "emissions", call)


@every_function
def test_inputs_missing_although_the_model_has_weights(call):
    rejected(PROBLEM.params, PROBLEM.emissions, None, "inputs", call)


@every_function
def test_inputs_of_another_length(call):
    rejected(PROBLEM.params, PROBLEM.emissions, PROBLEM.inputs[:-1], "inputs", call)


@every_function
def test_inputs_of_another_width(call):
    rejected(PROBLEM.params, PROBLEM.emissions, jnp.zeros((6, 4)), "inputs", call)


@pytest.mark.parametrize("field", ["weights", "bias", "input_weights", "cov"])
@pytest.mark.parametrize("group", ["dynamics", "emissions"])
def test_time_varying_parameter_of_another_length(group, field):
    problem = varying(D=3, T=6)
    value = getattr(getattr(problem.params, group), field)[:-1]
    params = replaced(problem, **{f"{group}_{field}": value})
    rejected(params, problem.emissions, problem.inputs, rf"{group}\.{field}")


def test_diagonal_covariance_of_another_length():
    problem = random_stable(2, 3, 7, diagonal="varying")
    params = replaced(problem, emissions_cov=problem.params.emissions.cov[:-1])
    rejected(params, problem.emissions, None, r"emissions\.cov")


@pytest.mark.parametrize("name", ["initial_mean", "dynamics_weights", "emissions_cov"])
def test_required_parameter_is_none(name):
    rejected(replaced(**{name: None}), PROBLEM.emissions, PROBLEM.inputs, name.replace("_", ".", 1))


@every_function
def test_unknown_form(call):
    problem = PROBLEM
    rejected(*problem, "form.*cholesky|cholesky.*form", call, form="cholesky")


@pytest.mark.parametrize("backend", ["sequential", 4, elkax.Sequential])
def test_unknown_backend(backend):
    for call in (elkax.lgssm_filter, elkax.lgssm_smoother, elkax.lgssm_marginal_log_prob):
        rejected(*PROBLEM, "backend", call, backend=backend)


@pytest.mark.parametrize("initial", ["stationary", 1.0])
def test_unknown_initial(initial):
    rejected(*PROBLEM, "initial", initial=initial)


def test_diffuse_components_of_another_number():
    rejected(*PROBLEM, "components", initial=elkax.ExactDiffuse(components=(True, False)))


@pytest.mark.parametrize("num_blocks", [0, -1, 2.5])
def test_block_count_that_cannot_be(num_blocks):
    with pytest.raises((ValueError, TypeError), match="num_blocks"):
        elkax.Blocked(num_blocks=num_blocks)


@pytest.mark.parametrize("length", [0, -1, 7])
@every_function
def test_length_out_of_range(call, length):
    rejected(*PROBLEM, "length", call, length=length)


def test_length_that_is_no_integer():
    rejected(*PROBLEM, "length", length=3.5)


@pytest.mark.parametrize("num_samples", [0, -2, 1.5])
def test_number_of_samples(num_samples):
    with pytest.raises((ValueError, TypeError), match="num_samples"):
        elkax.lgssm_posterior_sample(KEY, *PROBLEM, num_samples=num_samples)


@pytest.mark.parametrize("num_forecast_timesteps", [0, -2, 1.5])
def test_number_of_forecast_steps(num_forecast_timesteps):
    with pytest.raises((ValueError, TypeError), match="num_forecast_timesteps"):
        elkax.lgssm_forecast(
            PROBLEM.params,
            PROBLEM.emissions,
            num_forecast_timesteps,
            PROBLEM.inputs,
            jnp.ones((2, 1)),
        )


@pytest.mark.parametrize("future", [None, jnp.zeros((3, 1)), jnp.zeros((2, 2))])
def test_forecast_inputs(future):
    """Missing, of another length than the forecast, of another width."""
    with pytest.raises((ValueError, TypeError), match="forecast_inputs"):
        elkax.lgssm_forecast(PROBLEM.params, PROBLEM.emissions, 2, PROBLEM.inputs, future)


def test_forecast_with_parameters_of_the_past_only():
    problem = varying(D=3, T=6)
    with pytest.raises((ValueError, TypeError), match=r"dynamics\.weights"):
        elkax.lgssm_forecast(
            problem.params, problem.emissions, 2, problem.inputs, jnp.zeros((2, 1))
        )


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 90])
def test_level_of_an_interval(level):
    forecast = elkax.lgssm_forecast(
        PROBLEM.params, PROBLEM.emissions, 2, PROBLEM.inputs, jnp.zeros((2, 1))
    )
    with pytest.raises((ValueError, TypeError), match="level"):
        forecast.interval(level)


def test_online_step_with_a_wrong_emission_or_input():
    state = elkax.lgssm_online_start(PROBLEM.params)
    with pytest.raises((ValueError, TypeError), match="emission"):
        elkax.lgssm_online_step(PROBLEM.params, state, jnp.zeros(3), jnp.zeros(1))
    with pytest.raises((ValueError, TypeError), match="input"):
        elkax.lgssm_online_step(PROBLEM.params, state, jnp.zeros(2))
    with pytest.raises((ValueError, TypeError), match="form"):
        elkax.lgssm_online_start(PROBLEM.params, form="cholesky")


@pytest.mark.parametrize("emissions", [jnp.zeros((6, 2), complex), jnp.zeros((6, 2), bool)])
def test_emissions_that_are_no_real_numbers(emissions):
    rejected(PROBLEM.params, emissions, PROBLEM.inputs, "emissions")


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_integers_are_promoted(dtype):
    """Integer emissions and inputs give what the same numbers give as floats."""
    emissions = jnp.arange(12).reshape(6, 2) % 5
    inputs = jnp.arange(6).reshape(6, 1) % 3
    ours = elkax.lgssm_filter(PROBLEM.params, emissions.astype(dtype), inputs.astype(dtype))
    floats = elkax.lgssm_filter(PROBLEM.params, emissions.astype(float), inputs.astype(float))
    for actual, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(floats), strict=True):
        assert actual.dtype == jnp.float64
        # The same program on the same numbers.
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_integer_parameters_are_promoted():
    """A transition matrix typed in without decimal points is a matrix of floats."""
    F = jnp.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    integer = elkax.lgssm_filter(replaced(dynamics_weights=F), *PROBLEM[1:])
    floats = elkax.lgssm_filter(replaced(dynamics_weights=F.astype(float)), *PROBLEM[1:])
    within(integer.filtered_means, np.asarray(floats.filtered_means), 1e-12, "filtered means")


def test_numpy_arrays_and_lists_of_numpy_are_accepted():
    """Arrays need not be JAX's."""
    params = jax.tree.map(np.asarray, PROBLEM.params)
    emissions, inputs = np.asarray(PROBLEM.emissions), np.asarray(PROBLEM.inputs)
    value = elkax.lgssm_marginal_log_prob(params, emissions, inputs)
    expected = elkax.lgssm_marginal_log_prob(*PROBLEM)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
