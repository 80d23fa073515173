from functools import cache

import dynamax.linear_gaussian_ssm as dynamax_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.models import LinearGaussianConjugateSSM, LinearGaussianSSM
from elkax.models.completion import Completed, EmissionModel, Spread, complete
from elkax.models.expectation import expected_statistics
from elkax.scan import Blocked
from elkax.smoothers.prepare import prepare
from oracles import Model, dense, model_arrays
from problems import random_stable, varying, with_inputs, with_missing, written_out

T = 12
GAPS = {
    "rows": (0, 4, 11),
    "entries": ((1, 0), (2, 1), (5, 2), (6, 0), (6, 2), (7, 0), (8, 1), (8, 2)),
}


def with_errors_as_states(p):
    """The same emissions without noise, the measurement errors being states: moments of both."""
    T, N, D = p.H.shape

    def diagonal(A, B):
        return np.block([[A, np.zeros((D, N))], [np.zeros((N, D)), B]])

    return Model(
        m0=np.concatenate([p.m0, np.zeros(N)]),
        P0=diagonal(p.P0, p.R[0]),
        F=np.stack([diagonal(F, np.zeros((N, N))) for F in p.F]),
        c=np.concatenate([p.c, np.zeros((T, N))], axis=1),
        Q=np.stack([diagonal(Q, R) for Q, R in zip(p.Q, p.R, strict=True)]),
        H=np.concatenate([p.H, np.broadcast_to(np.eye(N), (T, N, N))], axis=2),
        d=p.d,
        R=np.zeros_like(p.R),
    )


def expected_products(problem):
    """E[x y'] and E[y y'] summed, x = (z, u, 1), and the likelihood, by one dense Gaussian."""
    p = model_arrays(problem.params, T, problem.inputs)
    N, D = p.H.shape[1:]
    posterior = dense(with_errors_as_states(p), np.asarray(problem.emissions))
    u = np.zeros((T, 0)) if problem.inputs is None else np.asarray(problem.inputs)
    xy, yy = 0.0, 0.0
    for t in range(T):
        load = np.concatenate([p.H[t], np.eye(N)], axis=1)
        mean, cov = posterior.smoothed_means[t], posterior.smoothed_covariances[t]
        y, cross = load @ mean + p.d[t], cov[:D] @ load.T
        xy += np.outer(np.concatenate([mean[:D], u[t], [1.0]]), y)
        xy[:D] += cross
        yy += np.outer(y, y) + load @ cov @ load.T
    return xy, yy, posterior.log_likelihood


def shared_errors():
    """Emissions of which the first two have the same error: a singular R."""
    R = np.array([[0.5, 0.5, 0.2], [0.5, 0.5, 0.2], [0.2, 0.2, 0.7]])
    return with_inputs(2, 3, T, R=R)


# One shape and every parameter over time, so that one compiled function serves all of them.
GAPPED = {
    "full R, inputs and biases": written_out(with_missing(with_inputs(2, 3, T), **GAPS)),
    "everything varying": with_missing(varying(2, 3, T), **GAPS),
    "whole rows only": written_out(with_missing(with_inputs(2, 3, T), rows=GAPS["rows"])),
    "nothing missing": varying(2, 3, T),
    "nothing seen": with_missing(varying(2, 3, T), rows=range(T)),
    "singular R": written_out(with_missing(shared_errors(), **GAPS)),
}
DIAGONAL = with_missing(random_stable(2, 3, T, diagonal="varying"), **GAPS)


@cache
def compiled(name, inputs):
    return jax.jit(getattr(LinearGaussianSSM(2, 3, inputs), name))


