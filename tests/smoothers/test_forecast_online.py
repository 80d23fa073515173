"""Forecasts, streaming, innovations and disturbances against the dense reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import elkax
from oracles import dense, extend, model_arrays
from problems import (
    ar2,
    local_level,
    random_stable,
    varying,
    with_inputs,
    with_missing,
    written_out,
)
from smoothers.linear_checks import (
    FORMS,
    RTOL,
    check_log_likelihood,
    check_moments,
    compiled,
    contract,
    oracle,
    reference,
    within,
)

H = 4  # forecast steps


def future(model, emissions, steps=H):
    """Dense reference over the past and `steps` unseen rows; the model covers all of them."""
    unseen = np.full((steps, emissions.shape[1]), np.nan)
    return dense(model, np.concatenate([np.asarray(emissions), unseen]))


def check_forecast(forecast, whole, steps=H, rtol=RTOL):
    tail = {name: getattr(whole, name)[-steps:] for name in whole._fields[1:]}
    check_moments(
        forecast.state_means,
        forecast.state_covariances,
        tail["smoothed_means"],
        tail["smoothed_covariances"],
        tail["prior_covariances"],
        "state",
        rtol,
    )
    emission = tail["emission_means"], tail["emission_covariances"]
    check_moments(
        forecast.emission_means,
        forecast.emission_covariances,
        *emission,
        emission[1],
        "emission",
        rtol,
    )


@pytest.mark.parametrize("form", FORMS)
def test_forecast_with_future_inputs(form):
    """Inputs act on the states and on the emissions; the last rows of the past are missing."""
    problem = with_missing(with_inputs(T=7 + H), rows=(5, 6))
    past, later = problem.inputs[:7], problem.inputs[7:]
    forecast = elkax.lgssm_forecast(
        problem.params, problem.emissions[:7], H, past, later, form=form
    )
    model = model_arrays(problem.params, 7 + H, problem.inputs)
    check_forecast(forecast, future(model, problem.emissions[:7]))


def test_forecast_with_parameters_in_time():
    """T + h rows of parameters; row T is the step into the first forecast state."""
    problem = varying(T=7 + H)
    forecast = elkax.lgssm_forecast(
        problem.params, problem.emissions[:7], H, problem.inputs[:7], problem.inputs[7:]
    )
    model = model_arrays(problem.params, 7 + H, problem.inputs)
    check_forecast(forecast, future(model, problem.emissions[:7]))


def test_forecast_of_a_singular_model_under_jit():
    """AR(2) with R = 0: the emission covariance of the forecast comes from the state alone."""
    problem = ar2()
    forecast = jax.jit(lambda p, y: elkax.lgssm_forecast(p, y, H))(*problem[:2])
    model = extend(model_arrays(problem.params, 7), H)
    check_forecast(forecast, future(model, problem.emissions))


def test_forecast_of_ragged_series_starts_at_their_lengths():
    """Each in a batch after its own end: parameters and inputs of the right times."""
    problem, lengths = with_inputs(D=2, N=2, T=17 + H), (9, 17)
    inputs, new = problem.inputs[:17], problem.inputs[-H:]

    def forecast(length):
        emissions = jnp.where(jnp.arange(17)[:, None] < length, problem.emissions[:17], jnp.inf)
        return elkax.lgssm_forecast(problem.params, emissions, H, inputs, new, length=length)

    batch = jax.jit(jax.vmap(forecast))(jnp.array(lengths))
    for k, length in enumerate(lengths):
        follow = np.concatenate([inputs[:length], new])
        model = model_arrays(problem.params, length + H, follow)
        expected = future(model, problem.emissions[:length])
        check_forecast(jax.tree.map(lambda leaf, k=k: leaf[k], batch), expected)


@pytest.mark.parametrize("form", FORMS)
def test_flat_level_keeps_its_level(form):
    """A level of 1e5 forecasts 1e5 at every horizon, with linearly growing variance."""
    problem = local_level(np.full(50, 1e5), 1.0, 100.0, prior_variance=1e9)
    forecast = elkax.lgssm_forecast(problem.params, problem.emissions, 24, form=form)
    # The prior mean of zero keeps a weight of 1e-7 at the start that decays with every step.
    np.testing.assert_allclose(forecast.emission_means, 1e5, rtol=1e-7)
    growth = np.diff(np.asarray(forecast.state_covariances)[:, 0, 0])
    np.testing.assert_allclose(growth, 1.0, rtol=1e-9)
    extra = forecast.emission_covariances - forecast.state_covariances
    np.testing.assert_allclose(extra, 100.0, rtol=1e-9)


def test_interval():
    """Mean plus and minus the normal quantile times the standard deviation; 90 % by default."""
    forecast = elkax.lgssm_forecast(*random_stable(2, 3, 7)[:2], H)
    sd = np.sqrt(np.diagonal(np.asarray(forecast.emission_covariances), axis1=1, axis2=2))
    for level in (0.5, 0.9, 0.99):
        lower, upper = forecast.interval(level)
        half = norm.ppf(0.5 + level / 2) * sd
        # The normal quantile is a float64 special function on both sides.
        within(lower, np.asarray(forecast.emission_means) - half, 1e-10 * sd, "lower ")
        within(upper, np.asarray(forecast.emission_means) + half, 1e-10 * sd, "upper ")
    np.testing.assert_array_equal(forecast.interval()[0], forecast.interval(0.9)[0])


STREAMS = {
    "time-varying, missing": lambda: contract()["missing entries"],
    "zero Q and P0": lambda: contract()["zero Q and P0"],
    "AR(2), R = 0": ar2,
    "constant, R of shape (N,)": lambda: random_stable(2, 4, 7, diagonal="constant"),
}


STEP = jax.jit(elkax.lgssm_online_step, static_argnames="form")


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("form", FORMS)
def test_streaming_equals_the_offline_filter(name, form):
    """One emission at a time, in memory that does not grow; equal after every step."""
    problem = STREAMS[name]()
    state = start = elkax.lgssm_online_start(problem.params, form=form)

    def step(state, emission, input):
        return STEP(problem.params, state, emission, input, form=form)

    means, covariances = [], []
    for t, emission in enumerate(problem.emissions):
        state = step(state, emission, None if problem.inputs is None else problem.inputs[t])
        assert int(state.time) == t + 1
        for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True):
            assert before.shape == after.shape and before.dtype == after.dtype
        factor = np.asarray(state.covariance)
        if form == "square_root":
            np.testing.assert_array_equal(factor, np.tril(factor))
        means.append(np.asarray(state.mean))
        covariances.append(factor @ factor.T if form == "square_root" else factor)
    expected = oracle(problem)
    check_moments(
        np.stack(means),
        np.stack(covariances),
        expected.filtered_means,
        expected.filtered_covariances,
        expected.prior_covariances,
        "filtered",
    )
    check_log_likelihood(state.marginal_loglik, expected.log_likelihood, problem.emissions.shape[0])


def test_streaming_inside_scan():
    """The state is a carry of `lax.scan`."""
    problem = written_out(with_inputs())

    def step(state, row):
        state = elkax.lgssm_online_step(problem.params, state, *row)
        return state, state.mean

    start = elkax.lgssm_online_start(problem.params)
    last, means = jax.lax.scan(step, start, (problem.emissions, problem.inputs))
    offline = elkax.lgssm_filter(*problem)
    # Two programs for the same numbers, all of order one.
    within(means, np.asarray(offline.filtered_means), 1e-12, "filtered means")
    np.testing.assert_allclose(last.marginal_loglik, offline.marginal_loglik, rtol=1e-12)


HOW = [("sequential", "square_root"), ("blocked", "covariance")]
SEEN = ["varying", "missing entries", "zero Q and P0", "rank-one R", "nothing seen"]


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("backend, form", HOW)
def test_innovations(name, backend, form):
    """Predictions for every entry, innovations for the observed ones, NaN for the missing."""
    problem, expected = contract()[name], reference(name)
    ours = compiled("lgssm_innovations", backend, form)(*problem)
    predicted = expected.predicted_emission_means, expected.predicted_emission_covariances
    check_moments(ours.means, ours.covariances, *predicted, predicted[1], "emission")
    y = np.asarray(problem.emissions)
    missing = np.isnan(y)
    for actual in (ours.innovations, ours.standardized):
        np.testing.assert_array_equal(np.isnan(actual), missing)
    scale = np.max(np.abs(predicted[0])) + 1
    seen = ~missing
    raw = np.asarray(ours.innovations)[seen]
    within(raw, (y - predicted[0])[seen], RTOL * scale, "innovations ")
    # Standardising divides by standard deviations that are a few times smaller than the means.
    standardized = np.asarray(ours.standardized)[seen]
    within(standardized, expected.standardized[seen], 10 * RTOL * scale, "standardized ")


def test_innovations_are_standard_normal_under_their_own_model():
    """2,000 draws of length one from N(m, S): unit variance and no correlation, to 6 sigma."""
    problem = random_stable(2, 2, 1, seed=4)
    keys = jax.random.split(jax.random.key(0), 2000)
    draws = jax.vmap(lambda k: elkax.lgssm_joint_sample(problem.params, k, 1)[1])(keys)
    ours = jax.vmap(lambda y: elkax.lgssm_innovations(problem.params, y).standardized)(draws)
    sample = np.cov(np.asarray(ours)[:, 0].T)
    np.testing.assert_allclose(sample, np.eye(2), atol=6 * np.sqrt(2 / 2000))


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("backend, form", HOW)
def test_disturbances(name, backend, form):
    """Row 0 of the dynamics is z_1 - m0; a missing entry's noise is inferred through R."""
    problem, expected = contract()[name], reference(name)
    ours = compiled("lgssm_disturbances", backend, form)(*problem)
    Q = np.concatenate([problem.params.initial.cov[None], problem.params.dynamics.cov[1:]])
    check_moments(
        ours.dynamics_means,
        ours.dynamics_covariances,
        expected.dynamics_disturbance_means,
        expected.dynamics_disturbance_covariances,
        Q,
        "dynamics disturbance",
    )
    check_moments(
        ours.emission_means,
        ours.emission_covariances,
        expected.emission_disturbance_means,
        expected.emission_disturbance_covariances,
        np.asarray(problem.params.emissions.cov),
        "emission disturbance",
    )


def test_disturbances_add_up_to_the_data():
    """z_t - F z_{t-1} - c and y - H z - d of the smoothed means, without any reference."""
    problem = with_inputs()
    ours = elkax.lgssm_disturbances(*problem)
    z = np.asarray(elkax.lgssm_smoother(*problem).smoothed_means)
    p = model_arrays(problem.params, 7, problem.inputs, np.float64)
    steps = z[1:] - np.einsum("tij,tj->ti", p.F[1:], z[:-1]) - p.c[1:]
    within(ours.dynamics_means[1:], steps, 1e-11 * np.max(np.abs(z)), "dynamics disturbances")
    rest = np.asarray(problem.emissions) - np.einsum("tij,tj->ti", p.H, z) - p.d
    within(ours.emission_means, rest, 1e-11 * np.max(np.abs(z)), "emission disturbances")
