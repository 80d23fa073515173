"""What the methods are in the limits, and one step of each against dense algebra."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from recurrences import recurrence_problems as problems
from recurrences.recurrence_problems import T, errors

PROBLEM = problems.rnn()
D = 4
START = jnp.asarray(np.random.default_rng(5).uniform(-0.8, 0.8, (T, D)))
BLOCKS = elkax.BlockDiagonal(2)
# Of each of the T Jacobians, (T, D, D), what a structure keeps.
KEPT = {
    "zero": (elkax.Zero(), np.zeros((D, D))),
    "identity": (elkax.Identity(), np.nan),
    "diagonal": (elkax.Diagonal(), np.eye(D)),
    "blocks": (BLOCKS, np.kron(np.eye(2), np.ones((2, 2)))),
    "full": (elkax.Full(), np.ones((D, D))),
}


def iterate(method, guess=START, max_iters=1, problem=PROBLEM):
    solution = problem.evaluate(
        method=method, guess=guess, max_iters=max_iters, error_tolerance=float("inf")
    )
    return np.asarray(solution.states)


@cache
def linearized():
    """Residuals r_t = f(s_{t-1}, x_t) - s_t and Jacobians of f at the guess."""
    before = jnp.concatenate((PROBLEM.state[None], START[:-1]))
    values = jax.vmap(PROBLEM.cell)(before, PROBLEM.inputs)
    jacobians = jax.jit(jax.vmap(jax.jacfwd(PROBLEM.cell)))(before, PROBLEM.inputs)
    return np.asarray(values - START), np.asarray(jacobians)


def kept_jacobians(name):
    _, mask = KEPT[name]
    jacobians = linearized()[1]
    return np.broadcast_to(np.eye(D), jacobians.shape) if name == "identity" else jacobians * mask


@pytest.mark.parametrize("name", KEPT)
def test_an_undamped_step_is_an_affine_recurrence(name):
    r, a = linearized()[0], kept_jacobians(name)
    change = [r[0]]
    for t in range(1, T):
        change.append(a[t] @ change[-1] + r[t])
    # Sixty products of matrices of norm about one.
    np.testing.assert_allclose(
        iterate(elkax.Method(KEPT[name][0])), START + np.stack(change), atol=1e-11
    )


def dense_step(a, r, strength):
    """Minimise the sum over t >= 2 of |d_t - A_t d_{t-1} - r_t|^2 / lambda_t + |d_t|^2.

    d_1 = r_1. For one lambda this is Levenberg and Marquardt's step.
    """
    rows = np.eye((T - 1) * D)
    for t in range(2, T):
        here, there = (slice((u - 1) * D, u * D) for u in (t, t - 1))
        rows[here, there] = -a[t]
    right = r[1:].copy()
    right[0] += a[1] @ r[0]
    weights = np.repeat(1 / strength[1:], D)
    hessian = rows.T @ (weights[:, None] * rows) + np.eye((T - 1) * D)
    change = np.linalg.solve(hessian, rows.T @ (weights * right.ravel()))
    return np.concatenate((r[:1], change.reshape(T - 1, D)))


def filtered_step(a, r, strength):
    """The Kalman filter's means, every d_t for t >= 2 observed at zero with variance one."""
    mean, cov = r[0], np.zeros((D, D))
    means = [mean]
    for t in range(1, T):
        mean, cov = a[t] @ mean + r[t], a[t] @ cov @ a[t].T + strength[t] * np.eye(D)
        gain = np.linalg.solve(cov + np.eye(D), cov).T
        mean, cov = mean - gain @ mean, cov - gain @ cov
        means.append(mean)
    return np.stack(means)


def varying(t):
    return 0.1 + 0.05 * t


STRENGTHS = {"constant": (0.7, np.full(T, 0.7)), "per step": (varying, varying(np.arange(T)))}


@pytest.mark.parametrize(
    "name, strength, form",
    [
        ("full", "constant", "filter"),
        ("full", "constant", "smoother"),
        ("diagonal", "per step", "filter"),
        ("diagonal", "per step", "smoother"),
        ("blocks", "constant", "smoother"),
    ],
)
def test_a_damped_step_against_dense_algebra(name, strength, form):
    damping, values = STRENGTHS[strength]
    method = elkax.Method(KEPT[name][0], elkax.ConstantDamping(damping), form)
    oracle = dense_step if form == "smoother" else filtered_step
    expected = START + oracle(kept_jacobians(name), linearized()[0], values)
    # The stacked system has a condition number of about 1e2.
    np.testing.assert_allclose(iterate(method), expected, atol=1e-9)