def check_against_dense(problem):
    inputs = 0 if problem.inputs is None else 1
    (_, _, (xx, xy, yy, count)), value = compiled("e_step", inputs)(*problem)
    expected_xy, expected_yy, expected_value = expected_products(problem)
    np.testing.assert_allclose(xy, expected_xy.astype(float), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(yy, expected_yy.astype(float), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(value, float(expected_value), rtol=1e-9)
    assert count == T and np.all(np.isfinite(xx))


@pytest.mark.parametrize("problem", GAPPED.values(), ids=GAPPED)
def test_emission_statistics_with_gaps_equal_the_dense_oracle(problem):
    check_against_dense(problem)


def test_emission_statistics_with_gaps_and_diagonal_R_equal_the_dense_oracle():
    check_against_dense(DIAGONAL)


def test_e_step_without_gaps_equals_dynamax():
    problem = GAPPED["nothing missing"]
    ours, value = compiled("e_step", 1)(*problem)
    # Beside dynamax's three statistics ours hold what the parameters leave.
    ours = tuple(ours), value
    theirs = dynamax_models.LinearGaussianSSM(2, 3, 1).e_step(*problem)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    # dynamax adds 1e-9 to the diagonal of every covariance that it inverts.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7), ours, theirs)


def test_statistics_without_biases_are_those_with_them_less_their_regressor():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape))

    means, covariances = draw(T, 2), draw(T, 2, 2)
    posterior = dynamax_models.PosteriorGSSMSmoothed(
        0.0, means, covariances, means, covariances, draw(T - 1, 2, 2)
    )
    spreads = (Spread(draw(2, 3), draw(3, 3)) for _ in range(2))
    problem = prepare(GAPPED["everything varying"].params, draw(T, 3), draw(T, 1))
    given = posterior, Completed(draw(T, 3), *spreads), draw(T, 1), problem
    full = expected_statistics(*given, has_dynamics_bias=True, has_emissions_bias=True)
    less = expected_statistics(*given, has_dynamics_bias=False, has_emissions_bias=False)
    for (xx, xy, *rest), (xx_less, xy_less, *rest_less) in zip(full[1:], less[1:], strict=True):
        np.testing.assert_allclose(xx[:-1, :-1], xx_less, rtol=1e-12)
        np.testing.assert_allclose(xy[:-1], xy_less, rtol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, rest, rest_less)


def test_chunks_of_time_do_not_change_the_moments(monkeypatch):
    rng = np.random.default_rng(1)
    params, emissions, _ = GAPPED["everything varying"]
    model = EmissionModel(params.emissions.weights, params.emissions.bias, params.emissions.cov)
    A = rng.standard_normal((T, 2, 2))
    states = jnp.asarray(rng.standard_normal((T, 2))), jnp.asarray(A @ A.transpose(0, 2, 1))

    def run():
        return complete(emissions, model, *states, diagonal=False)

    whole = run()
    monkeypatch.setattr("elkax.models.completion.CHUNK_NUMBERS", 5 * 9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), whole, run())


def test_inference_is_that_of_the_smoothers_with_the_strategy_of_the_model(monkeypatch, unchecked):
    calls = []

    def record(name):
        monkeypatch.setattr(
            f"elkax.models.linear_gaussian.{name}",
            lambda *arguments, **options: calls.append((name, arguments, options)),
        )

    for name in ("filter", "smoother", "marginal_log_prob", "posterior_sample", "forecast"):
        record(f"lgssm_{name}")
    record("lgssm_joint_sample")
    strategy = {"backend": Blocked(3), "form": "square_root", "initial": None}
    for cls in (LinearGaussianSSM, LinearGaussianConjugateSSM):
        model = cls(3, 2, 1, **strategy)
        model.filter("params", "y", "u")
        model.smoother("params", "y", "u")
        model.marginal_log_prob("params", "y", "u")
        model.posterior_sample("key", "params", "y", "u", num_samples=5)
        model.forecast("params", "y", 4, "u", "future u")
        model.sample("params", "key", 9, "u")
        given = {"length": None, **strategy}
        assert calls == [
            ("lgssm_filter", ("params", "y", "u"), given),
            ("lgssm_smoother", ("params", "y", "u"), given),
            ("lgssm_marginal_log_prob", ("params", "y", "u"), given),
            ("lgssm_posterior_sample", ("key", "params", "y", "u"), {"num_samples": 5, **given}),
            ("lgssm_forecast", ("params", "y", 4, "u", "future u"), given),
            (
                "lgssm_joint_sample",
                ("params", "key", 9, "u"),
                {"backend": Blocked(3), "initial": None},
            ),
        ]
        calls.clear()


@pytest.mark.parametrize(
    "problem", [GAPPED["everything varying"], DIAGONAL], ids=["full R", "diagonal R"]
)
def test_posterior_predictive_equals_the_dense_oracle(problem):
    p = model_arrays(problem.params, T, problem.inputs)
    posterior = dense(p, np.asarray(problem.emissions))
    inputs = 0 if problem.inputs is None else 1
    means, deviations = compiled("posterior_predictive", inputs)(*problem)
    expected = np.einsum("tnd,td->tn", p.H, posterior.smoothed_means) + p.d
    carried = np.einsum("tnd,tde,tne->tn", p.H, posterior.smoothed_covariances, p.H)
    variances = carried + np.diagonal(p.R, axis1=1, axis2=2)
    np.testing.assert_allclose(means, expected.astype(float), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(deviations, np.sqrt(variances.astype(float)), rtol=1e-9)
