"""Linear recurrences against a loop and against differentiating `lax.scan`."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax import Associative, Blocked, Sequential, linear_recurrence

BACKENDS = [Sequential(), Associative(4), Blocked(4)]
KINDS = {"diagonal": (False, False), "dense": (True, False), "complex": (False, True)}
KINDS["dense complex"] = (True, True)


def problem(length, *, dense, complex_, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        real = rng.uniform(-0.6, 0.6, shape)
        return real + 1j * rng.uniform(-0.6, 0.6, shape) if complex_ else real

    decay = draw(length, 3, 3) if dense else draw(length, 3)
    return decay, draw(length, 3), draw(3)


def loop(decay, increment, start, *, resets=None, length=None, reverse=False):
    """h_t, t = 1, ..., T, one step after the other."""
    states = np.zeros_like(increment)
    count = len(increment)
    order = range(count)[::-1] if reverse else range(count)
    state = start
    for t in order:
        if length is None or t < length:
            if resets is not None and resets[t]:
                state = start
            a = np.diag(decay[t]) if decay.ndim == 2 else decay[t]
            state = a @ state + increment[t]
        states[t] = state
    return states


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_equals_a_loop(backend, kind, reverse):
    dense, complex_ = KINDS[kind]
    for count in (1, 2, 33):
        arguments = problem(count, dense=dense, complex_=complex_)
        run = partial(linear_recurrence, reverse=reverse, backend=backend)
        got = run(*arguments)
        assert got.dtype == (complex if complex_ else float)
        np.testing.assert_allclose(got, loop(*arguments, reverse=reverse), rtol=1e-12, atol=1e-13)
    rng = np.random.default_rng(1)
    resets = rng.uniform(size=33) < 0.2
    assert resets.any()
    run = jax.jit(run)
    for length in (33, 20, 1, 0):
        got = run(*arguments, resets=resets, length=length)
        expected = loop(*arguments, resets=resets, length=length, reverse=reverse)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


def reference(decay, increment, start, resets, length, *, reverse):
    count = len(increment)

    def step(h, x):
        a, b, reset, valid = x
        before = jnp.where(reset, start, h)
        new = (a * before if a.ndim == 1 else a @ before) + b
        h = jnp.where(valid, new, h)
        return h, h

    valid = jnp.arange(count) < length
    return jax.lax.scan(step, start, (decay, increment, resets, valid), reverse=reverse)[1]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_derivatives_equal_those_of_lax_scan(backend, kind, reverse):
    dense, complex_ = KINDS[kind]
    arguments = tuple(map(jnp.asarray, problem(12, dense=dense, complex_=complex_)))
    resets, length = jnp.arange(12) % 5 == 3, 10

    def ours(*a):
        return linear_recurrence(*a, resets=resets, length=length, reverse=reverse, backend=backend)

    def theirs(*a):
        return reference(*a, resets, length, reverse=reverse)

    @partial(jax.jit, static_argnums=0)
    def derivatives(function, *a):
        def loss(*a):
            states = function(*a)
            return jnp.sum(jnp.sin(states.real) + jnp.cos(states.imag))

        gradient = jax.grad(loss, (0, 1, 2))
        # Forward over reverse.
        return *jax.jvp(gradient, a, a), jax.jvp(function, a, a)[1]

    got, expected = derivatives(ours, *arguments), derivatives(theirs, *arguments)
    chex.assert_trees_all_close(got, expected, rtol=1e-11, atol=1e-12)


def test_a_gradient_is_one_more_recurrence_that_keeps_decay_and_states():
    decay, increment, start = map(jnp.asarray, problem(50, dense=False, complex_=False))
    _, pullback = jax.vjp(partial(linear_recurrence, backend=Sequential()), decay, increment, start)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= 50]
    assert len(kept) <= 3
    lowered = jax.jit(pullback).lower(increment).as_text()
    assert lowered.count("stablehlo.while") == 1


def test_batches():
    arguments = [
        np.stack(p)
        for p in zip(
            *(problem(9, dense=False, complex_=False, seed=i) for i in range(10)), strict=True
        )
    ]
    lengths = np.array([0, 1, 5, 9, 9, 3, 2, 8, 7, 6])
    resets = np.random.default_rng(2).uniform(size=(10, 9)) < 0.3

    def run(*a):
        decay, increment, start, resets, length = a
        return linear_recurrence(decay, increment, start, resets=resets, length=length)

    every = [*arguments, resets, lengths]
    got = jax.vmap(run)(*every)
    for i, states in enumerate(got):
        expected = loop(*(a[i] for a in arguments), resets=resets[i], length=lengths[i])
        np.testing.assert_allclose(states, expected, rtol=1e-12, atol=1e-13)
    # Resets differ, everything else is the same.
    got = jax.vmap(lambda r: run(*(a[0] for a in arguments), r, 9))(jnp.asarray(resets))
    for i, states in enumerate(got):
        expected = loop(*(a[0] for a in arguments), resets=resets[i])
        np.testing.assert_allclose(states, expected, rtol=1e-12, atol=1e-13)


def test_states_of_any_shape():
    rng = np.random.default_rng(3)
    decay, increment = rng.uniform(size=(2, 7, 4, 2))
    got = linear_recurrence(decay, increment, increment[0])
    flat = loop(decay.reshape(7, 8), increment.reshape(7, 8), increment[0].reshape(8))
    np.testing.assert_allclose(got, flat.reshape(7, 4, 2), rtol=1e-13)
    got = linear_recurrence(decay[:, 0, 0], increment[:, 0, 0])
    expected = loop(decay[:, :1, 0], increment[:, :1, 0], np.zeros(1))
    np.testing.assert_allclose(got, expected[:, 0], rtol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_accumulated_in_float32(dtype):
    """A mean over 2,000 steps: increments below half a unit in the last place of the state."""
    decay = jnp.full((2000, 1), 0.998, dtype)
    increment = jnp.full((2000, 1), 0.002, dtype)
    got = linear_recurrence(decay, increment)
    assert got.dtype == dtype
    expected = loop(*(np.asarray(x, np.float64) for x in (decay, increment)), np.zeros(1))
    # One rounding at the end.
    tolerance = 0.51 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=tolerance, atol=1e-6)


def test_dtypes_are_promoted():
    decay, increment, _ = problem(6, dense=False, complex_=False)
    got = linear_recurrence(jnp.asarray(decay, jnp.float32), increment)
    assert got.dtype == jnp.float64
    got = linear_recurrence(jnp.asarray(decay, jnp.complex64), jnp.asarray(increment, jnp.float32))
    assert got.dtype == jnp.complex64


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_what_is_not_finite_spreads_forward_up_to_a_reset(backend):
    decay, increment, start = map(jnp.asarray, problem(9, dense=False, complex_=False))
    spoiled = increment.at[3].set(jnp.nan)
    got = linear_recurrence(decay, spoiled, backend=backend)
    assert np.array_equal(np.isnan(got).any(1), [False] * 3 + [True] * 6)
    resets = jnp.arange(9) == 6

    def last(increment):
        run = partial(linear_recurrence, resets=resets, backend=backend)
        states = run(decay, increment, start)
        return jnp.sum(states[6:]), states

    gradient, states = jax.jit(jax.grad(last, has_aux=True))(spoiled)
    assert np.array_equal(np.isnan(states).any(1), [False] * 3 + [True] * 3 + [False] * 3)
    assert np.all(gradient[:6] == 0) and np.all(gradient[6:] != 0)


def test_padding_is_not_looked_at():
    decay, increment, start = map(jnp.asarray, problem(9, dense=True, complex_=False))
    padded = decay.at[5:].set(jnp.nan), increment.at[5:].set(jnp.inf)

    def loss(decay, increment):
        return jnp.sum(linear_recurrence(decay, increment, start, length=5))

    value, gradient = jax.value_and_grad(loss, (0, 1))(*padded)
    expected, exact = jax.value_and_grad(loss, (0, 1))(decay, increment)
    assert value == expected and np.isfinite(value)
    chex.assert_trees_all_equal(gradient, exact)


DECAY, INCREMENT, START = problem(6, dense=True, complex_=False)
DIAGONAL = DECAY[:, 0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((DECAY[:5], INCREMENT), {}, ValueError, r"decay must .*\(6, 3\).*\(5, 3, 3\)"),
        ((DECAY[:, :2], INCREMENT), {}, ValueError, r"decay must .*\(6, 2, 3\)"),
        ((DIAGONAL[:, :2], INCREMENT), {}, ValueError, r"decay must .*\(6, 2\)"),
        ((DIAGONAL[:, 0], INCREMENT), {}, ValueError, r"decay must .*\(6,\)"),
        ((DIAGONAL, INCREMENT[:, 0]), {}, ValueError, r"increment must .*\(6,\).*\(6, 3\)"),
        ((0.5, 1.0), {}, ValueError, r"increment must"),
        ((DECAY, INCREMENT, START[:2]), {}, ValueError, r"initial_state must be \(3,\).*\(2,\)"),
        ((DECAY[:0], INCREMENT[:0]), {}, ValueError, "T = 0"),
        ((DIAGONAL, np.ones((6, 3), int)), {}, TypeError, "increment must .*int64"),
        ((np.ones((6, 3), int), INCREMENT), {}, TypeError, "decay must .*int64"),
        ((DIAGONAL, INCREMENT, np.zeros(3, int)), {}, TypeError, "initial_state must .*int64"),
        ((DIAGONAL, INCREMENT), {"resets": np.zeros(5, bool)}, ValueError, r"resets must .*\(5,\)"),
        ((DIAGONAL, INCREMENT), {"resets": np.zeros(6)}, TypeError, "resets must be bools"),
        ((DIAGONAL, INCREMENT), {"length": 7}, ValueError, "length must lie in .*got 7"),
        ((DIAGONAL, INCREMENT), {"length": -1}, ValueError, "length must lie in .*got -1"),
        ((DIAGONAL, INCREMENT), {"length": 2.0}, TypeError, "length must be an integer"),
        ((DIAGONAL, INCREMENT), {"length": [2, 3]}, ValueError, "length must be one .*vmap"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_recurrence(*arguments, **options)
