"""Derivatives are those of the sequential recurrence, whatever the forward pass kept."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from recurrences import recurrence_problems as problems
from recurrences.recurrence_problems import METHODS

T = 30
PROBLEM = problems.gru(T)
# Cotangents of the states: a loss at every step, and one at the last step only.
EVERY = np.random.default_rng(8).normal(size=(T, 3))
LAST = np.where(np.arange(T)[:, None] == T - 1, EVERY, 0.0)
LOSSES = {"every step": EVERY, "last step": LAST}
INFINITY = float("inf")


def states_of(cell, state, inputs, *, reference=False, steps=None, **options):
    if reference:
        return problems.sequential(cell, state, inputs)
    options = {"error_tolerance": INFINITY, "length": steps} | options
    return elkax.evaluate_recurrence(cell, state, inputs, **options).states


def loss(weights, *arguments, **options):
    """Not linear in the states, so that a wrong trajectory shows."""
    return jnp.sum(weights * jnp.sin(2 * states_of(*arguments, **options)))


@cache
def reference(name):
    gradient = jax.jit(jax.grad(partial(loss, reference=True), (1, 2, 3)))
    return gradient(LOSSES[name], *PROBLEM[:3])


def check_close(got, expected, tolerance=1e-9):
    """Relative to the largest entry of all gradients together."""
    largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(got, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(
    "method, gradient",
    [(m, elkax.Implicit()) for m in METHODS]
    + [(m, elkax.MatrixFree()) for m in ("Jacobi", "Picard", "quasi-DEER")],
    ids=str,
)
def test_reverse_mode(method, gradient):
    """Parameters that the cell holds, the initial state and the inputs."""
    options = {"method": METHODS[method], "gradient": gradient, "tolerance": 1e-13}
    derivative = jax.jit(jax.grad(partial(loss, **options), (1, 2, 3)))
    for name, weights in LOSSES.items():
        check_close(derivative(weights, *PROBLEM[:3]), reference(name))


@pytest.mark.parametrize(
    "method, max_iters",
    # Jacobi is exact after T sweeps; the other has converged to the last digit.
    [("Jacobi", T), ("quasi-DEER", 20)],
)
def test_unrolled(method, max_iters):
    options = {"method": METHODS[method], "max_iters": max_iters, "gradient": elkax.Unrolled()}
    derivative = jax.jit(jax.grad(partial(loss, **options), (1, 2, 3)))
    for name, weights in LOSSES.items():
        check_close(derivative(weights, *PROBLEM[:3]), reference(name))


def test_unrolled_derivative_is_that_of_the_truncated_model():
    def truncated(weights, cell, state, inputs):
        states = jnp.zeros((T, 3))
        for _ in range(3):
            states = jax.vmap(cell)(jnp.concatenate((state[None], states[:-1])), inputs)
        return jnp.sum(weights * jnp.sin(2 * states))

    options = {"guess": "zeros", "max_iters": 3, "gradient": elkax.Unrolled()}
    run = partial(loss, method=elkax.Jacobi(), **options)
    got = jax.jit(jax.grad(run, (1, 2, 3)))(EVERY, *PROBLEM[:3])
    expected = jax.jit(jax.grad(truncated, (1, 2, 3)))(EVERY, *PROBLEM[:3])
    check_close(got, expected, 1e-12)
    # It is another derivative than that of the whole recurrence.
    with pytest.raises(AssertionError):
        check_close(got, reference("every step"), 1e-3)


def directions(tree):
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree)


def both(function, point, direction):
    """Derivatives in a direction: forward, forward over reverse, and reverse over reverse."""

    def gradient(*point):
        return jax.grad(function, (0, 1, 2))(*point)

    def slope(point):
        pairs = zip(jax.tree.leaves(gradient(*point)), jax.tree.leaves(direction), strict=True)
        return sum(jnp.vdot(a, b) for a, b in pairs)

    forward = jax.jvp(function, point, direction)[1]
    return forward, jax.jvp(gradient, point, direction)[1], jax.grad(slope)(point)


@pytest.mark.parametrize(
    "gradient", [elkax.Implicit(), elkax.MatrixFree(), elkax.Unrolled()], ids=str
)
def test_forward_mode_and_second_derivatives(gradient):
    """After a quasi-Newton pass; unrolled, after the sweeps that make all states exact."""
    method = elkax.Jacobi() if gradient == elkax.Unrolled() else elkax.QuasiDEER()
    options = {"method": method, "gradient": gradient, "tolerance": 1e-14, "max_iters": T}
    run = partial(loss, EVERY, **options)
    point, direction = PROBLEM[:3], directions(PROBLEM[:3])
    got = jax.jit(partial(both, run))(point, direction)
    for one, other in zip(got, second_reference(), strict=True):
        # A residual of 1e-14 enters multiplied by second derivatives of the cell.
        check_close(one, other, 1e-8)


@cache
def second_reference():
    run = jax.jit(partial(both, partial(loss, EVERY, reference=True)))
    return run(PROBLEM[:3], directions(PROBLEM[:3]))


@pytest.mark.parametrize("options", [{"window": 7}, {"block": 7}], ids=str)
def test_second_derivatives_in_windows_and_blocks(options):
    """In the parameter and the initial state of a logistic map, a cycle of length two."""

    def total(point, **options):
        cell, state = jax.tree_util.Partial(problems.logistic_step, point[0]), point[1:]
        if not options:
            return jnp.sum(jnp.sin(problems.sequential(cell, state, None, length=T)))
        found = elkax.evaluate_recurrence(
            cell, state, num_timesteps=T, method=elkax.DEER(), tolerance=1e-14, **options
        )
        return jnp.sum(jnp.sin(found.states))

    point = jnp.asarray([3.2, 0.3])
    got, expected = (jax.jit(jax.hessian(partial(total, **o)))(point) for o in (options, {}))
    check_close(got, expected)


def declared(structure):
    """A cell of two states whose Jacobian has this structure."""

    def step(scale, state, x):
        steps = {
            elkax.Zero(): lambda: jnp.sin(scale * x),
            elkax.Identity(): lambda: state + jnp.sin(scale * x),
            elkax.BlockDiagonal(2): lambda: jnp.tanh(scale * state[::-1] + x),
        }
        return steps[structure]()

    step.jacobian_structure = structure
    return jax.tree_util.Partial(step, jnp.asarray(0.9))


@pytest.mark.parametrize("gradient", [elkax.Implicit(), elkax.MatrixFree()], ids=str)
@pytest.mark.parametrize(
    "structure", [elkax.Zero(), elkax.Identity(), elkax.BlockDiagonal(2)], ids=str
)
def test_derivatives_through_a_declared_structure(structure, gradient):
    point = declared(structure), jnp.asarray([0.3, -0.2]), PROBLEM.inputs
    options = {"method": elkax.DEER(), "gradient": gradient, "tolerance": 1e-13}
    weights = EVERY[:, :2]
    got = jax.jit(jax.grad(partial(loss, weights, **options), (0, 1, 2)))(*point)
    expected = jax.jit(jax.grad(partial(loss, weights, reference=True), (0, 1, 2)))(*point)
    check_close(got, expected)


def test_closed_over_parameters():
    """A cell that is a closure."""

    def loss_of(params, weights, **options):
        u, w, b = params

        def cell(state, x):
            return problems.gru_step(u, w, b, state, x)

        return loss(weights, cell, PROBLEM.state, PROBLEM.inputs, **options)

    params = PROBLEM.cell.args
    got = jax.jit(jax.grad(partial(loss_of, method=elkax.QuasiDEER())))(params, EVERY)
    check_close(got, reference("every step")[0].args)


def choosing_step(u, kind, state, x):
    drive = u @ state + x
    return jnp.where(kind == 0, jnp.tanh(drive), jnp.sin(drive))


@pytest.mark.parametrize("gradient", [elkax.Implicit(), elkax.MatrixFree()], ids=str)
def test_whole_numbers_among_the_parameters(gradient):
    """Traced ones, of a batch."""
    rng = np.random.default_rng(12)
    u, x = jnp.asarray(0.4 * rng.normal(size=(3, 3))), jnp.asarray(rng.normal(size=(T, 3)))

    def slope(kind, **options):
        def total(u):
            cell = jax.tree_util.Partial(choosing_step, u, kind)
            return loss(EVERY, cell, jnp.zeros(3), x, **options)

        return jax.grad(total)(u)

    kinds, method = jnp.arange(2), elkax.QuasiDEER()
    options = {"method": method, "gradient": gradient, "tolerance": 1e-13}
    got = jax.jit(jax.vmap(partial(slope, **options)))(kinds)
    check_close(got, jax.jit(jax.vmap(partial(slope, reference=True)))(kinds))


def test_batches_and_windows():
    """`vmap` of the gradient, in windows that do not divide T."""
    rng = np.random.default_rng(10)
    inputs = jnp.asarray(rng.normal(size=(3, T, 2)))

    def gradient(inputs, **options):
        function = partial(loss, EVERY, **options)
        return jax.grad(function, (0, 1, 2))(PROBLEM.cell, PROBLEM.state, inputs)

    got = jax.jit(jax.vmap(partial(gradient, method=elkax.DEER(), window=7)))(inputs)
    check_close(got, jax.jit(jax.vmap(partial(gradient, reference=True)))(inputs))


def test_padding_has_no_influence():
    """NaN in the padding reaches neither the states nor any gradient; those of it are zero.

    Run backwards, from the last step that exists.
    """
    real = 17
    inputs = PROBLEM.inputs.at[real:].set(jnp.nan)
    weights = np.where(np.arange(T)[:, None] < real, EVERY, 0.0)

    @jax.jit
    def derivative(inputs, length):
        options = {"method": elkax.QuasiDEER(), "tolerance": 1e-13, "reverse": True}
        return jax.grad(lambda *point: loss(weights, *point, steps=length, **options), (0, 1, 2))(
            PROBLEM.cell, PROBLEM.state, inputs
        )

    got = derivative(inputs, real)
    expected = jax.jit(
        jax.grad(partial(_sequential_loss, weights[:real], reverse=True), (0, 1, 2))
    )(PROBLEM.cell, PROBLEM.state, inputs[:real])
    np.testing.assert_array_equal(got[2][real:], 0.0)
    check_close((*got[:2], got[2][:real]), expected)


def _sequential_loss(weights, *point, **options):
    return jnp.sum(weights * jnp.sin(2 * problems.sequential(*point, **options)))


def test_derivatives_of_a_pytree():
    problem = problems.pytree(T)
    options = {"method": elkax.QuasiDEER(), "tolerance": 1e-13}

    def total(reference, cell, state, signal):
        inputs = problem.inputs | {"signal": signal}
        states = states_of(cell, state, inputs, **({"reference": True} if reference else options))
        return sum(jnp.sum(jnp.sin(2 * leaf)) for leaf in jax.tree.leaves(states))

    point = problem.cell, problem.state, problem.inputs["signal"]
    got, expected = (jax.jit(jax.grad(partial(total, r), (0, 1, 2)))(*point) for r in (False, True))
    check_close(got, expected)


def test_a_large_state_needs_no_whole_jacobian():
    """D > 16: matrix-free unless something else is asked for."""
    problem = problems.gru(12, size=18)
    weights = np.random.default_rng(11).normal(size=(12, 18))
    options = {"method": elkax.QuasiDEER(), "tolerance": 1e-13}
    function = partial(loss, weights, **options)
    got = jax.jit(jax.grad(function, (0, 1, 2)))(*problem[:3])
    expected = jax.jit(jax.grad(partial(_sequential_loss, weights), (0, 1, 2)))(*problem[:3])
    check_close(got, expected)
