"""What every cell keeps to, against steps in NumPy and against `lax.scan`."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import elkax
from cells import cell_oracles as oracles
from elkax import cells
from elkax.cells.nonlinear import recurrence

T, U, D = 9, 2, 3
CELLS = {
    "Linear": cells.Linear(U, D),
    "Elman": cells.Elman(U, D),
    "GRU": cells.GRU(U, D),
    "GRU, reset before": cells.GRU(U, D, reset="before"),
    "diagonal GRU": cells.DiagonalGRU(U, D),
    "LSTM": cells.LSTM(U, D),
    "diagonal LSTM": cells.DiagonalLSTM(U, D),
    "LEM": cells.LEM(U, D, time_step=0.7),
    "GILR": cells.GILR(U, D),
    "GILR-LSTM": cells.GILRLSTM(U, D),
    "SRU": cells.SRU(U, D),
    "SRU, U = D": cells.SRU(D, D),
    "QRNN": cells.QRNN(U, D),
    "QRNN, k = 1": cells.QRNN(U, D, width=1),
    "QRNN, k = 4": cells.QRNN(U, D, width=4),
    "minGRU": cells.MinGRU(U, D),
    "minLSTM": cells.MinLSTM(U, D),
    "RG-LRU": cells.RGLRU(U, D),
    "RG-LRU, U = D": cells.RGLRU(D, D, sharpness=4.0),
    "diagonal complex": cells.DiagonalComplex(U, D),
    "diagonal complex, one output": cells.DiagonalComplex(U, D, output_dim=1),
}
LINEAR = [name for name, cell in CELLS.items() if isinstance(cell, cells.LinearCell)]
NONLINEAR = [name for name in CELLS if name not in LINEAR]
STATED = [name for name, cell in CELLS.items() if hasattr(cell, "jacobian_structure")]
# Length and resets of each sequence of the batch.
LENGTHS = np.array([T, T, 5, 6, 0, 1])
RESETS = np.zeros((6, T), bool)
RESETS[[1, 1, 1, 3, 3, 3, 3, 4], [0, 3, 4, 1, 4, 5, 8, 2]] = True


def disturbed(tree, seed):
    """Random numbers added to all leaves."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), tree)


@cache
def problem(name):
    """A cell, parameters and a first state without zeros, and inputs (6, T, U)."""
    cell = CELLS[name]
    params = disturbed(cell.initialize(jax.random.key(0)), 1)
    start = disturbed(cell.initial_state(params), 2)
    inputs = np.random.default_rng(3).normal(size=(6, T, cell.input_dim))
    return cell, params, start, inputs


def stacked(list_of_trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *list_of_trees)


def close(got, expected, tolerance=1e-12):
    chex.assert_trees_all_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_equals_the_equations(name, reverse):
    """Resets are separate sequences, lengths are cuts, and a batch is one after the other."""
    cell, params, start, inputs = problem(name)
    padded = np.where(np.arange(T)[:, None] < LENGTHS[:, None, None], inputs, np.nan)
    got = cells.run(cell, params, padded, start, RESETS, LENGTHS, reverse=reverse)
    assert np.all(np.asarray(got.info.status) == elkax.Status.CONVERGED)
    for i, length in enumerate(LENGTHS):
        outputs, states, final = oracles.run(
            cell, params, inputs[i], start, RESETS[i], length, reverse
        )
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], got)
        close(mine.states, stacked(states))
        close(mine.final_state, final)
        if length:
            close(mine.outputs[:length], np.stack(outputs))
        assert not np.any(mine.outputs[length:])


@pytest.mark.parametrize("name", CELLS)
def test_the_plain_call(name):
    cell, params, _, inputs = problem(name)
    assert hash(cell) == hash(CELLS[name])
    got = cells.run(cell, params, inputs[0])
    outputs, states = oracles.loop(cell, params, inputs[0], cell.initial_state(params))
    close(got.outputs, np.stack(outputs))
    close(got.states, stacked(states))
    close(got.final_state, states[-1])
    assert type(got.final_state) is type(cell.initial_state(params))


@pytest.mark.parametrize("name", CELLS)
def test_one_step_without_inputs(name):
    cell = CELLS[name]
    cell = type(cell)(0, *(getattr(cell, f) for f in list(cell.__dataclass_fields__)[1:]))
    params = disturbed(cell.initialize(jax.random.key(0)), 1)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
    start = disturbed(cell.initial_state(params), 2)
    got = cells.run(cell, params, np.zeros((1, 0)), start)
    outputs, states = oracles.loop(cell, params, np.zeros((1, 0)), start)
    close((got.outputs, got.states), (np.stack(outputs), stacked(states)))


@partial(jax.jit, static_argnums=0)
def derivatives(function, *arguments):
    def loss(*arguments):
        leaves = jax.tree.leaves(function(*arguments))
        return sum(jnp.sum(jnp.sin(leaf.real) + jnp.cos(leaf.imag)) for leaf in leaves)

    along = jax.tree.map(jnp.cos, arguments)
    return jax.grad(loss, (0, 1, 2))(*arguments), jax.jvp(function, arguments, along)


def scanned(cell, params, inputs, start, resets, length, reverse):
    def step(state, x):
        x, reset, valid = x
        before = jax.tree.map(lambda a, b: jnp.where(reset, a, b), start, state)
        new, output = cell.step(params, before, x)
        state = jax.tree.map(lambda a, b: jnp.where(valid, a, b), new, state)
        return state, (jnp.where(valid, output, 0), state)

    xs = inputs, resets, np.arange(len(inputs)) < length
    final, (outputs, states) = jax.lax.scan(step, start, xs, reverse=reverse)
    return outputs, states, final


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_derivatives_equal_those_of_lax_scan(name, reverse):
    cell, params, start, inputs = problem(name)

    def ours(params, inputs, start):
        return cells.run(cell, params, inputs, start, RESETS[3], 7, reverse)[:3]

    def theirs(params, inputs, start):
        return scanned(cell, params, inputs, start, RESETS[3], 7, reverse)

    arguments = params, jnp.asarray(inputs[0]), start
    close(derivatives(ours, *arguments), derivatives(theirs, *arguments), 1e-10)


