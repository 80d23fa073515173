"""Every backend and form against the dense joint Gaussian, on every kind of linear problem."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dynamax.linear_gaussian_ssm import PosteriorGSSMFiltered, PosteriorGSSMSmoothed

import elkax
from problems import (
    T_CONTRACT,
    contract_problems,
    make_params,
    random_stable,
    varying,
    with_inputs,
    with_missing,
    written_out,
)
from smoothers.linear_checks import (
    WAYS,
    check_filtered,
    check_log_likelihood,
    check_smoothed,
    compiled,
    compiled_smoother,
    contract,
    oracle,
    reference,
    smooth_to_length,
)


@pytest.mark.parametrize("name", contract_problems())
@pytest.mark.parametrize("backend, form", WAYS)
def test_smoother_matches_the_dense_posterior(name, backend, form):
    """Filtered and smoothed moments, cross moments and the log-likelihood."""
    smooth = compiled_smoother(backend, form)
    posterior = smooth(*contract()[name], T_CONTRACT)
    assert isinstance(posterior, PosteriorGSSMSmoothed)
    check_smoothed(posterior, reference(name))


@pytest.mark.parametrize("name", contract_problems())
@pytest.mark.parametrize("form", ["covariance", "square_root"])
def test_filter_and_log_likelihood_match_the_dense_posterior(name, form):
    """The functions that stop after the filter, without a length."""
    posterior = compiled("lgssm_filter", "blocked", form)(*contract()[name])
    assert isinstance(posterior, PosteriorGSSMFiltered)
    assert posterior.predicted_means is None and posterior.predicted_covariances is None
    check_filtered(posterior, reference(name))
    value = compiled("lgssm_marginal_log_prob", "sequential", form)(*contract()[name])
    assert value.shape == ()
    check_log_likelihood(value, reference(name).log_likelihood, T_CONTRACT)


@pytest.mark.parametrize(
    "T, backend, form",
    [
        (1, "sequential", "square_root"),
        (1, "blocked", "square_root"),
        (1, "blocked", "covariance"),
        (2, "blocked", "covariance"),
        (2, "blocked", "square_root"),
    ],
)
def test_one_and_two_time_steps(T, backend, form):
    problem = varying(T=T)
    posterior = compiled("lgssm_smoother", backend, form)(*problem)
    assert posterior.smoothed_cross_covariances.shape == (T - 1, 2, 2)
    check_smoothed(posterior, oracle(problem))


# What grows with a program is small here: sensors are folded in one after the other, unrolled.
SHAPES = {
    "D = 1, N = 1": (partial(random_stable, 1, 1, 33), "blocked", "square_root"),
    "D = 3, N = 2": (partial(random_stable, 3, 2, 33), "blocked", "covariance"),
    "more sensors than states": (partial(random_stable, 1, 3, 33), "blocked", "square_root"),
    "R of shape (N,)": (
        partial(random_stable, 1, 2, 33, diagonal="constant"),
        "blocked",
        "covariance",
    ),
    "R of shape (T, N)": (
        partial(random_stable, 2, 3, 33, diagonal="varying"),
        "sequential",
        "square_root",
    ),
    "as many sensors as steps": (
        partial(random_stable, 2, 3, 3, diagonal="constant"),
        "sequential",
        "covariance",
    ),
    "D = 5, N = 2": (partial(random_stable, 5, 2, 33), "sequential", "square_root"),
    "D = 12, N = 2": (partial(random_stable, 12, 2, 17), "blocked", "covariance"),
    "D = 12, N = 2 in blocks": (partial(random_stable, 12, 2, 5), "blocked", "square_root"),
    "D = 12, N = 3 step by step": (partial(random_stable, 12, 3, 17), "sequential", "square_root"),
    "D = 100, N = 2": (partial(random_stable, 100, 2, 3), "sequential", "covariance"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    """Time-invariant parameters without biases and inputs, with a row and entries missing."""
    make, backend, form = SHAPES[name]
    problem = make()
    N = problem.emissions.shape[1]
    problem = with_missing(problem, rows=(2,), entries=((0, N - 1), (1, 0)) if N > 1 else ())
    check_smoothed(compiled("lgssm_smoother", backend, form)(*problem), oracle(problem))


def test_time_invariant_parameters_equal_those_written_out():
    """Constant parameters may take another path than time-varying ones, with the same numbers."""
    problem = with_inputs()
    posterior = compiled("lgssm_smoother", "sequential", "covariance")(*problem)
    check_smoothed(posterior, oracle(written_out(problem)))


def test_callables_of_time():
    """Weights and biases may be functions of t, with entry t for the step into z_t."""
    problem = varying()
    dynamics, emissions = problem.params.dynamics, problem.params.emissions

    def at(rows):
        return lambda t: rows[t]

    params = problem.params._replace(
        dynamics=dynamics._replace(
            weights=at(dynamics.weights),
            bias=at(dynamics.bias),
            input_weights=at(dynamics.input_weights),
            cov=at(dynamics.cov),
        ),
        emissions=emissions._replace(
            weights=at(emissions.weights),
            bias=at(emissions.bias),
            input_weights=at(emissions.input_weights),
        ),
    )
    posterior = elkax.lgssm_smoother(params, problem.emissions, problem.inputs)
    check_smoothed(posterior, reference("varying"))


@pytest.mark.parametrize("backend, form", WAYS)
def test_row_zero_of_the_dynamics_is_unused(backend, form):
    """Whatever stands in entry 0 of the dynamics, NaN apart, the posterior is the same."""
    problem = contract()["varying"]
    changed = jax.tree.map(lambda x: x.at[0].set(7.0), problem.params.dynamics)
    params = problem.params._replace(dynamics=changed)
    smooth = compiled_smoother(backend, form)
    posterior = smooth(params, problem.emissions, problem.inputs, T_CONTRACT)
    check_smoothed(posterior, reference("varying"))


RAGGED = {"varying": 7, "missing entries": 5, "rank-one R": 2, "regular": 1}
RUBBISH = (0.0, jnp.nan, 1e30, jnp.inf)


def padded(name, length, rubbish, parameter_padding):
    """A problem with rubbish from `length` on, in data, inputs and parameters."""
    problem = contract()[name]
    pad = jnp.arange(T_CONTRACT) >= length

    def fill(x, value):
        return jnp.where(pad.reshape(-1, *[1] * (x.ndim - 1)), value, x)

    fill_parameter = partial(fill, value=parameter_padding)
    params = problem.params._replace(
        dynamics=jax.tree.map(fill_parameter, problem.params.dynamics),
        emissions=jax.tree.map(fill_parameter, problem.params.emissions),
    )
    return params, fill(problem.emissions, rubbish), fill(problem.inputs, rubbish)


def cut(problem, length):
    """The problem of the first `length` steps; its parameters must be written out in time."""

    def head(x):
        return x[:length]

    params = problem.params._replace(
        dynamics=jax.tree.map(head, problem.params.dynamics),
        emissions=jax.tree.map(head, problem.params.emissions),
    )
    return problem._replace(
        params=params, emissions=head(problem.emissions), inputs=head(problem.inputs)
    )


def check_cut(posterior, name, length):
    """Only what lies before the length is compared."""
    fields = (x[:length] for x in posterior[1:5])
    cross = posterior.smoothed_cross_covariances[: length - 1]
    head = PosteriorGSSMSmoothed(posterior.marginal_loglik, *fields, cross)
    check_smoothed(head, oracle(cut(contract()[name], length)))


@pytest.mark.parametrize("padding", [0.0, jnp.nan])
@pytest.mark.parametrize("backend, form", WAYS)
def test_padding_never_matters(padding, backend, form):
    """A traced length; zeros, NaN, infinities or large numbers behind it."""
    for rubbish, (name, length) in zip(RUBBISH, RAGGED.items(), strict=True):
        smooth = compiled_smoother(backend, form)
        posterior = smooth(*padded(name, length, rubbish, padding), length)
        check_cut(posterior, name, length)


def test_padding_behind_many_states():
    problem, length = random_stable(9, 2, 9), 5
    behind = problem.emissions.at[length:].set(jnp.inf)
    posterior = compiled_smoother("sequential", "covariance")(problem.params, behind, None, length)
    head = PosteriorGSSMSmoothed(
        posterior.marginal_loglik, *(x[:length] for x in posterior[1:5]), posterior[5][: length - 1]
    )
    check_smoothed(head, oracle(problem._replace(emissions=problem.emissions[:length])))


@pytest.mark.parametrize("padding", [0.0, jnp.nan])
def test_ragged_batch_under_vmap(padding):
    """Series of several lengths side by side, each with its own parameters."""
    cases = [
        padded(name, length, rubbish, padding)
        for rubbish, (name, length) in zip(RUBBISH, RAGGED.items(), strict=True)
    ]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    posteriors = RAGGED_SMOOTHER(*batch, jnp.array(list(RAGGED.values())))
    for i, (name, length) in enumerate(RAGGED.items()):
        check_cut(jax.tree.map(lambda x, i=i: x[i], posteriors), name, length)


@pytest.mark.parametrize("noise", [0.5, 0.0])
def test_ragged_series_of_one_model(noise):
    """Another number of series than of states, with regular and with singular predictions."""
    start = np.eye(2) if noise else np.ones((2, 2))
    params = make_params(
        np.zeros(2), start, 0.9 * np.eye(2), noise * np.eye(2), np.array([[1.0, 0.3]]), np.eye(1)
    )
    lengths = (6, 4, 1)
    emissions = jax.random.normal(jax.random.key(0), (3, 6, 1))
    smooth = jax.vmap(lambda y, length: elkax.lgssm_smoother(params, y, length=length))
    together = jax.jit(smooth)(emissions, jnp.array(lengths))
    for i, length in enumerate(lengths):
        alone = elkax.lgssm_smoother(params, emissions[i, :length])
        for one, all_of_them in zip(alone[1:], together[1:], strict=True):
            np.testing.assert_allclose(all_of_them[i, : len(one)], one, atol=1e-12)


RAGGED_SMOOTHER = jax.jit(jax.vmap(partial(smooth_to_length, "blocked", "covariance")))


def test_length_without_jit():
    """A concrete length of the filter and the log-likelihood, default options."""
    expected = oracle(cut(contract()["varying"], 5))
    args = padded("varying", 5, jnp.nan, 0.0)
    posterior = elkax.lgssm_filter(*args, length=5)
    head = PosteriorGSSMFiltered(posterior.marginal_loglik, *(x[:5] for x in posterior[1:3]))
    check_filtered(head, expected)
    value = elkax.lgssm_marginal_log_prob(*args, length=5)
    check_log_likelihood(value, expected.log_likelihood, 5)


def test_inputs_enter_where_weights_exist():
    """Input weights in the emissions alone, None in the dynamics; default options."""
    problem = with_inputs()
    dynamics = problem.params.dynamics._replace(input_weights=None, bias=None)
    problem = problem._replace(params=problem.params._replace(dynamics=dynamics))
    check_smoothed(elkax.lgssm_smoother(*problem), oracle(problem))


@pytest.mark.parametrize("backend, form", WAYS)
def test_symmetric_covariances(backend, form):
    """Returned covariances are symmetric, so that a Cholesky factor sees what it reads."""
    smooth = compiled_smoother(backend, form)
    posterior = smooth(*contract()["varying"], T_CONTRACT)
    for covariances in (posterior.filtered_covariances, posterior.smoothed_covariances):
        covariances = np.asarray(covariances)
        # Rounding of one product, which may be summed in another order on the other side.
        transposed = np.swapaxes(covariances, 1, 2)
        np.testing.assert_allclose(covariances, transposed, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("backend, form", WAYS)
def test_tiny_variances(backend, form):
    """Variances of 1e-9 all over: nothing absolute is added to any matrix that is inverted."""
    problem = contract()["regular"]
    p = problem.params
    small = make_params(
        1e-4 * p.initial.mean,
        1e-9 * p.initial.cov,
        p.dynamics.weights,
        1e-9 * p.dynamics.cov,
        p.emissions.weights,
        1e-9 * p.emissions.cov,
        b=1e-4 * p.dynamics.bias,
        B=1e-4 * p.dynamics.input_weights,
        d=1e-4 * p.emissions.bias,
        D=1e-4 * p.emissions.input_weights,
    )
    problem = problem._replace(params=small, emissions=1e-4 * problem.emissions)
    smooth = compiled_smoother(backend, form)
    check_smoothed(smooth(*problem, T_CONTRACT), oracle(problem))
