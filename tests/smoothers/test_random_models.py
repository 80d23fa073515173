"""Random models of every rank against the exact oracle, and the exact oracle against others."""

import math

import numpy as np
import pytest

from exact_oracle import exact
from oracles import LONG, Model, dense, model_arrays
from problems import make_params
from random_models import (
    FEW_WAYS,
    SHAPES,
    WAYS,
    can_be_told,
    case,
    check_posterior,
    masks,
    smooth,
)

# Proper starts whose moments have been wrong in one form or the other, by up to 1e18.
ONCE_WRONG = {
    "two states": (7, 193, 378, 397),
    "four states": (53, 112, 116, 135, 149, 157, 171, 279, 297, 332, 378, 383),
    "one state": (),
}
CASES = [(shape, mask) for shape in SHAPES for mask in masks(SHAPES[shape])]


def regular(shape, mask, numbers):
    """Models whose emissions have a density given the diffuse effects, which all are identified."""
    for seed in numbers:
        drawn, expected = case(shape, mask, seed)
        noisy = np.all(np.diagonal(drawn.model.R, axis1=1, axis2=2) > 0)
        if noisy and expected.rank == sum(masks(SHAPES[shape])[mask]):
            yield drawn, expected


@pytest.mark.parametrize("shape, mask", CASES)
def test_exact_oracle_equals_the_dense_one(shape, mask):
    """Where there are no ranks to decide on; two thirds of the noisy models."""
    count = 0
    for drawn, expected in regular(shape, mask, range(24)):
        count += 1
        diffuse = masks(SHAPES[shape])[mask]
        long = Model(*(x.astype(LONG) for x in drawn.model))
        with np.errstate(divide="ignore", invalid="ignore"):  # until the effects are identified
            other = dense(long, drawn.emissions, diffuse)
        close = {"rtol": 1e-11, "atol": 1e-11 * expected.scale}
        value = float(other.log_likelihood)
        np.testing.assert_allclose(expected.log_likelihood, value, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(expected.smoothed_means, other.smoothed_means, **close)
        np.testing.assert_allclose(
            expected.smoothed_covariances, other.smoothed_covariances, **close
        )
        m = other.smoothed_means
        lagged = other.cross_moments - m[:-1, :, None] * m[1:, None, :]
        np.testing.assert_allclose(expected.lagged_covariances, lagged, **close)
        known = np.isfinite(expected.filtered_means).all(axis=1)
        np.testing.assert_allclose(
            expected.filtered_means[known], other.filtered_means[known], **close
        )
        np.testing.assert_allclose(
            expected.filtered_covariances[known], other.filtered_covariances[known], **close
        )
    assert count >= 3


def limit(drawn, diffuse, kappa):
    """A proper start with a variance of kappa, exactly: wrong by about 1 / kappa."""
    mask = np.asarray(diffuse)
    P0 = np.where(mask[:, None] | mask[None], 0.0, drawn.model.P0) + kappa * np.diag(1.0 * mask)
    return exact(drawn.model._replace(P0=P0), drawn.emissions)


@pytest.mark.parametrize("shape, mask", [case for case in CASES if case[1] != "proper"])
def test_exact_oracle_is_the_limit_of_proper_starts(shape, mask):
    """Ranks, undetermined states and the likelihood, by another way: kappa = 2^200, no rounding."""
    diffuse = masks(SHAPES[shape])[mask]
    kappa = 2.0**200
    for seed in range(12):
        drawn, expected = case(shape, mask, seed)
        proper = limit(drawn, diffuse, kappa)
        np.testing.assert_array_equal(proper.left_out, expected.left_out)
        value = proper.log_likelihood + expected.rank / 2 * math.log(kappa)
        np.testing.assert_allclose(value, expected.log_likelihood, rtol=1e-13, atol=1e-11)
        for what in ("filtered", "smoothed"):
            covariances = getattr(proper, f"{what}_covariances")
            means = getattr(proper, f"{what}_means")
            variances = np.diagonal(covariances, axis1=1, axis2=2)
            unknown = variances > 2.0**100
            wanted = getattr(expected, f"{what}_covariances")
            np.testing.assert_array_equal(np.isinf(np.diagonal(wanted, axis1=1, axis2=2)), unknown)
            pairs = unknown[:, :, None] | unknown[:, None, :]
            close = {"rtol": 1e-14, "atol": 1e-50}  # what is zero is 1 / kappa = 1e-60 here
            np.testing.assert_allclose(covariances[~pairs], wanted[~pairs], **close)
            wanted = getattr(expected, f"{what}_means")
            np.testing.assert_allclose(means[~unknown], wanted[~unknown], **close)
        other = exact(drawn.model, drawn.emissions, diffuse, proper_part=1000)
        np.testing.assert_array_equal(other.smoothed_covariances, expected.smoothed_covariances)
        np.testing.assert_array_equal(other.filtered_means, expected.filtered_means)


def test_exact_oracle_on_closed_forms():
    """AR(1) and a random walk without measurement error from a flat prior; a contradiction."""
    y = np.array([[1.0], [2.0], [-1.0], [0.5]])

    def solve(phi, Q, y, **start):
        one = np.ones((1, 1))
        params = make_params([0.0], one, phi * one, Q * one, one, 0 * one)
        rows = {"F": phi * one, "Q": Q * one, "H": one, "R": 0 * one}
        rows |= {"c": np.zeros(1), "d": np.zeros(1)}
        rows = {k: np.repeat(v[None], len(y), axis=0) for k, v in rows.items()}
        return exact(Model(m0=np.zeros(1), P0=np.asarray(params.initial.cov), **rows), y, **start)

    for phi, Q in ((0.5, 2.0), (1.0, 1.0)):
        found = solve(phi, Q, y, diffuse=(True,))
        steps = y[1:, 0] - phi * y[:-1, 0]
        value = -0.5 * (4 * math.log(2 * math.pi) + 3 * math.log(Q) + np.sum(steps**2) / Q)
        assert found.log_likelihood == pytest.approx(value, rel=1e-14)
        np.testing.assert_array_equal(found.smoothed_means, y)
        np.testing.assert_array_equal(found.smoothed_covariances, np.zeros((4, 1, 1)))
    # Nothing moves: the first value tells all others, and a different one contradicts it.
    assert solve(1.0, 0.0, y[:1].repeat(4, 0), diffuse=(True,)).log_likelihood == pytest.approx(
        -0.5 * math.log(2 * math.pi)
    )
    found = solve(1.0, 0.0, y, diffuse=(True,))
    assert found.log_likelihood == -math.inf and found.contradicted.sum() == 3
    # A state of which nothing is known stays so.
    found = solve(1.0, 1.0, np.full((4, 1), np.nan), diffuse=(True,))
    assert np.isnan(found.smoothed_means).all() and np.isinf(found.smoothed_covariances).all()
    assert found.log_likelihood == 0 and found.rank == 0


def check_models(shape, mask, backend, form, numbers):
    """Report every model that is wrong, not the first alone."""
    run = smooth(backend, form, masks(SHAPES[shape])[mask])
    wrong, count = [], 0
    for seed in numbers:
        drawn, expected = case(shape, mask, seed)
        if not can_be_told(expected):
            continue
        count += 1
        try:
            check_posterior(run(drawn.params, drawn.emissions), expected)
        except AssertionError as error:
            wrong.append(f"model {seed}: {error}")
    assert not wrong, f"{len(wrong)} of {count} wrong:\n" + "\n".join(wrong[:10])
    assert count > 0.8 * len(numbers)


@pytest.mark.parametrize("shape, mask", CASES)
@pytest.mark.parametrize("backend, form", FEW_WAYS)
def test_every_rank(shape, mask, backend, form):
    """Filter, smoother, neighbours and likelihood of about 50 models."""
    check_models(shape, mask, backend, form, [*range(40), *ONCE_WRONG[shape]])


@pytest.mark.parametrize("mask", ["proper", "diffuse"])
@pytest.mark.parametrize("backend, form", [way for way in WAYS if way not in FEW_WAYS])
def test_every_backend(mask, backend, form):
    """Other backends on small models: where blocks have no summary they give way."""
    check_models("two states", mask, backend, form, range(20))


@pytest.mark.long
@pytest.mark.parametrize("shape, mask", CASES)
@pytest.mark.parametrize("backend, form", WAYS)
def test_every_rank_on_every_backend(shape, mask, backend, form):
    check_models(shape, mask, backend, form, range(400))


@pytest.mark.parametrize("mask", ["proper", "diffuse"])
@pytest.mark.parametrize("backend, form", FEW_WAYS)
def test_level_and_seasonal_without_noise(mask, backend, form):
    """Data of period four: known without error once the first four are in, and backwards."""
    F = np.eye(4, k=-1)
    F[:2] = [1.0, 0.0, 0.0, 0.0], [0.0, -1.0, -1.0, -1.0]
    F[2] = [0.0, 1.0, 0.0, 0.0]
    nothing, H = np.zeros((4, 4)), [[1.0, 1.0, 0.0, 0.0]]
    params = make_params(np.zeros(4), 1e7 * np.eye(4), F, nothing, H, np.zeros((1, 1)))
    emissions = np.tile([[3.0], [1.0], [-2.0], [6.0]], (8, 1))
    diffuse = masks((4, 1, 32))[mask]
    posterior = smooth(backend, form, diffuse)(params, emissions)
    expected = exact(model_arrays(params, 32, dtype=np.float64), emissions, diffuse)
    assert expected.left_out.sum() == 28
    np.testing.assert_array_equal(expected.smoothed_covariances, np.zeros((32, 4, 4)))
    check_posterior(posterior, expected)
    np.testing.assert_allclose(posterior.smoothed_means[:, 0], 2.0, rtol=1e-9)
