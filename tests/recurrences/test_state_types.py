"""States of several types: counters, flags, keys, complex numbers, another precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import elkax
from recurrences import recurrence_problems as problems

pytestmark = pytest.mark.usefixtures("unchecked")
T = 40
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(T, 3)))


@jax.jit
def mixed_cell(u, state, x):
    """The real part reads a counter, a flag, a key, a phase and a clock of few digits."""
    key, noise = jax.random.split(state["key"])
    phase, clock = state["phase"] * jnp.exp(0.1j), state["clock"] + jnp.float32(0.125)
    drive = jnp.where(state["odd"], 0.3, -0.2) + phase.real + jnp.sin(clock).astype(float)
    hidden = jnp.tanh(u @ state["hidden"] + x + 0.1 * jax.random.normal(noise, (3,)) + drive)
    count = jax.lax.while_loop(lambda n: n % 3 != 0, lambda n: n + 1, state["count"] + 1)
    return {
        "hidden": hidden / (1 + 0.01 * count),
        "count": count,
        "odd": ~state["odd"],
        "key": key,
        "phase": phase,
        "clock": clock,
    }


CELL = Partial(mixed_cell, jnp.asarray(0.5 * RNG.normal(size=(3, 3))))
STATE = {
    "hidden": jnp.zeros(3),
    "count": jnp.asarray(0),
    "odd": jnp.asarray(True),
    "key": jax.random.key(3),
    "phase": jnp.asarray(1.0 + 0.0j),
    "clock": jnp.zeros((), "float32"),
}


def assert_same(states, exact):
    assert jax.tree.structure(states) == jax.tree.structure(exact)
    for got, leaf in zip(jax.tree.leaves(states), jax.tree.leaves(exact), strict=True):
        assert got.dtype == leaf.dtype
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            got, leaf = jax.random.key_data(got), jax.random.key_data(leaf)
        np.testing.assert_allclose(got, leaf, rtol=0, atol=1e-10)


METHODS = problems.METHODS | {"step by step": elkax.Sequential(), "chosen": None}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_carries_them(method):
    solution = elkax.evaluate_recurrence(CELL, STATE, INPUTS, method=METHODS[method])
    assert solution.info.status == elkax.Status.CONVERGED
    assert_same(solution.states, problems.sequential(CELL, STATE, INPUTS))


def test_reversed_in_padding_and_from_a_guess():
    exact = problems.sequential(CELL, STATE, INPUTS[:25], reverse=True)
    padded = INPUTS.at[25:].set(jnp.nan)
    guess = problems.sequential(CELL, STATE, INPUTS)
    for method in (elkax.DEER(), elkax.Sequential()):
        found = elkax.evaluate_recurrence(
            CELL, STATE, padded, method=method, length=25, reverse=True, guess=guess
        )
        assert found.info.status == elkax.Status.CONVERGED
        assert_same(jax.tree.map(lambda leaf: leaf[:25], found.states), exact)


def test_derivatives_pass_through_them():
    """The phase and the clock have some of their own; a bound where one is asked for."""

    def total(u, phase, inputs, method, **options):
        state = STATE | {"phase": phase * (1.0 + 0.5j)}
        cell = Partial(mixed_cell, u)
        if method == "scan":
            return jnp.sum(jnp.sin(problems.sequential(cell, state, inputs)["hidden"]))
        solution = elkax.evaluate_recurrence(cell, state, inputs, method=method, **options)
        return jnp.sum(jnp.sin(solution.states["hidden"]))

    point = CELL.args[0], 0.7, INPUTS
    exact = jax.grad(total, (0, 1, 2))(*point, "scan")
    for method in (elkax.QuasiDEER(), elkax.Sequential()):
        got = jax.grad(total, (0, 1, 2))(*point, method)
        for one, other in zip(got, exact, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9)


def test_a_bound_step_by_step():
    options = {"method": elkax.Sequential(), "error_tolerance": 1e-6}
    info = elkax.evaluate_recurrence(CELL, STATE, INPUTS, **options).info
    assert np.all((info.error_bound > 0) & (info.error_bound < 1e-12))


def test_what_a_cell_closes_over():
    """An array held by the cell itself, with `vmap` over states."""
    weights = jnp.asarray(0.3 * RNG.normal(size=(3, 3)))

    def cell(state, x):
        hidden, count = state
        return jnp.tanh(weights @ hidden + x / (1 + count)), count + 1

    def run(start):
        return elkax.evaluate_recurrence(cell, (start, 0), INPUTS, method=elkax.DEER()).states

    starts = jnp.asarray(RNG.normal(size=(3, 3)))
    together = jax.vmap(run)(starts)
    for i in range(3):
        exact = problems.sequential(Partial(cell), (starts[i], jnp.asarray(0)), INPUTS)
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], together), exact)


class Gates:
    jacobian_structure = elkax.Diagonal(lambda s, x: (0.5 * jnp.cos(s[0] + x), s[1]))

    def __call__(self, state, x):
        return 0.5 * jnp.sin(state[0] + x) + 0.01 * state[1], state[1] + 1


def test_a_stated_jacobian_is_that_of_what_is_solved_for():
    state = jnp.zeros(3), jnp.asarray(0)
    found = elkax.evaluate_recurrence(Gates(), state, INPUTS, method=elkax.DEER())
    assert found.info.status == elkax.Status.CONVERGED
    assert_same(found.states, problems.sequential(Partial(Gates()), state, INPUTS))


def test_nothing_to_solve_for():
    def cell(state, x):
        return (state[0] * 3 + 1) % 1000, state[1] * jnp.exp(0.2j)

    state = jnp.asarray(1), jnp.asarray(1.0 + 0j)
    for method in (elkax.DEER(), elkax.Sequential(), None):
        found = elkax.evaluate_recurrence(cell, state, INPUTS, method=method)
        assert found.info.status == elkax.Status.CONVERGED and found.info.prefix == T
        assert_same(found.states, problems.sequential(Partial(cell), state, INPUTS))


def counts_crossings(state, x):
    return {"h": jnp.sin(state["h"] + x), "n": state["n"] + (state["h"][0] > 0)}


def rotates(state, x):
    return state * jnp.exp(1j * jnp.abs(state)) + x


def rounds(state, x):
    h, low = state
    return jnp.sin(h + low), (0.5 * h[0]).astype("float32") + low


ENTANGLED = {
    "a counter of crossings": (
        counts_crossings,
        {"h": jnp.zeros(3), "n": jnp.asarray(0)},
        r"leaf \['n'\] of type int64.*float64",
    ),
    "two precisions": (
        rounds,
        (jnp.zeros(3), jnp.zeros((), "float32")),
        r"leaf \[1\] of type float32.*float64",
    ),
}


@pytest.mark.parametrize("name", ENTANGLED)
def test_types_that_depend_on_each_other(name):
    """All of them step by step, with derivatives; what else is asked for is refused in words."""
    cell, state, message = ENTANGLED[name]
    exact = problems.sequential(Partial(cell), state, INPUTS)
    for method in (elkax.Sequential(), None):
        found = elkax.evaluate_recurrence(cell, state, INPUTS, method=method)
        assert found.info.status == elkax.Status.CONVERGED
        assert_same(found.states, exact)
    for options in ({"method": elkax.DEER()}, {"error_tolerance": 1e-3}):
        with pytest.raises(TypeError, match=message + r".*elkax\.Sequential\(\)"):
            elkax.evaluate_recurrence(cell, state, INPUTS, **options)
    reason = elkax.explain(cell, state, INPUTS, platform="gpu")
    assert reason.startswith("Sequential") and "depend on each other" in reason


def test_complex_states_step_by_step():
    state = jnp.ones(3, complex)
    found = elkax.evaluate_recurrence(rotates, state, INPUTS, method=elkax.Sequential())
    assert_same(found.states, problems.sequential(Partial(rotates), state, INPUTS))
    infinite = elkax.evaluate_recurrence(rotates, state, INPUTS.at[7].set(jnp.inf))
    assert infinite.info.status == elkax.Status.NONFINITE and infinite.info.prefix == 7


def test_explanation_on_an_accelerator():
    long = jnp.zeros((300, 3))
    assert "D = 3 is cheap" in elkax.explain(CELL, STATE, long, platform="gpu")
    nothing = elkax.explain(lambda n, x: n + 1, 0, long, platform="gpu")
    assert nothing.startswith("Sequential") and "no entry" in nothing


def test_other_functions_name_the_type():
    states = problems.sequential(CELL, STATE, INPUTS)
    with pytest.raises(TypeError, match="initial_state .*one floating-point type.*bool.*key"):
        elkax.lyapunov_exponent(CELL, STATE, INPUTS, states)
