"""More than sixteen states: derivatives and bounds where sequential ones are finite."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import elkax
from recurrences import recurrence_problems as problems
from recurrences.recurrence_problems import errors

METHODS = {"DEER": elkax.DEER(), "quasi-DEER": elkax.QuasiDEER()}


def step(u, state, x):
    return jnp.tanh(u @ state + x)


def network(gain, seed, size=20, length=300, dtype=jnp.float64):
    """A tanh network at the edge of chaos and beyond."""
    rng = np.random.default_rng(seed)
    u = gain * rng.normal(size=(size, size)) / np.sqrt(size)
    x = 0.1 * rng.normal(size=(length, size))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (u, np.zeros(size), x))


def loss(u, state, x, *, method=None, **options):
    cell = Partial(step, u)
    if method is None:
        return jnp.sum(jnp.sin(problems.sequential(cell, state, x))), None
    solution = elkax.evaluate_recurrence(cell, state, x, method=method, **options)
    return jnp.sum(jnp.sin(solution.states)), solution


@partial(jax.jit, static_argnames=("method", "error_tolerance"))
def gradient(point, **options):
    return jax.grad(partial(loss, **options), (0, 1, 2), has_aux=True)(*point)


def relative_error(got, exact):
    """Relative to the largest entry of all."""
    got, exact = jax.tree.leaves(got), jax.tree.leaves(exact)
    largest = max(float(np.max(np.abs(leaf))) for leaf in exact)
    gaps = [float(np.max(np.abs(a - b))) for a, b in zip(got, exact, strict=True)]
    return max(gaps) / largest


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "gain, seed", [(1.0, 0), (1.0, 2), (1.5, 1), (1.5, 2), (2.0, 0), (2.0, 1), (2.0, 2)]
)
def test_gradients_of_a_network_in_chaos(gain, seed, method):
    """The adjoint is up to 1e10 times its right-hand side: a residual is small beside that."""
    point = network(gain, seed)
    got, solution = gradient(point, method=METHODS[method])
    exact, _ = gradient(point)
    bound = solution.info.error_bound
    gap = errors(solution.states, problems.sequential(Partial(step, point[0]), *point[1:]))
    assert np.all(gap <= bound) and np.max(bound) < 1e-3
    # One of them stretches an error of one rounding to 1e-5.
    assert relative_error(got, exact) <= (1e-3 if (gain, seed) == (2.0, 1) else 1e-9)


def test_gradients_in_float32():
    got, solution = gradient(network(1.0, 0, dtype=jnp.float32), method=elkax.QuasiDEER())
    exact, _ = gradient(network(1.0, 0))
    assert np.all(np.isfinite(solution.info.error_bound))
    assert relative_error(got, exact) <= 1e-4


def test_gradients_of_a_very_wide_state():
    point = network(1.5, 3, size=256, length=40)
    got, solution = gradient(point, method=elkax.QuasiDEER())
    assert solution.info.status == elkax.Status.CONVERGED
    assert relative_error(got, gradient(point)[0]) <= 1e-10


def test_forward_mode_where_the_iteration_does_not_arrive():
    """Three iterations are too few, so that whole Jacobians take over: for each of a batch."""
    point = network(1.0, 1, length=60)
    directions = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(4).normal(size=(3, *leaf.shape))), point
    )

    def slope(direction, **options):
        return jax.jvp(lambda *p: loss(*p, **options)[0], point, direction)[1]

    options = {"method": elkax.QuasiDEER(), "gradient": elkax.MatrixFree(max_iters=3)}
    got = jax.jit(jax.vmap(partial(slope, **options)))(directions)
    np.testing.assert_allclose(got, jax.jit(jax.vmap(slope))(directions), rtol=1e-9)


def amplify(factor, state, x):
    return factor * state + x * (1.0 - state)


@pytest.mark.parametrize("method", METHODS)
def test_products_of_jacobians_that_overflow(method):
    """The solution does not: the loss is one of the first steps, and all that follows is zero."""

    def early(factor, x, method):
        cell, start = Partial(amplify, factor), jnp.zeros(20)
        if method is None:
            return jnp.sum(problems.sequential(cell, start, x)[:3])
        # Blocks of 200 steps, whose products are 1e600.
        options = {"backend": elkax.Blocked(4), "error_tolerance": float("inf")}
        return jnp.sum(
            elkax.evaluate_recurrence(cell, start, x, method=method, **options).states[:3]
        )

    point = jnp.asarray(1e3), jnp.zeros((800, 20))
    got, exact = (
        jax.jit(jax.grad(partial(early, method=m), (0, 1)))(*point) for m in (METHODS[method], None)
    )
    assert np.all(np.isfinite(exact[1]))
    assert relative_error(got, exact) <= 1e-12
