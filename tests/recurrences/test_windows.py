"""Windows, restarted tails, frozen heads, ragged batches, reversed time, fallbacks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import elkax
from elkax import Status
from recurrences import recurrence_problems as problems
from recurrences.recurrence_problems import Problem, T, errors

PROBLEM = problems.gru()
INFINITY = float("inf")


def run(problem, **options):
    """Without an error bound, whose program is as long as the rest."""
    return problem.evaluate(**({"error_tolerance": INFINITY} | options))


def check(problem, solution, **options):
    assert solution.info.status == Status.CONVERGED
    assert solution.info.prefix == problem.length
    # The default tolerance of 2e-12 on the residual, in a recurrence that contracts.
    assert np.max(errors(solution.states, problem.scan(**options))) <= 1e-11


@pytest.mark.parametrize(
    "method, window",
    [
        (elkax.DEER(), 1),
        (elkax.DEER(), 7),
        (elkax.QuasiELK(), 16),
        (elkax.Jacobi(), 16),
    ],
    ids=str,
)
def test_windows(method, window):
    solution = run(PROBLEM, method=method, window=window, max_iters=2 * T)
    check(PROBLEM, solution)
    # Every iteration makes at least one state exact.
    assert solution.info.iterations <= T
    # A sweep is T evaluations of the cell, an iteration and a last look W of them each; a window
    # that converges as a whole has a last look of its own.
    looks = solution.info.sweeps * T / window
    assert 0 <= round(float(looks)) - (solution.info.iterations + 1) <= T // window


def test_a_window_of_one_is_the_sequential_recurrence():
    info = run(PROBLEM, method=elkax.DEER(), window=1, max_iters=2 * T).info
    # The first state needs no second look: f is what it was.
    assert T - 1 <= info.iterations <= T and info.sweeps <= 2.0


def test_what_has_converged_is_frozen():
    """States within tolerance at the beginning are not touched again, to the last digit."""
    exact = run(PROBLEM, method=elkax.DEER()).states
    head = exact[:40] * (1 + 1e-13)
    guess = jnp.concatenate((head, jnp.full((T - 40, 3), 0.5)))
    solution = run(PROBLEM, method=elkax.QuasiDEER(), guess=guess)
    check(PROBLEM, solution)
    np.testing.assert_array_equal(solution.states[:40], head)


def explosive_step(gain, state, x):
    """Bounded by x along the trajectory; a wrong guess grows to infinity in a few squarings."""
    return x + gain * (state**2 - x**2) * state


EXPLOSIVE = Problem(Partial(explosive_step, 2.0), jnp.full(2, 0.1), jnp.full((T, 2), 0.3))
TAILS = {
    "nan": jnp.full((T - 10, 2), jnp.nan),
    "infinite": jnp.full((T - 10, 2), jnp.inf),
    "huge": jnp.full((T - 10, 2), 1e200),
    "alternating": jnp.where(jnp.arange(T - 10)[:, None] % 2, 1e3, jnp.nan) * jnp.ones(2),
}


@pytest.mark.parametrize(
    "method", [elkax.DEER(), elkax.QuasiDEER(), elkax.QuasiELK(), elkax.Picard()], ids=str
)
@pytest.mark.parametrize("tail", TAILS)
def test_a_lost_tail_does_not_spoil_the_head(method, tail):
    guess = jnp.concatenate((jnp.full((10, 2), 0.3), TAILS[tail]))
    solution = run(EXPLOSIVE, method=method, guess=guess, max_iters=3 * T)
    check(EXPLOSIVE, solution)
    assert solution.info.resets >= 1


def test_a_lost_tail_when_iterations_run_out():
    """The head is exact, the tail a guess that is finite, and the status says so."""
    guess = jnp.concatenate((jnp.full((10, 2), 0.3), TAILS["nan"]))
    solution = run(EXPLOSIVE, method=elkax.Jacobi(), guess=guess, max_iters=5)
    assert solution.info.status == Status.MAX_ITERS and 5 <= solution.info.prefix < T
    gap = errors(solution.states, EXPLOSIVE.scan())
    assert np.all(gap[:5] <= 1e-15) and np.all(np.isfinite(solution.states))
    assert not solution.info.residual <= 1e-12


def test_restarts_are_counted_only_where_there_are_any():
    assert run(PROBLEM, method=elkax.DEER()).info.resets == 0


def doubling(state, x):
    return state * state + x


OVERFLOWING = Problem(
    Partial(doubling), jnp.zeros(1), jnp.where(jnp.arange(T)[:, None] < 30, 0.2, 3.0)
)


@pytest.mark.parametrize("method", [elkax.DEER(), elkax.QuasiELK()], ids=str)
def test_a_recurrence_that_overflows(method):
    """From the first state that is not finite on the result is NaN; the head is exact."""
    solution = OVERFLOWING.evaluate(method=method, max_iters=4 * T)
    exact = np.asarray(OVERFLOWING.scan())
    first = int(np.argmin(np.isfinite(exact[:, 0])))
    assert 30 < first < T and solution.info.status == Status.NONFINITE
    assert solution.info.prefix == first
    np.testing.assert_allclose(solution.states[:first], exact[:first], rtol=1e-9)
    assert np.all(np.isnan(solution.states[first:]))


def test_step_by_step_where_it_overflows():
    solution = OVERFLOWING.evaluate(method=elkax.Sequential())
    assert solution.info.status == Status.NONFINITE
    assert np.all(np.isfinite(solution.states[: int(solution.info.prefix)]))
    assert not np.any(np.isfinite(solution.states[int(solution.info.prefix) :]))


def test_a_nan_input():
    inputs = PROBLEM.inputs.at[25].set(jnp.nan)
    solution = run(PROBLEM._replace(inputs=inputs), method=elkax.DEER())
    assert solution.info.status == Status.NONFINITE and solution.info.prefix == 25
    assert np.max(errors(solution.states[:25], PROBLEM.scan()[:25])) <= 1e-11
    assert np.all(np.isnan(solution.states[25:]))


@partial(jax.jit, static_argnames="method")
def batch(cell, states, inputs, lengths, *, method):
    def one(state, x, length):
        # T is known twice, from the inputs and by number.
        return elkax.evaluate_recurrence(
            cell,
            state,
            x,
            num_timesteps=T,
            length=length,
            method=method,
            error_tolerance=INFINITY,
        )

    return jax.vmap(one)(states, inputs, lengths)


def test_ragged_batches_stop_one_by_one():
    """The state stays in the padding, whatever stands there."""
    rng, method = np.random.default_rng(12), elkax.QuasiDEER()
    lengths = np.array([1, 23, T])
    states, inputs = rng.normal(size=(3, 3)), rng.normal(size=(3, T, 2))
    padded = np.where(np.arange(T)[:, None] < lengths[:, None, None], inputs, np.nan)
    found = batch(PROBLEM.cell, states, jnp.asarray(padded), jnp.asarray(lengths), method=method)
    for i, length in enumerate(lengths):
        exact = problems.sequential(PROBLEM.cell, states[i], inputs[i])
        exact = np.concatenate((exact[:length], np.tile(exact[length - 1], (T - length, 1))))
        assert np.max(errors(found.states[i], exact)) <= 1e-11
    assert np.all(found.info.status == Status.CONVERGED)
    # A sequence of one step is exact after the first; the longest takes the most.
    iterations = np.asarray(found.info.iterations)
    assert iterations[0] <= 2 and iterations[0] < iterations[1] and iterations[1] <= iterations[2]
    alone = Problem(PROBLEM.cell, jnp.asarray(states[2]), jnp.asarray(inputs[2]))
    assert run(alone, method=method).info.iterations == iterations[2]


@pytest.mark.parametrize("method", [elkax.DEER(), elkax.Sequential()], ids=str)
def test_an_empty_sequence_in_a_batch(method):
    """The state stays; NaN in the padding reaches no derivative."""
    lengths = jnp.asarray([0, 7])
    states = jnp.asarray(np.random.default_rng(15).normal(size=(2, 3)))
    inputs = jnp.where(jnp.arange(T)[:, None] < lengths[:, None, None], PROBLEM.inputs, jnp.nan)

    def total(cell, states, inputs):
        found = batch(cell, states, inputs, lengths, method=method)
        return jnp.sum(found.states**2), found

    gradient = jax.grad(total, (0, 1, 2), has_aux=True)
    (cell, start, rows), found = gradient(PROBLEM.cell, states, inputs)
    np.testing.assert_array_equal(found.states[0], np.tile(states[0], (T, 1)))
    np.testing.assert_array_equal(found.info.status, Status.CONVERGED)
    assert found.info.iterations[0] == 0
    np.testing.assert_allclose(start[0], 2 * T * states[0], rtol=1e-14)
    np.testing.assert_array_equal(rows[0], 0.0)
    exact = problems.sequential(PROBLEM.cell, states[1], inputs[1, :7])
    assert np.max(errors(found.states[1, :7], exact)) <= 1e-11
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((cell, start, rows)))


def test_a_lost_sequence_does_not_spoil_the_others():
    inputs = jnp.stack([PROBLEM.inputs, PROBLEM.inputs.at[5].set(jnp.inf), -PROBLEM.inputs])
    states = jnp.zeros((3, 3))
    found = batch(PROBLEM.cell, states, inputs, jnp.full(3, T), method=elkax.DEER())
    np.testing.assert_array_equal(found.info.status, [0, Status.NONFINITE, 0])
    for i in (0, 2):
        exact = problems.sequential(PROBLEM.cell, states[i], inputs[i])
        assert np.max(errors(found.states[i], exact)) <= 1e-11


def test_reversed_time():
    """What is said of every step stands in the order of the result."""
    solution = PROBLEM.evaluate(method=elkax.QuasiDEER(), reverse=True, history=True)
    check(PROBLEM, solution, reverse=True)
    gap = errors(solution.states, PROBLEM.scan(reverse=True))
    assert np.all(gap <= solution.info.error_bound)
    # The run starts at the last step, which one iteration makes exact.
    residual = solution.info.history.residual[1]
    assert residual[-1] <= 1e-14 < np.max(residual[:-1])
    assert solution.info.history.prefix[1] >= 1


def test_an_exact_guess_takes_no_step():
    """It stands in the order of the result."""
    guess = run(PROBLEM, method=elkax.DEER(), reverse=True).states
    solution = run(PROBLEM, method=elkax.DEER(), reverse=True, guess=guess)
    assert solution.info.iterations == 0 and solution.info.sweeps == 1.0
    np.testing.assert_array_equal(solution.states, guess)


def test_reversed_ragged_batch():
    """It starts at the last step that exists; in the padding the initial state stays."""
    start = jnp.asarray([0.3, -0.2, 0.1])
    inputs = PROBLEM.inputs.at[20:].set(jnp.nan)
    problem = PROBLEM._replace(state=start, inputs=inputs)
    solution = run(problem, method=elkax.DEER(), length=20, reverse=True)
    exact = problems.sequential(PROBLEM.cell, start, inputs[:20], reverse=True)
    assert solution.info.status == Status.CONVERGED
    assert np.max(errors(solution.states[:20], exact)) <= 1e-11
    np.testing.assert_array_equal(solution.states[20:], np.tile(start, (T - 20, 1)))


def test_sequential_on_failure():
    """What comes back is the sequential result, and what is said is said of it."""
    given_up = run(PROBLEM, method=elkax.Jacobi(), max_iters=2)
    assert given_up.info.status == Status.MAX_ITERS
    assert given_up.info.residual > 1e-3
    solution = run(PROBLEM, method=elkax.Jacobi(), max_iters=2, on_failure="sequential")
    assert solution.info.iterations == 2
    check(PROBLEM, solution)
    assert solution.info.residual <= 1e-12


def test_sequential_on_failure_has_the_right_gradient():
    def loss(cell, *, reference):
        problem = PROBLEM._replace(cell=cell)
        options = {"method": elkax.Jacobi(), "max_iters": 2, "on_failure": "sequential"}
        states = problem.scan() if reference else run(problem, **options).states
        return jnp.sum(jnp.sin(states))

    got, expected = (
        jax.jit(jax.grad(partial(loss, reference=r)))(PROBLEM.cell).args for r in (False, True)
    )
    largest = max(float(np.max(np.abs(leaf))) for leaf in expected)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9 * largest)


@pytest.mark.parametrize(
    "method, block, window",
    [
        (elkax.Jacobi(), 8, None),
        (elkax.DEER(), 8, None),
        (elkax.DEER(), 7, 3),
        (elkax.DEER(), T, None),
    ],
    ids=str,
)
def test_blocks_of_sequential_steps(method, block, window):
    """One unknown in every block, whether or not its size divides T."""
    solution = run(PROBLEM, method=method, block=block, window=window)
    check(PROBLEM, solution)
    assert solution.info.iterations <= -(-T // block)
    assert solution.info.error_bound.shape == (T,)


def test_gradient_in_blocks():
    def loss(cell, inputs, *, reference):
        problem = PROBLEM._replace(cell=cell, inputs=inputs)
        states = problem.scan() if reference else run(problem, method=elkax.DEER(), block=8).states
        return jnp.sum(jnp.sin(states))

    got, expected = (
        jax.jit(jax.grad(partial(loss, reference=r), (0, 1)))(PROBLEM.cell, PROBLEM.inputs)
        for r in (False, True)
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)