@pytest.mark.parametrize("form", ["filter", "smoother"])
def test_damping_per_step(form):
    """The filter also where Q = 0 in the first half."""
    damping, values = STRENGTHS["per step"]
    oracle = dense_step
    if form == "filter":
        values = np.where(np.arange(T) < T // 2, 0.0, values)
        damping, oracle = lambda t: jnp.where(t < T // 2, 0.0, varying(t)), filtered_step
    method = elkax.ELK(elkax.ConstantDamping(damping), form=form)
    expected = START + oracle(kept_jacobians("full"), linearized()[0], values)
    np.testing.assert_allclose(iterate(method), expected, atol=1e-9)


@pytest.mark.parametrize("form", ["filter", "smoother"])
@pytest.mark.parametrize("name", ["diagonal", "blocks", "full"])
def test_no_damping_is_the_limit(name, form):
    """Three iterations one by one from zeros; exact zeros in Q and in the first covariance."""
    structure = KEPT[name][0]
    undamped = elkax.Method(structure)
    damped = elkax.Method(structure, elkax.ConstantDamping(0.0), form)
    states = jnp.zeros((T, D))
    for _ in range(3):
        expected = iterate(undamped, states)
        # The algebra is the same, done by other operations.
        np.testing.assert_allclose(iterate(damped, states), expected, atol=1e-12)
        states = jnp.asarray(expected)


def test_no_damping_is_the_limit_in_one_run():
    runs = [
        iterate(method, "zeros", 3)
        for method in (elkax.DEER(), elkax.ELK(elkax.ConstantDamping(0.0)))
    ]
    np.testing.assert_allclose(*runs, atol=1e-12)


def test_no_damping_is_the_limit_in_blocks():
    """Of seven steps each, which do not divide T."""
    undamped, damped = (
        PROBLEM.evaluate(method=method, block=7, max_iters=2, error_tolerance=float("inf"))
        for method in (elkax.DEER(), elkax.ELK(elkax.ConstantDamping(0.0), form="smoother"))
    )
    assert undamped.info.status == damped.info.status == elkax.Status.MAX_ITERS
    np.testing.assert_allclose(damped.states, undamped.states, atol=1e-12)


@pytest.mark.parametrize("method", [elkax.Jacobi(), elkax.QuasiDEER(), elkax.DEER()], ids=str)
def test_so_many_steps_make_so_many_states_exact(method):
    count = 3
    solution = PROBLEM.evaluate(method=method, guess=START, max_iters=count)
    gap = errors(solution.states, PROBLEM.scan())
    # f may be rounded otherwise in another program.
    assert np.all(gap[:count] <= 1e-15 * count)
    assert np.max(gap) > 1e-6 and solution.info.status == elkax.Status.MAX_ITERS
    assert count <= solution.info.prefix < T and solution.info.iterations == count


def test_jacobi_is_a_truncated_fixed_point():
    """After K sweeps a state depends on the last K inputs alone, and on the guess before them."""
    swept = START
    for _ in range(4):
        before = jnp.concatenate((PROBLEM.state[None], swept[:-1]))
        swept = jax.vmap(PROBLEM.cell)(before, PROBLEM.inputs)
    np.testing.assert_allclose(iterate(elkax.Jacobi(), max_iters=4), swept, atol=1e-14)


def test_newton_on_an_affine_recurrence_takes_one_step():
    weights = jnp.asarray(0.3 * np.random.default_rng(6).normal(size=(D, D)))
    affine = PROBLEM._replace(cell=jax.tree_util.Partial(_affine, weights))
    solution = affine.evaluate(method=elkax.DEER(), max_iters=T)
    assert solution.info.status == elkax.Status.CONVERGED and solution.info.iterations == 1
    np.testing.assert_allclose(solution.states, affine.scan(), atol=1e-13)


def _affine(weights, state, x):
    return weights @ state + jnp.sum(x)


def test_merit_damping_never_raises_the_merit():
    """Half the sum of squared residuals, from a guess where Newton's steps raise it."""
    problem = problems.logistic(r=3.9)
    guess = jnp.asarray(np.random.default_rng(7).uniform(0.0, 1.0, (T, 1)))

    def merit(states):
        return 0.5 * np.sum(problem.residual(states)[0] ** 2)

    newton = iterate(elkax.DEER(), guess, 6, problem)
    damped = iterate(elkax.ELK(elkax.LevenbergMarquardt(), form="smoother"), guess, 6, problem)
    assert merit(damped) < merit(guess) < merit(newton)
