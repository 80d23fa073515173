"""Variances that data take down so far that covariances have no digits left: the default call."""

import jax
import numpy as np
import pytest

import elkax
from exact_oracle import exact
from oracles import model_arrays
from problems import make_params

T = 24
SEASONAL = np.array([[1.0, 0, 0, 0], [0, -1, -1, -1], [0, 1, 0, 0], [0, 0, 1, 0]])
TREND = np.array([[1.0, 1.0], [0.0, 1.0]])
MODELS = {"trend": (TREND, [[1.0, 0.0]]), "level and seasonal": (SEASONAL, [[1.0, 1.0, 0, 0]])}


def case(name, fall, q):
    """Variances: 1e6 at the start, 1e6 / fall of the measurements, q times that of the level."""
    F, H = MODELS[name]
    D, r = len(F), 1e6 / fall
    Q = np.zeros((D, D))
    Q[0, 0] = q * r
    params = make_params(np.zeros(D), 1e6 * np.eye(D), F, Q, H, [[r]])
    line = np.arange(T) / 2 if name == "trend" else np.arange(T) % 4
    y = 3 + line + np.sqrt(r) * np.random.default_rng(1).standard_normal(T)
    y = y[:, None]
    return params, y, exact(model_arrays(params, T, dtype=np.float64), y)


def close(means, covariances, expected_means, expected_covariances, rtol):
    """Means in deviations, beside rounding of their size; variances relative to themselves."""
    found, wanted = (
        np.diagonal(np.asarray(c), axis1=1, axis2=2) for c in (covariances, expected_covariances)
    )
    np.testing.assert_allclose(found, wanted, rtol=rtol)
    off = np.abs(np.asarray(means) - expected_means)
    assert np.all(off <= rtol * np.sqrt(wanted) + 1e-13 * np.max(np.abs(expected_means)))


@pytest.mark.parametrize("q", [0.0, 1.0])
@pytest.mark.parametrize("fall", [1e6, 1e8, 1e12, 1e21])
@pytest.mark.parametrize("name", MODELS)
def test_default_call_keeps_its_digits(name, fall, q):
    params, y, expected = case(name, fall, q)
    posterior = elkax.lgssm_smoother(params, y)
    for found in (
        posterior,
        elkax.lgssm_filter(params, y),
    ):
        close(
            found.filtered_means,
            found.filtered_covariances,
            expected.filtered_means,
            expected.filtered_covariances,
            1e-5,
        )
        value = float(found.marginal_loglik)
        assert value == pytest.approx(expected.log_likelihood, rel=1e-7)
    close(
        posterior.smoothed_means,
        posterior.smoothed_covariances,
        expected.smoothed_means,
        expected.smoothed_covariances,
        1e-5,
    )
    value = float(elkax.lgssm_marginal_log_prob(params, y))
    assert value == pytest.approx(expected.log_likelihood, rel=1e-7)


def test_only_what_falls_too_far_needs_factors():
    """The same program as `form` by name: bit for bit, for likelihood and smoother apart."""
    ways = {"covariance": (1e5, 1e2), "square_root": (1e9, 1e5)}
    for form, falls in ways.items():
        for function, fall in zip(("lgssm_filter", "lgssm_smoother"), falls, strict=True):
            params, y, _ = case("trend", fall, 1.0)
            chosen, named = (
                getattr(elkax, function)(params, y, **options) for options in ({}, {"form": form})
            )
            jax.tree.map(np.testing.assert_array_equal, chosen, named)
