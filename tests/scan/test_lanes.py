"""Small-matrix arithmetic over lanes: exactness of sums, products near the identity."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.scan import lanes


def test_two_sum_leaves_nothing_out():
    rng = np.random.default_rng(0)
    a = rng.normal(size=200).astype(np.float32) * 10.0 ** rng.integers(-6, 7, 200)
    b = rng.normal(size=200).astype(np.float32) * 10.0 ** rng.integers(-6, 7, 200)
    a, b = a.astype(np.float32), b.astype(np.float32)
    total, rest = jax.jit(lanes.two_sum)(a, b)
    np.testing.assert_array_equal(total, a + b)
    for parts in zip(a, b, total, rest, strict=True):
        x, y, s, e = (Fraction(float(part)) for part in parts)
        assert x + y == s + e


def test_two_sum_has_the_derivative_of_a_sum():
    def value(a, b):
        total, rest = lanes.two_sum(a, b)
        return 2.0 * total + 2.0 * rest

    assert jax.grad(value, (0, 1))(1e8, 1.0) == (2.0, 2.0)


def test_products_near_the_identity():
    rng = np.random.default_rng(1)
    a = np.diag([1.0, 0.6, 2.0, -1.0, 0.0]) + 0.1 * rng.normal(size=(5, 5)) * (1 - np.eye(5))
    near, rest = lanes.split_identity(jnp.asarray(a))
    np.testing.assert_array_equal(near, [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(np.diag(near) + rest, a)
    b = rng.normal(size=(5, 3, 7))
    expected = np.einsum("ij,jkl->ikl", a, b)
    np.testing.assert_allclose(jax.jit(lanes.advance)(a, b), expected, rtol=1e-13, atol=1e-13)


def test_a_slow_recurrence_does_not_drift_in_float32():
    """A rotation by 1e-3 keeps lengths over 2,000 products to a few roundings, not to 2,000."""
    angle = np.float32(1e-3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    single = jnp.asarray(turn, jnp.float32)
    exact = np.asarray(single, np.float64)

    def step(x, _):
        return lanes.advance(single, x), None

    got = jax.lax.scan(step, jnp.eye(2, dtype=jnp.float32), None, length=2000)[0]
    expected = np.linalg.matrix_power(exact, 2000)
    # A random walk of roundings: sqrt(2000) eps, where rounding each product would give more.
    assert np.max(np.abs(got - expected)) < 45 * np.finfo(np.float32).eps


def test_materialize_changes_nothing_and_can_be_transposed():
    def value(x):
        y = lanes.materialize(lanes.product(x, x))
        return jnp.sum(lanes.materialize(lanes.product(y, x)) ** 2)

    def plain(x):
        return jnp.sum(jnp.einsum("ijl,jkl,kml->iml", x, x, x) ** 2)

    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3, 4)))
    np.testing.assert_allclose(jax.jit(jax.grad(value))(x), jax.grad(plain)(x), rtol=1e-12)
    batch = jnp.stack((x, 2 * x))
    np.testing.assert_allclose(
        jax.jit(jax.vmap(value))(batch), [plain(x), plain(2 * x)], rtol=1e-12
    )


@pytest.mark.parametrize("size", [1, 4, 16, 24, 25])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_congruence_and_its_derivative(size, shape):
    """Single matrices are written out up to 24, where the derivative is a rule of its own."""
    rng = np.random.default_rng(3)
    a, square = rng.normal(size=(2, size, size, *shape))
    p = square + np.swapaxes(square, 0, 1)

    def plain(a, p):
        half = jnp.einsum("ij...,jk...->ik...", p, a)
        return half, jnp.einsum("ji...,jk...->ik...", a, half)

    def value(function, a, p):
        return sum(jnp.sum(jnp.sin(part)) for part in function(a, p))

    close = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
    jax.tree.map(close, jax.jit(lanes.congruence)(a, p), plain(a, p))
    got = jax.jit(jax.grad(partial(value, lanes.congruence), (0, 1)))(a, p)
    # P may be read as its own transpose: only the symmetric part of its derivative counts.
    expected = jax.grad(partial(value, plain), (0, 1))(a, p)
    close(got[0], expected[0])
    close(*(part[1] + np.swapaxes(part[1], 0, 1) for part in (got, expected)))
    batch = jax.jit(jax.vmap(lanes.congruence, in_axes=(0, None)))(np.stack((a, 2 * a)), p)
    close(batch[1][1], 4 * plain(a, p)[1])
