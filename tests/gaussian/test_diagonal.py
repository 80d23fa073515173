"""The Kalman filter whose coordinates do not mix, against NumPy and against the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from elkax.gaussian.diagonal import DiagonalKalmanFilter, DiagonalStep
from elkax.linearize import Diagonal, Full
from elkax.scan import run

T, D = 12, 3
BACKENDS = [elkax.Sequential(), elkax.Associative(), elkax.Blocked(4)]


def steps(seed=0, scale=1.2):
    rng = np.random.default_rng(seed)
    noise = np.where(np.arange(T)[:, None] % 3, rng.uniform(0.0, 2.0, (T, D)), 0.0)
    return rng.uniform(-scale, scale, (T, D)), rng.normal(size=(T, D)), noise


def filtered(weights, offset, noise, mean, variance):
    """Predict, then condition on an observation of zero with variance one."""
    means, variances = [], []
    for a, b, q in zip(weights, offset, noise, strict=True):
        mean, variance = a * mean + b, a**2 * variance + q
        gain = variance / (variance + 1)
        mean, variance = mean - gain * mean, variance - gain * variance
        means.append(mean)
        variances.append(variance)
    return np.stack(means), np.stack(variances)


def run_filter(xs, state, backend):
    return run(
        DiagonalKalmanFilter(D),
        state,
        DiagonalStep(*(jnp.asarray(x) for x in xs)),
        backend=backend,
        state_dim=D,
        recurrence="affine",
    )


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_against_numpy(backend):
    mean, variance = np.array([1.0, -2.0, 0.0]), np.array([0.0, 0.5, 4.0])
    (last, spread), (means, variances) = run_filter(
        steps(), (jnp.asarray(mean), jnp.asarray(variance)), backend
    )
    expected = filtered(*steps(), mean, variance)
    # Twelve steps, every gain at most one.
    np.testing.assert_allclose(means, expected[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(variances, expected[1], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal([last, spread], [means[-1], variances[-1]])


@pytest.mark.parametrize("backend", BACKENDS[:2], ids=str)
def test_without_noise_it_is_the_affine_recurrence(backend):
    weights, offset, _ = steps(1)
    zero = jnp.zeros(D)
    _, (means, variances) = run_filter((weights, offset, 0 * offset), (zero, zero), backend)
    expected = [offset[0]]
    for t in range(1, T):
        expected.append(weights[t] * expected[-1] + offset[t])
    np.testing.assert_allclose(means, np.stack(expected), rtol=1e-11, atol=1e-12)
    np.testing.assert_array_equal(variances, 0.0)


def test_against_the_dense_filter():
    weights, offset, noise = (jnp.asarray(x) for x in steps(2))
    # `filter` starts at zero, whatever the first transition is.
    means, variances = Diagonal().filter(weights, offset, noise, elkax.Sequential())
    dense = jax.vmap(jnp.diag)(weights)
    expected, covs = Full().filter(dense, offset, noise, elkax.Sequential())
    np.testing.assert_allclose(means, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(jnp.diag)(variances), covs, rtol=1e-10, atol=1e-12)


def test_float32():
    """Noise of 1e12 and transitions of 1e3: variances stay in [0, 1]."""
    weights, offset, noise = steps(3, 1e3)
    noise = np.where(np.arange(T)[:, None] % 2, 1e12, 1e-12) * np.ones(D)
    single = [np.asarray(x, np.float32) for x in (weights, offset, noise)]
    zero = jnp.zeros(D, jnp.float32)
    _, (means, variances) = run_filter(single, (zero, zero), elkax.Associative())
    assert means.dtype == jnp.float32
    expected = filtered(*[np.asarray(x, float) for x in single], np.zeros(D), np.zeros(D))
    # A mean is a sum of terms of the size of the offsets, and rounding is 6e-8 of them.
    np.testing.assert_allclose(means, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(variances, expected[1], rtol=1e-5)
