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
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_reverse(form, rank):
    """The step turned around, for regular and singular noise, in lanes as everywhere else."""
    weights = np.random.default_rng(5).normal(size=(3, 3))
    p, q = semidefinite(3, 3, 0), semidefinite(3, rank, 1)
    lanes = (jnp.stack([m, 2 * m], -1) for m in (p, q))
    stored = [form.encode(m) for m in lanes]
    gain, rest, regular = jax.jit(form.reverse)(jnp.asarray(weights), *stored)
    assert np.all(regular)
    expected = p @ weights.T @ np.linalg.inv(weights @ p @ weights.T + q)
    conditional = p - expected @ weights @ p
    for lane in (0, 1):
        np.testing.assert_allclose(gain[..., lane], expected, rtol=1e-9, atol=1e-11)
        cov = form.decode(rest)[..., lane]
        np.testing.assert_allclose(cov, (1 + lane) * conditional, atol=1e-11)
    singular = [form.encode(jnp.zeros((3, 3, 1)))] * 2
    assert not np.any(jax.jit(form.reverse)(jnp.asarray(weights), *singular)[2])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("variance", [0.0, 0.3])
def test_update_with_one_scalar(form, size, variance):
    p = semidefinite(size, size, 0)
    row = jnp.asarray(np.random.default_rng(7).normal(size=size))
    stored = form.encode(p)
    projection, s = form.project(stored, row, jnp.asarray(variance))
    gain, conditional = form.update(stored, projection, jnp.asarray(variance), s, jnp.asarray(True))
    ph = p @ row
    expected_s = row @ ph + variance
    np.testing.assert_allclose(s, expected_s, rtol=1e-12)
    np.testing.assert_allclose(gain, ph / expected_s, rtol=1e-9, atol=1e-12)
    expected = p - np.outer(ph, ph) / expected_s
    np.testing.assert_allclose(form.decode(conditional), expected, atol=1e-10)
    gain, same = form.update(
        stored, projection, jnp.asarray(variance), jnp.asarray(1.0), jnp.asarray(False)
    )
    assert np.all(gain == 0)
    np.testing.assert_allclose(form.decode(same), p, rtol=1e-13, atol=1e-13)


def test_square_root_form_keeps_what_rounding_leaves_out():
    """A thousand steps, none of which changes a factor by half a unit in its last place."""
    form, row, r = SquareRoot(), jnp.ones(1, jnp.float32), jnp.float32(4e8)
    noise, q = form.encode(jnp.full((1, 1), 1e-8, jnp.float32)), float(np.float32(1e-4) ** 2)

    def step(stored, _):
        stored = form.predict(jnp.ones((1, 1), jnp.float32), stored, noise)
        projection, s = form.project(stored, row, r)
        return form.update(stored, projection, r, s, jnp.asarray(True))[1], None

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
    gain, rest, _ = form.reverse(weights, factor, noise)
    exact = p @ f.T @ np.linalg.inv(predicted)
    np.testing.assert_allclose(both(gain), exact, atol=3e-8 * (size == 2) + 3e-8)
    np.testing.assert_allclose(form.decode(rest), p - exact @ f @ p, atol=1e-6)
    conditional = both(form.condition(carried, zs))
    expected = np.linalg.solve(np.eye(size) + p @ j, p)
    np.testing.assert_allclose(conditional @ conditional.T, expected, atol=1e-9 * size)


def test_square_root_update_keeps_the_digits_that_covariances_lose():
    # One float32 state seen with a precision of 1e-5 standard deviations: 1e-10 is left of 1.
    p, row, r = jnp.ones((1, 1), jnp.float32), jnp.ones(1, jnp.float32), jnp.float32(1e-10)
    form = SquareRoot()
    projection, s = form.project(p, row, r)
    _, conditional = form.update(p, projection, r, s, jnp.asarray(True))
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
