"""The two covariance forms against dense formulas, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.gaussian import Covariance, SquareRoot
from elkax.gaussian.covariance import condition_on_information

FORMS = [Covariance(), SquareRoot()]


def semidefinite(size, rank, seed):
    root = np.random.default_rng(seed).normal(size=(size, rank))
    return jnp.asarray(root @ root.T)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_predict(form, rank):
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(3, 3)))
    p, q = semidefinite(3, rank, 0), semidefinite(3, 1, 1)
    got = form.decode(form.predict(weights, form.encode(p), form.encode(q)))
    np.testing.assert_allclose(got, weights @ p @ weights.T + q, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("variance", [0.0, 0.3])
def test_update_with_one_scalar(form, size, variance):
    p = semidefinite(size, size, 0)
    row = jnp.asarray(np.random.default_rng(7).normal(size=size))
    stored, r = form.encode(p), jnp.asarray(variance)
    projection, s = form.project(stored, row, r)
    gain = form.gain(stored, projection) / s
    ph = p @ row
    expected_s = row @ ph + variance
    np.testing.assert_allclose(s, expected_s, rtol=1e-12)
    np.testing.assert_allclose(gain, ph / expected_s, rtol=1e-9, atol=1e-12)
    expected = p - np.outer(ph, ph) / expected_s
    conditional = form.update(stored, row, projection, r, s, gain)
    np.testing.assert_allclose(form.decode(conditional), expected, atol=1e-10)
    np.testing.assert_allclose(
        form.decode(form.correct(stored, row, r, gain)), expected, atol=1e-10
    )
    none = jnp.zeros(size)
    same = form.update(stored, row, none, r, jnp.asarray(1.0), none)
    np.testing.assert_allclose(form.decode(same), p, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(form.variances(stored), np.diagonal(p), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("variance", [0.0, 0.3])
def test_correction_by_any_gain(form, variance):
    p, rng = semidefinite(3, 2, 0), np.random.default_rng(8)
    row, gain = (jnp.asarray(rng.normal(size=3)) for _ in range(2))
    got = form.decode(form.correct(form.encode(p), row, jnp.asarray(variance), gain))
    kept = np.eye(3) - np.outer(gain, row)
    expected = kept @ p @ kept.T + variance * np.outer(gain, gain)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_covariance_form_keeps_digits_where_a_variance_falls():
    # A variance of 1e10 measured with one of 1: of an update by a difference nothing is left.
    p, row, r = 1e10 * jnp.eye(2, dtype=jnp.float32), jnp.array([1.0, 0.0], jnp.float32), 1.0
    form, variance = Covariance(), jnp.float32(r)
    projection, s = form.project(p, row, variance)
    got = form.update(p, row, projection, variance, s, projection / s)
    np.testing.assert_allclose(got, [[1.0, 0.0], [0.0, 1e10]], rtol=1e-4)


def test_square_root_form_keeps_what_rounding_leaves_out():
    """A thousand steps, none of which changes a factor by half a unit in its last place."""
    form, row, r = SquareRoot(), jnp.ones(1, jnp.float32), jnp.float32(4e8)
    noise, q = form.encode(jnp.full((1, 1), 1e-8, jnp.float32)), float(np.float32(1e-4) ** 2)

    def step(stored, _):
        stored = form.predict(jnp.ones((1, 1), jnp.float32), stored, noise)
        projection, s = form.project(stored, row, r)
        return form.update(stored, row, projection, r, s, form.gain(stored, projection) / s), None

    start = form.exact(form.encode(jnp.ones((1, 1), jnp.float32)))
    stored = jax.lax.scan(step, start, None, length=1000)[0]
    expected = 1.0
    for _ in range(1000):
        expected = 1 / (1 / (expected + q) + 1 / 4e8)
    change = np.sum(np.asarray(stored, np.float64)) ** 2 - 1
    np.testing.assert_allclose(change, expected - 1, rtol=1e-3)


@pytest.mark.parametrize("size", [2, 9])
def test_square_root_form_in_float32(size):
    """Each operation on a factor with what rounding left out of it; a gain keeps 1 - G."""
    form, rng = SquareRoot(), np.random.default_rng(3)

    def short(x):
        return jnp.asarray(x, jnp.float32)

    def both(stored):
        stored = np.asarray(stored, float)
        return stored[:, :size] + stored[:, size:]

    weights = short(np.eye(size) + 1e-3 * rng.normal(size=(size, size)))
    factor = short(np.linalg.cholesky(np.eye(size) + 0.1 * semidefinite(size, size, 0)))
    noise, zs = short(1e-2 * np.tril(rng.normal(size=(size, size)))), short(0.01 * np.eye(size))
    p, q, j = (np.asarray(m, float) @ np.asarray(m, float).T for m in (factor, noise, zs))
    f, carried = np.asarray(weights, float), form.exact(factor)
    predicted = np.asarray(f @ p @ f.T + q)
    got = both(form.predict(weights, carried, noise))
    np.testing.assert_allclose(got - factor, np.linalg.cholesky(predicted) - factor, atol=3e-9)
    k, row = short(0.1 * rng.normal(size=size)), short(rng.normal(size=size))
    corrected = both(form.correct(carried, row, jnp.float32(0.3), k))
    kept = np.eye(size) - np.outer(np.asarray(k, float), np.asarray(row, float))
    exact = kept @ p @ kept.T + np.float32(0.3) * np.outer(
        np.asarray(k, float), np.asarray(k, float)
    )
    np.testing.assert_allclose(corrected @ corrected.T, exact, atol=1e-7 * size)
    conditional = both(form.condition(carried, zs))
    expected = np.linalg.solve(np.eye(size) + p @ j, p)
    np.testing.assert_allclose(conditional @ conditional.T, expected, atol=1e-9 * size)


def test_square_root_update_keeps_the_digits_that_covariances_lose():
    # One float32 state seen with a precision of 1e-5 standard deviations: 1e-10 is left of 1.
    p, row, r = jnp.ones((1, 1), jnp.float32), jnp.ones(1, jnp.float32), jnp.float32(1e-10)
    form = SquareRoot()
    projection, s = form.project(p, row, r)
    conditional = form.update(p, row, projection, r, s, form.gain(p, projection) / s)
    np.testing.assert_allclose(form.decode(conditional), [[1e-10]], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("ranks", [(3, 3), (1, 3), (3, 1), (0, 3), (3, 0), (1, 1)])
def test_conditioning_on_information(form, ranks):
    p, j = semidefinite(3, ranks[0], 0), semidefinite(3, ranks[1], 1)
    got = form.decode(form.condition(form.encode(p), form.encode(j)))
    # I + P J is well conditioned here, so the direct solve is an oracle.
    np.testing.assert_allclose(got, np.linalg.solve(np.eye(3) + p @ j, p), atol=1e-11)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_accumulate(form):
    j, columns = semidefinite(3, 2, 0), jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)))
    added, _ = form.accumulate(form.encode(j), jnp.zeros_like(j), columns)
    got = form.decode(added)
    np.testing.assert_allclose(got, j + columns @ columns.T, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_derivative_of_conditioning_at_singular_covariances(rank):
    p, j = semidefinite(3, rank, 0), semidefinite(3, 2, 1)
    dp, dj = semidefinite(3, 2, 2), semidefinite(3, 3, 3)

    def direct(p, j):
        return jnp.linalg.solve(jnp.eye(3) + p @ j, p)

    got = jax.jvp(condition_on_information, (p, j), (dp, dj))
    expected = jax.jvp(direct, (p, j), (dp, dj))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
    # Twice, along the same direction.
    second = [
        jax.jvp(lambda p, j, f=f: jax.jvp(f, (p, j), (dp, dj))[1], (p, j), (dp, dj))[1]
        for f in (condition_on_information, direct)
    ]
    np.testing.assert_allclose(*second, atol=1e-8)
