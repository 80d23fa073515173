"""What can be known to be wrong before a recurrence is evaluated is named."""

import jax
import jax.numpy as jnp
import pytest

import elkax

pytestmark = pytest.mark.usefixtures("unchecked")
STATE, INPUTS = jnp.zeros(3), jnp.zeros((5, 3))


def cell(state, x):
    return 0.5 * state + x


OPTIONS = {
    "method": [(elkax.DEER, TypeError), ("DEER", TypeError), (elkax.Full(), TypeError)],
    "gradient": [(elkax.Implicit, TypeError), ("implicit", TypeError)],
    "guess": [
        ("ones", ValueError),
        (jnp.zeros((4, 3)), ValueError),
        ((jnp.zeros((5, 3)), jnp.zeros((5, 3))), ValueError),
    ],
    "on_failure": [("raise", ValueError), (None, ValueError)],
    "window": [(6, ValueError), (0, ValueError), (2.5, ValueError), (True, ValueError)],
    "block": [(0, ValueError), (2.5, ValueError)],
    "max_iters": [(-1, ValueError), (2.5, ValueError)],
    "length": [(0, ValueError), (6, ValueError), (2.5, ValueError), ([1, 2], ValueError)],
    "num_timesteps": [(4, ValueError), (0, ValueError)],
    "backend": [(elkax.Blocked, TypeError), ("blocked", TypeError)],
}


@pytest.mark.parametrize(
    "name, value, error", [(n, *case) for n, cases in OPTIONS.items() for case in cases]
)
def test_wrong_options_are_named(name, value, error):
    options = {"method": elkax.DEER()} | {name: value}
    with pytest.raises(error, match=name):
        elkax.evaluate_recurrence(cell, STATE, INPUTS, **options)


def keeps(state, x):
    return state


CELLS = {
    "another shape": (lambda s, x: s[:2], STATE, ValueError, r"cell .*\[3\].*\[2\]"),
    "a broadcast state": (lambda s, x: s + x, jnp.zeros(()), ValueError, r"cell .*\[\].*\[3\]"),
    "another tree": (lambda s, x: [s, x], STATE, ValueError, "cell must return a state like"),
    "nothing": (lambda s, x: None, STATE, ValueError, "cell must return a state like"),
    "another type": (lambda s, x: s.astype("float32"), STATE, TypeError, "float64.*float32"),
    "promoted": (lambda s, x: s + x, jnp.zeros(3, "float32"), TypeError, "float32.*float64"),
    "no function": ("cell", STATE, TypeError, "cell must be a function"),
    "carry and output": (lambda s, x: (s, x), STATE, ValueError, "new state alone.*carry, output"),
    "no state": (keeps, (), TypeError, "initial_state .*no array"),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("method", [elkax.DEER(), elkax.Sequential(), None], ids=str)
def test_wrong_cells_and_states_are_named(name, method):
    wrong, state, error, message = CELLS[name]
    with pytest.raises(error, match=message):
        elkax.evaluate_recurrence(wrong, state, INPUTS, method=method)


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        (INPUTS[:0], {}, "T = 0"),
        (None, {}, "num_timesteps"),
        (None, {"num_timesteps": 0}, "num_timesteps"),
        ((INPUTS, INPUTS[:4]), {}, "common leading length"),
        (jnp.zeros(()), {}, "leading length"),
        (INPUTS, {"num_timesteps": 4}, "num_timesteps = 4"),
    ],
    ids=str,
)
def test_wrong_lengths_are_named(inputs, options, message):
    for method in (elkax.DEER(), elkax.Sequential()):
        with pytest.raises(ValueError, match=message):
            elkax.evaluate_recurrence(keeps, STATE, inputs, method=method, **options)


@pytest.mark.parametrize(
    "name, value", [("window", 6), ("guess", "ones"), ("gradient", "implicit"), ("on_failure", 1)]
)
def test_options_are_checked_where_the_method_has_no_use_for_them(name, value):
    for method in (None, elkax.Sequential()):
        with pytest.raises((ValueError, TypeError), match=name):
            elkax.evaluate_recurrence(cell, STATE, INPUTS, method=method, **{name: value})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"jacobian": elkax.Full}, TypeError, "jacobian"),
        ({"jacobian": "full"}, TypeError, "jacobian"),
        ({"damping": elkax.ConstantDamping}, TypeError, "damping"),
        ({"damping": 1e-3}, TypeError, "damping"),
        ({"form": "smooth"}, ValueError, "form"),
        ({"jacobian": elkax.Zero(), "damping": elkax.ConstantDamping()}, ValueError, "damp"),
        ({"jacobian": elkax.Identity(), "damping": elkax.PrefixDamping()}, ValueError, "damp"),
    ],
    ids=str,
)
def test_wrong_methods_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        elkax.Method(**({"jacobian": elkax.Full()} | arguments))


def test_blocks_that_do_not_divide_the_state():
    with pytest.raises(ValueError, match="block.* 2 .*divide.* 3"):
        method = elkax.QuasiDEER(elkax.BlockDiagonal(2))
        elkax.evaluate_recurrence(cell, STATE, INPUTS, method=method)


def test_a_declared_structure_that_is_none():
    class Declared:
        jacobian_structure = "diagonal"

        def __call__(self, state, x):
            return cell(state, x)

    with pytest.raises(TypeError, match="jacobian_structure"):
        elkax.evaluate_recurrence(Declared(), STATE, INPUTS, method=elkax.DEER())


def test_merit_damping_has_no_window():
    with pytest.raises(ValueError, match="window"):
        method = elkax.ELK(elkax.LevenbergMarquardt())
        elkax.evaluate_recurrence(cell, STATE, INPUTS, method=method, window=2)


def test_a_traced_window_cannot_be_a_size():
    with pytest.raises(ValueError, match="window"):
        jax.jit(
            lambda w: (
                elkax.evaluate_recurrence(cell, STATE, INPUTS, method=elkax.DEER(), window=w).states
            )
        )(2)
