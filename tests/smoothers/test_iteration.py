"""The iteration driver on scalar fixed points: how it stops, and what it then returns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.smoothers.iteration import Progress, Status, Tolerance, iterate

TOLERANCE = Tolerance(1e-10, 1e-10)


def newton(target, x):
    """One Newton step for x^2 = target; not finite below zero."""
    new = 0.5 * (x + target / x)
    step = jnp.abs(new - x)
    finite = jnp.isfinite(new) & (target > 0)
    return new, Progress(finite, step, step, jnp.asarray(False), jnp.asarray(False), new)


@partial(jax.jit, static_argnames="history")
def root(target, start, max_iters, history=0):
    return iterate(
        partial(newton, target), start, max_iters=max_iters, tolerance=TOLERANCE, history=history
    )


def test_converges_and_counts():
    x, outcome = root(2.0, 1.0, 50)
    assert outcome.status == Status.CONVERGED
    np.testing.assert_allclose(x, np.sqrt(2), rtol=1e-15)
    # 1, 1.5, 1.4167, 1.414216, 1.4142135623747, 1.41421356237309...: then a step of 1e-12.
    assert outcome.iterations == 5
    assert outcome.last == x


@pytest.mark.parametrize("max_iters", [0, 1, 3])
def test_stops_at_the_limit(max_iters):
    """The limit is traced: one program for all of them."""
    x, outcome = root(2.0, 1.0, max_iters)
    assert outcome.status == Status.MAX_ITERS and outcome.iterations == max_iters
    np.testing.assert_allclose(x, [1.0, 1.5, 17 / 12, 577 / 408][max_iters], rtol=1e-15)


def test_converging_on_the_last_allowed_step_counts():
    assert root(2.0, 1.0, 5)[1].status == Status.CONVERGED


def test_history():
    _, outcome = root(2.0, 1.0, 8, history=8)
    np.testing.assert_allclose(outcome.history[:2], [1.5, 17 / 12], rtol=1e-15)
    assert np.all(np.isnan(outcome.history[5:])) and not np.any(np.isnan(outcome.history[:5]))


def test_a_step_that_is_not_finite_is_not_taken():
    """NaN compares false with every tolerance, and must never count as converged."""
    for target, start in ((-1.0, 1.0), (np.nan, 2.0), (2.0, np.nan)):
        x, outcome = root(target, start, 50)
        assert outcome.status == Status.NONFINITE and outcome.iterations == 1
        np.testing.assert_equal(np.asarray(x), start)


def test_every_sequence_of_a_batch_stops_by_itself():
    targets = jnp.array([2.0, 1.0, -3.0, 1e8])
    x, outcome = jax.jit(jax.vmap(lambda t: root(t, 1.0, 30)))(targets)
    np.testing.assert_array_equal(outcome.status, [0, 0, 2, 0])
    alone = [root(target, 1.0, 30)[1].iterations for target in targets]
    np.testing.assert_array_equal(outcome.iterations, alone)
    np.testing.assert_allclose(x, [np.sqrt(2), 1.0, 1.0, 1e4], rtol=1e-14)


@pytest.mark.parametrize(
    "settled, stalled, expected",
    [(True, False, Status.CONVERGED), (False, True, Status.STALLED)],
)
def test_a_step_may_say_that_it_is_over(settled, stalled, expected):
    def step(x):
        flags = jnp.asarray(settled), jnp.asarray(stalled)
        return x + 1.0, Progress(jnp.asarray(True), jnp.ones(()), jnp.ones(()), *flags, x)

    x, outcome = iterate(step, jnp.zeros(()), max_iters=10, tolerance=TOLERANCE)
    assert outcome.status == expected and outcome.iterations == 1 and x == 1.0


def test_both_tolerances_count():
    """A small step is not enough while the cost still moves."""

    def step(x):
        no = jnp.asarray(False)
        return x + 1.0, Progress(jnp.asarray(True), jnp.zeros(()), 1.0 / x, no, no, x)

    _, outcome = iterate(step, jnp.ones(()), max_iters=20, tolerance=Tolerance(1e-3, 0.1))
    assert outcome.status == Status.CONVERGED and outcome.iterations == 10
