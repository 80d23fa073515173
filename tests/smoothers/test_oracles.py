"""The references themselves: against each other, against dynamax and against known values."""

import jax
import numpy as np
import pytest
from dynamax.linear_gaussian_ssm import inference as dynamax_inference
from statsmodels.datasets import nile

from oracles import LONG, dense, dense_log_likelihood, model_arrays, sequential
from problems import contract_problems, local_level, varying

REGULAR = ["regular", "varying", "missing rows", "missing entries", "vague prior", "zero P0"]


@pytest.mark.parametrize("name", REGULAR)
def test_dense_and_sequential_references_agree(name):
    problem = contract_problems()[name]
    T = problem.emissions.shape[0]
    model = model_arrays(problem.params, T, problem.inputs)
    whole, steps = dense(model, problem.emissions), sequential(model, problem.emissions)
    for field in steps._fields:
        expected = getattr(whole, field)
        # Both run in extended precision; 1e7 / 1e-1 is the worst ratio of variances here.
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(getattr(steps, field), expected, rtol=0, atol=1e-11 * scale)


def test_dense_reference_against_dynamax():
    problem = varying()
    model = model_arrays(problem.params, problem.emissions.shape[0], problem.inputs)
    ours = dense(model, problem.emissions)
    theirs = jax.jit(dynamax_inference.lgssm_smoother)(*problem)
    names = {
        "marginal_loglik": ours.log_likelihood,
        "filtered_means": ours.filtered_means,
        "filtered_covariances": ours.filtered_covariances,
        "smoothed_means": ours.smoothed_means,
        "smoothed_covariances": ours.smoothed_covariances,
        "smoothed_cross_covariances": ours.cross_moments,
    }
    for field, expected in names.items():
        # dynamax adds 1e-9 to the diagonal of every matrix it inverts.
        np.testing.assert_allclose(getattr(theirs, field), expected.astype(float), atol=1e-6)


def nile_model():
    """Local level at Durbin and Koopman's variances, and the series."""
    problem = local_level(nile.load_pandas().data["volume"])
    return model_arrays(problem.params, 100), np.array(problem.emissions)


def test_nile_with_known_start():
    """Values printed by statsmodels for the same model, to all printed digits."""
    model, y = nile_model()
    result = dense(model, y)
    assert float(result.log_likelihood) == pytest.approx(-641.585578459, abs=1e-9)
    assert float(result.smoothed_means[0, 0]) == pytest.approx(1111.22025757, abs=1e-8)
    assert float(result.smoothed_means[-1, 0]) == pytest.approx(798.37029261, abs=1e-8)
    assert float(result.smoothed_covariances[0, 0, 0]) == pytest.approx(4030.53276734, abs=1e-8)
    y[20:40], y[60:80] = np.nan, np.nan
    assert float(dense_log_likelihood(model, y)) == pytest.approx(-389.626978, abs=1e-6)


def test_exact_diffuse_reference_is_the_limit_of_a_wide_prior():
    """The generalised-least-squares limit against Nile's value and against kappa = 1e12."""
    model, y = nile_model()
    limit = dense(model, y, diffuse=(True,))
    assert float(limit.log_likelihood) == pytest.approx(-633.464564, abs=1e-6)
    kappa = LONG(1e12)
    wide = dense(model._replace(P0=kappa * np.ones((1, 1), LONG)), y)
    # The limit is reached at rate 1/kappa times the variances of the model.
    assert float(wide.log_likelihood + np.log(kappa) / 2 - limit.log_likelihood) == pytest.approx(
        0, abs=1e-6
    )
    np.testing.assert_allclose(wide.smoothed_means, limit.smoothed_means, rtol=1e-7)
    np.testing.assert_allclose(wide.smoothed_covariances, limit.smoothed_covariances, rtol=1e-7)


def test_every_problem_has_a_finite_reference():
    """No shared problem asks the dense reference for a singular covariance of emissions."""
    for name, problem in contract_problems().items():
        model = model_arrays(problem.params, problem.emissions.shape[0], problem.inputs)
        result = dense(model, problem.emissions)
        assert np.isfinite(result.log_likelihood), name
        assert np.all(np.isfinite(result.joint_covariance)), name
        variances = np.diagonal(result.smoothed_covariances, axis1=1, axis2=2)
        # Rounding of the extended-precision subtraction, relative to the prior's variances.
        assert np.min(variances) >= -1e-14 * np.max(result.prior_covariances), name
