"""Affine recurrences against a loop and against differentiating `lax.scan`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax import Associative, Blocked, Sequential, affine_scan

BACKENDS = [Sequential(), Associative(), Blocked(4)]


def problem(length, *, diagonal, seed=0):
    rng = np.random.default_rng(seed)
    shape = (length, 3) if diagonal else (length, 3, 3)
    transition = rng.uniform(-0.6, 0.6, shape)
    return transition, rng.normal(size=(length, 3)), rng.normal(size=3)


def loop(transition, offset, state, reverse):
    states = np.zeros_like(offset)
    order = range(len(offset))
    for t in reversed(order) if reverse else order:
        a = np.diag(transition[t]) if transition.ndim == 2 else transition[t]
        state = a @ state + offset[t]
        states[t] = state
    return states


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_equals_a_loop(backend, length, diagonal, reverse):
    transition, offset, start = problem(length, diagonal=diagonal)
    got = affine_scan(
        *map(jnp.asarray, (transition, offset, start)), reverse=reverse, backend=backend
    )
    np.testing.assert_allclose(
        got, loop(transition, offset, start, reverse), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_gradient_equals_that_of_lax_scan(backend, diagonal):
    arguments = tuple(map(jnp.asarray, problem(12, diagonal=diagonal)))

    def reference(transition, offset, start):
        def step(h, x):
            a, b = x
            h = (a * h if diagonal else a @ h) + b
            return h, h

        return jax.lax.scan(step, start, (transition, offset))[1]

    def loss(states):
        return jnp.sum(jnp.sin(states))

    gradient = jax.grad(lambda *a: loss(affine_scan(*a, backend=backend)), (0, 1, 2))
    got = jax.jit(gradient)(*arguments)
    expected = jax.grad(lambda *a: loss(reference(*a)), (0, 1, 2))(*arguments)
    chex.assert_trees_all_close(got, expected, rtol=1e-11, atol=1e-12)

    def tangent(*a):
        return jax.jvp(lambda *b: affine_scan(*b, backend=backend), a, a)[1]

    forward = jax.jit(tangent)(*arguments)
    chex.assert_trees_all_close(
        forward, jax.jvp(reference, arguments, arguments)[1], rtol=1e-11, atol=1e-12
    )


def test_dtypes_are_promoted_and_nan_spreads_forward_only():
    transition, offset, _ = problem(6, diagonal=True)
    got = affine_scan(jnp.asarray(transition, jnp.float32), jnp.asarray(offset))
    assert got.dtype == jnp.float64
    spoiled = affine_scan(jnp.asarray(transition), jnp.asarray(offset).at[3].set(jnp.nan))
    assert np.array_equal(np.isnan(spoiled).any(1), [False] * 3 + [True] * 3)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused():
    transition, offset, _ = map(jnp.asarray, problem(6, diagonal=False))
    with pytest.raises(ValueError, match=r"transition must be \(T, D, D\)"):
        affine_scan(transition[:5], offset)
    with pytest.raises(ValueError, match=r"initial_state must be \(3,\)"):
        affine_scan(transition, offset, jnp.zeros(2))
    with pytest.raises(ValueError, match="T = 0"):
        affine_scan(transition[:0], offset[:0])