@pytest.mark.parametrize("name", CELLS)
def test_float32(name):
    """Nine steps of numbers of order one: twenty roundings."""
    cell, *numbers, inputs = problem(name)

    def short(leaf):
        return jnp.asarray(leaf, jnp.complex64 if jnp.iscomplexobj(leaf) else jnp.float32)

    params, start = jax.tree.map(short, numbers)
    got = cells.run(cell, params, inputs[0], start)
    assert all(
        leaf.dtype.itemsize == 4 * (1 + jnp.iscomplexobj(leaf)) for leaf in jax.tree.leaves(got[:3])
    )
    outputs, states = oracles.loop(cell, numbers[0], inputs[0], numbers[1])
    close((got.outputs, got.states), (np.stack(outputs), stacked(states)), 20 * 1.2e-7)


@pytest.mark.parametrize("name", NONLINEAR)
def test_methods(name):
    """Newton's method, with resets inside, a length, and in reverse."""
    cell, params, start, inputs = problem(name)
    run = partial(cells.run, cell, params, inputs[0], start, RESETS[3], 7, True)
    one, two = run(method=elkax.DEER()), run()
    assert int(one.info.status) == elkax.Status.CONVERGED
    assert 0 < int(one.info.iterations) <= (1 if name == "Linear" else T)
    close(one[:3], two[:3], 1e-10)


@pytest.mark.parametrize("name", ["GRU", "diagonal LSTM"])
def test_derivatives_of_what_newton_finds(name):
    cell, params, start, inputs = problem(name)

    def states(method, params, inputs, start):
        return cells.run(cell, params, inputs, start, RESETS[3], 7, True, method)[:3]

    arguments = params, jnp.asarray(inputs[0]), start
    methods = (elkax.DEER(), elkax.Sequential())
    one, two = (derivatives(partial(states, method), *arguments) for method in methods)
    close(one, two, 1e-10)


@pytest.mark.parametrize("name", STATED)
def test_stated_structures_are_those_of_the_jacobian(name):
    cell, params, start, inputs = problem(name)
    elkax.check_structure(*recurrence(cell, params, start), (jnp.asarray(inputs[0]), None))


def count(primitive, jaxpr):
    """How often it is called, in whatever it stands."""
    inner = [j for equation in jaxpr.eqns for j in jaxprs_in_params(equation.params)]
    calls = sum(equation.primitive.name == primitive for equation in jaxpr.eqns)
    return calls + sum(count(primitive, getattr(j, "jaxpr", j)) for j in inner)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_cells_take_one_or_two_recurrences(name):
    cell, params, start, inputs = problem(name)
    for method in (None, elkax.DEER()):
        run = jax.jit(partial(cells.run, cell, method=method))
        traced = run.trace(params, inputs[0], start)
        assert count("custom_linear_solve", traced.jaxpr) == (2 if name == "GILR-LSTM" else 1)
        assert traced.lower().as_text().count("stablehlo.while") == 1


@pytest.mark.parametrize("name", ["GRU", "GILR-LSTM", "QRNN, k = 4"])
def test_what_is_not_finite_is_told_and_ends_at_a_reset(name):
    cell, params, start, inputs = problem(name)
    spoiled = inputs[0].copy()
    spoiled[2] = np.nan
    resets = np.arange(T) == 6
    got = jax.jit(lambda x: cells.run(cell, params, x, start, resets))(spoiled)
    assert int(got.info.status) == elkax.Status.NONFINITE
    assert int(got.info.prefix) == 2
    finite = np.all(np.isfinite(got.outputs), 1)
    assert np.array_equal(finite, [True] * 2 + [False] * 4 + [True] * 3)
    outputs, _ = oracles.loop(cell, params, inputs[0][6:], start)
    close(got.outputs[6:], np.stack(outputs))


def test_one_first_state_for_each_sequence():
    cell, params, _, inputs = problem("LSTM")
    first = disturbed(jax.tree.map(lambda leaf: jnp.zeros((6, D)), cell.initial_state(params)), 5)
    got = cells.run(cell, params, inputs, first)
    for i in range(6):
        _, states = oracles.loop(
            cell, params, inputs[i], jax.tree.map(lambda leaf, i=i: leaf[i], first)
        )
        close(jax.tree.map(lambda leaf, i=i: leaf[i], got.states), stacked(states))


def test_a_cell_of_ones_own():
    """The three methods of the protocol are enough."""

    class Counter:
        """A leaky sum whose output is what the input added."""

        input_dim = 1

        def initialize(self, key):
            return jnp.array(0.9)

        def initial_state(self, params):
            return {"sum": jnp.zeros(())}

        def step(self, params, state, x):
            total = params * state["sum"] + x[0]
            return {"sum": total}, total - state["sum"]

    inputs = np.arange(1.0, 5.0)[:, None]
    got = cells.run(Counter(), jnp.array(0.5), inputs, resets=np.array([0, 0, 1, 0], bool))
    np.testing.assert_allclose(got.states["sum"], [1.0, 2.5, 3.0, 5.5])
    np.testing.assert_allclose(got.outputs, [1.0, 1.5, 3.0, 2.5])
