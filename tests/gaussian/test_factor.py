"""Small-matrix factorisations against NumPy, with and without lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.gaussian.factor import (
    cho_solve,
    psd_cholesky,
    solve_lower,
    tria,
    tria_change,
    unit_ldl,
)
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes

# 9 lies beyond the size up to which loops are written out.
SIZES = [1, 3, 9]


def batch(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(5, rows, columns))


def over_lanes(function, *matrices):
    got = jax.jit(function)(*(to_lanes(jnp.asarray(m)) for m in matrices))
    return jax.tree.map(from_lanes, got)


@pytest.mark.parametrize("size", SIZES)
def test_cholesky_of_definite_and_singular_matrices(size):
    for rank in {size, max(1, size // 2)}:
        root = batch(size, rank)
        p = root @ np.swapaxes(root, 1, 2)
        factor = over_lanes(psd_cholesky, p)
        assert np.all(np.triu(factor, 1) == 0) and np.all(np.isfinite(factor))
        np.testing.assert_allclose(factor @ np.swapaxes(factor, 1, 2), p, atol=1e-10 * size)
        np.testing.assert_allclose(psd_cholesky(jnp.asarray(p[0])), factor[0], atol=1e-10 * size)


def test_cholesky_of_zero_and_of_nan():
    assert np.all(psd_cholesky(jnp.zeros((3, 3))) == 0)
    assert np.isnan(psd_cholesky(jnp.full((3, 3), jnp.nan))).any()


@pytest.mark.parametrize("size", SIZES)
def test_tria(size):
    a = batch(size, 2 * size + 1)
    a[1, -1] = a[1, 0]  # dependent rows
    lower = over_lanes(tria, a)
    assert np.all(np.triu(lower, 1) == 0)
    assert np.all(np.diagonal(lower, axis1=1, axis2=2) >= -1e-12)
    # Relative to the largest entries; a QR is backward stable.
    np.testing.assert_allclose(
        lower @ np.swapaxes(lower, 1, 2), a @ np.swapaxes(a, 1, 2), atol=1e-11
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_change_of_a_triangular_factor(size, scale):
    base, a = batch(size, size), scale * batch(size, 2 * size + 1, seed=1)
    whole = a + np.concatenate((np.tril(base), np.zeros((5, size, size + 1))), -1)
    # From a lower base, and from one that is not quite.
    for b in (np.tril(base), np.tril(base) + 1e-3 * base):
        m = whole.copy()
        m[..., :size] += b - np.tril(base)
        lower = b + over_lanes(tria_change, b, a)
        assert np.all(np.abs(np.triu(lower, 1)) < 1e-15)
        assert np.all(np.diagonal(lower, axis1=1, axis2=2) >= -1e-12)
        expected = m @ np.swapaxes(m, 1, 2)
        np.testing.assert_allclose(lower @ np.swapaxes(lower, 1, 2), expected, atol=1e-11)
    shared = over_lanes(lambda a: tria_change(jnp.asarray(np.tril(base[0])), a), a)
    np.testing.assert_allclose(
        shared[0], over_lanes(tria_change, np.tril(base), a)[0], rtol=1e-9, atol=1e-13
    )


def test_a_small_change_of_a_factor_has_its_own_digits():
    base = (np.tril(np.ones((3, 3))) + 2 * np.eye(3)).astype(np.float32)
    a = (1e-4 * batch(3, 6)[0]).astype(np.float32)
    m = np.concatenate((base, np.zeros((3, 3))), 1) + a.astype(float)
    expected = np.linalg.cholesky(m @ m.T) - base
    got = tria_change(jnp.asarray(base), jnp.asarray(a))
    assert np.max(np.abs(got - expected)) < 3e-7 * np.max(np.abs(expected))


def test_tria_of_tiny_numbers_does_not_underflow():
    a = jnp.asarray(batch(3, 6)[0] * 1e-30, jnp.float32)
    # Compared as factors: squares of these are zero in float32.
    scaled = np.asarray(tria(a * 1e30))
    np.testing.assert_allclose(np.asarray(tria(a)) * 1e30, scaled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_solves(size):
    factor = np.tril(batch(size, size)) + 3 * np.eye(size)
    b = batch(size, 2, seed=1)
    np.testing.assert_allclose(
        over_lanes(solve_lower, factor, b), np.linalg.solve(factor, b), atol=1e-10
    )
    transposed = over_lanes(lambda f, x: solve_lower(f, x, transposed=True), factor, b)
    np.testing.assert_allclose(
        transposed, np.linalg.solve(np.swapaxes(factor, 1, 2), b), atol=1e-10
    )
    p = factor @ np.swapaxes(factor, 1, 2)
    np.testing.assert_allclose(over_lanes(cho_solve, factor, b), np.linalg.solve(p, b), atol=1e-9)
    # One factor for all lanes.
    shared = from_lanes(solve_lower(jnp.asarray(factor[0]), to_lanes(jnp.asarray(b))))
    np.testing.assert_allclose(shared, np.linalg.solve(factor[0], b), atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_unit_ldl_whitens_correlated_errors(size):
    for rank in {size, max(1, size // 2)}:
        root = batch(size, rank)
        r = root @ np.swapaxes(root, 1, 2)
        inverse, pivots = over_lanes(unit_ldl, r)
        np.testing.assert_allclose(np.diagonal(inverse, axis1=1, axis2=2), 1.0)
        white = inverse @ r @ np.swapaxes(inverse, 1, 2)
        expected = pivots[:, :, None] * np.eye(size)
        # The unpivoted inverse of a unit factor grows with the size.
        np.testing.assert_allclose(white, expected, atol=1e-7 * np.abs(inverse).max() ** 2)


@pytest.mark.parametrize("size", [1, 3])
def test_derivative_of_unit_ldl(size):
    root, change = batch(size, size + 1), batch(size, size, 1)
    r = root @ np.swapaxes(root, 1, 2)
    change = change + np.swapaxes(change, 1, 2)
    step = 1e-6

    def tangents(r, change):
        return jax.jvp(unit_ldl, (r,), (change,))[1]

    up, down = over_lanes(unit_ldl, r + step * change), over_lanes(unit_ldl, r - step * change)
    for got, a, b in zip(over_lanes(tangents, r, change), up, down, strict=True):
        # Central differences leave about 1e-16/step of rounding.
        np.testing.assert_allclose(got, (a - b) / (2 * step), rtol=1e-6, atol=1e-7)


def test_a_measurement_without_error_is_eliminated_last_wherever_it_stands():
    """Values and derivatives do not depend on its place."""
    root, change = np.zeros((3, 3)), batch(3, 3, 1)[0]
    root[:2, :2] = batch(2, 2)[0]
    r, change = root @ root.T, change + change.T
    place = np.array([2, 0, 1])

    def all_of(r, change):
        return jax.tree.leaves(jax.jvp(unit_ldl, (jnp.asarray(r),), (jnp.asarray(change),)))

    def move(array):
        return array[np.ix_(*[place] * array.ndim)]

    expected = [move(part) for part in all_of(r, change)]
    for got, value in zip(all_of(move(r), move(change)), expected, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-13)


@pytest.mark.parametrize("inner", [3, 8, 9])
def test_products(inner):
    a, b, x = batch(4, inner), batch(inner, 2, 1), batch(inner, 1, 2)[..., 0]
    np.testing.assert_allclose(over_lanes(matmul, a, b), a @ b, atol=1e-13)
    np.testing.assert_allclose(
        from_lanes(matmul(jnp.asarray(a[0]), to_lanes(jnp.asarray(b)))), a[0] @ b, atol=1e-13
    )
    np.testing.assert_allclose(over_lanes(matvec, a, x), np.einsum("tij,tj->ti", a, x), atol=1e-13)
