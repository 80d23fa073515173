"""Where depth counts: plain Newton steps and windows side by side."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import elkax
from elkax.scan import linear_recurrence
from recurrences import recurrence_problems as problems
from recurrences.recurrence_problems import errors

TOLERANCE = np.finfo(float).eps ** 0.75


def network(gain, seed):
    """A tanh network of twenty units, T = 300."""
    rng = np.random.default_rng(seed)
    u = jnp.asarray(gain * rng.normal(size=(20, 20)) / np.sqrt(20))
    inputs = jnp.asarray(0.1 * rng.normal(size=(300, 20)))
    return problems.Problem(Partial(_step, u), jnp.zeros(20), inputs, 300)


def _step(u, state, x):
    return jnp.tanh(u @ state + x)


@jax.jit
def plain_newton(cell, start, inputs):
    """Iterations of Newton's method on the whole trajectory; what is not finite starts again."""

    def values(states):
        before = jnp.concatenate((start[None], states[:-1]))
        return before, jax.vmap(cell)(before, inputs)

    def body(carry):
        states, count, _ = carry
        before, new = values(states)
        jacobians = jax.vmap(jax.jacfwd(cell))(before, inputs).at[0].set(0.0)
        states = states + linear_recurrence(jacobians, new - states)
        states = jnp.where(jnp.isfinite(states), states, start)
        new = values(states)[1]
        size = jnp.max(jnp.abs(jnp.stack((new, new - states))), axis=-1)
        known = jnp.maximum(jax.lax.cummax(size[0]), jnp.max(jnp.abs(start)))
        return states, count + 1, jnp.all(size[1] <= TOLERANCE * known)

    states = jnp.broadcast_to(start, (len(inputs), len(start)))
    start_ = (states, 0, jnp.asarray(False))
    return jax.lax.while_loop(lambda c: ~c[2] & (c[1] < 400), body, start_)[1:]


@partial(jax.jit, static_argnames="options")
def evaluate(problem, options=()):
    options = {"method": elkax.DEER(), "error_tolerance": float("inf")} | dict(options)
    return elkax.evaluate_recurrence(*problem, **options)


def lorenz96(seed, length):
    rng, problem = np.random.default_rng(seed), problems.lorenz96(length)
    state = problem.state if seed == 0 else 8 + jnp.asarray(rng.normal(size=5))
    return problem._replace(state=state, inputs=jnp.zeros((length, 0)))


@pytest.mark.parametrize("gain, seed", [(1.0, 0), (1.0, 2), (1.5, 0), (1.5, 2), (2.0, 0)])
def test_no_more_iterations_than_plain_newton(gpu, gain, seed):
    """In windows of 48 alone: 6, 39, 48, 248, 65."""
    problem = network(gain, seed)
    count, arrived = plain_newton(*problem[:3])
    states, info = evaluate(problem[:3])
    print(f"gain {gain}: plain {count}, side by side {info.iterations}")
    assert arrived and info.status == elkax.Status.CONVERGED
    # Rounding alone changes the number of plain steps by more in chaos.
    assert info.iterations <= 1.1 * count
    assert np.max(errors(states, problem.scan())) <= 1e-7


@pytest.mark.parametrize("length", [300, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lorenz96_in_windows_beside(gpu, seed, length):
    """Plain steps take 43 to 64 at T = 300, 185 to 201 at T = 1000."""
    problem = lorenz96(seed, length)
    states, info = evaluate(problem[:3])
    print(f"T = {length}: {info.iterations}")
    assert info.status == elkax.Status.CONVERGED and info.prefix == length
    assert info.iterations <= (35 if length == 300 else 100) and info.resets >= 1
    assert np.max(errors(states, problem.scan())) < 1e-6


def test_history_and_limit(gpu):
    """What is said is of the one that got further."""
    problem = lorenz96(0, 300)
    info = evaluate(problem[:3], (("history", True), ("max_iters", 15))).info
    assert info.status == elkax.Status.MAX_ITERS and info.iterations == 15
    prefix = info.history.prefix
    assert prefix[15] == info.prefix and np.all(np.diff(prefix[:16]) >= 0)
    assert np.nanmax(info.history.residual[15]) > TOLERANCE


def test_overflow(gpu):
    """A recurrence that ends: from the first state that is not finite on all are NaN."""
    inputs = jnp.where(jnp.arange(300)[:, None] < 200, 0.2, 3.0)
    problem = problems.Problem(Partial(lambda s, x: s * s + x), jnp.zeros(1), inputs, 300)
    states, info = evaluate(problem[:3])
    exact = np.asarray(problem.scan())
    first = int(np.argmin(np.isfinite(exact[:, 0])))
    assert info.status == elkax.Status.NONFINITE and info.prefix == first
    np.testing.assert_allclose(states[:first], exact[:first], rtol=1e-9)
    assert np.all(np.isnan(states[first:]))


def test_a_batch(gpu):
    """Each as if alone; a calm one beside."""
    several = [lorenz96(0, 300), lorenz96(1, 300)]
    calm = several[0]._replace(state=jnp.full(5, 8.0))
    stacked = jnp.stack([p.state for p in [*several, calm]])
    found = jax.vmap(lambda s: evaluate((several[0].cell, s, several[0].inputs)))(stacked)
    for i, problem in enumerate([*several, calm]):
        alone = evaluate(problem[:3])
        assert found.info.status[i] == elkax.Status.CONVERGED
        assert abs(int(found.info.iterations[i]) - int(alone.info.iterations)) <= 2


def test_explained():
    rng = np.random.default_rng(0)
    words = elkax.explain(
        _chaos, jnp.zeros(3), jnp.asarray(rng.normal(size=(300, 3))), platform="gpu"
    )
    assert "windows of 48" in words and "side by side" in words


def _chaos(state, x):
    return jnp.tanh(2 * state + x)
