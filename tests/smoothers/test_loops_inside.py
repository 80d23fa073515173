"""Functions that hold a loop of unknown length, as an implicit integrator: no reverse mode."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_probability.substrates.jax.distributions as tfd

import elkax
from nonlinear_problems import gaussian_params, simulate

T = 10


def improved(x, z, k):
    """Newton's method for the implicit Euler step x = z - 0.4 k sin x."""
    return x - (x - z + 0.4 * k * jnp.sin(x)) / (1 + 0.4 * k * jnp.cos(x))


def implicit(z, k=1.0):
    def going(carry):
        return jnp.max(jnp.abs(carry[0] - carry[1])) > 1e-6

    start = (improved(z, z, k), z)
    x, _ = jax.lax.while_loop(going, lambda c: (improved(c[0], z, k), c[0]), start)
    # Two more steps have the first and the second derivatives of the root.
    return improved(improved(x, z, k), z, k)


def unrolled(z, k=1.0):
    return jax.lax.scan(lambda x, _: (improved(x, z, k), None), z, length=8)[0]


def gaussian(dynamics):
    return gaussian_params([0.5], [[0.3]], dynamics, [[0.05]], jnp.sin, [[0.1]])


def counts(dynamics):
    def distribution(z):
        return tfd.Poisson(log_rate=2 * dynamics(z))

    return elkax.ParamsDistributionSSM(*gaussian(dynamics)[:4], distribution)


@cache
def data(model):
    y = simulate(gaussian(unrolled), T, 4)[1]
    return jnp.asarray(y if model is gaussian else np.round(np.exp(2 * y)))


@pytest.mark.parametrize("model", [gaussian, counts])
def test_value_needs_no_reverse_mode(model):
    """The smoother and Laplace's value are those of the functions without such a loop."""
    results = []
    for params in map(model, (implicit, unrolled)):
        solution = elkax.iterated_smoother(params, data(model))
        assert int(solution.info.status) == elkax.Status.CONVERGED
        value = elkax.laplace_log_prob(params, data(model), trajectory=solution.trajectory)
        results.append((solution.trajectory, value))
    (means, value), (expected, wanted) = results
    np.testing.assert_allclose(means, expected, atol=1e-6)
    np.testing.assert_allclose(value, wanted, rtol=1e-8)


def test_derivative_in_forward_mode():
    """The derivative in a parameter, which a loop has in forward mode alone."""

    def value(dynamics, k):
        params = gaussian(lambda z: dynamics(z, k))
        trajectory = elkax.iterated_smoother(params, data(gaussian)).trajectory
        return elkax.laplace_log_prob(params, data(gaussian), trajectory=trajectory)

    ours = jax.jit(jax.jacfwd(lambda k: value(implicit, k)))(1.0)
    expected = jax.jit(jax.grad(lambda k: value(unrolled, k)))(1.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@jax.custom_jvp
def slope(z):
    return jnp.cos(z)


@slope.defjvp
def _slope_jvp(primals, tangents):
    raise AssertionError("second derivative")


@jax.custom_jvp
def sine(z):
    return jnp.sin(z)


@sine.defjvp
def _sine_jvp(primals, tangents):
    return sine(*primals), slope(*primals) * tangents[0]


def test_second_derivatives_are_traced_where_they_are_used():
    """Neither by Gauss-Newton steps, nor for a gradient that nobody asks for."""

    def trace(damping):
        params = gaussian(sine)
        jax.eval_shape(
            lambda y: elkax.iterated_smoother(params, y, damping=damping), data(gaussian)
        )

    trace(elkax.GaussNewton())
    trace(elkax.LevenbergMarquardt(second_order=False))
    with pytest.raises(AssertionError, match="second derivative"):
        trace(elkax.LevenbergMarquardt())
