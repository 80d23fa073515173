"""What can be known to be wrong before a cell is run is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from elkax import cells

pytestmark = pytest.mark.usefixtures("unchecked")
X, BATCH = np.zeros((5, 2)), np.zeros((4, 5, 2))


def spoiled(value, *index):
    batch = BATCH.copy()
    batch[index] = value
    return batch


@pytest.mark.parametrize(
    "inputs, options, error, message",
    [
        (np.zeros((5, 3)), {}, ValueError, r"inputs must .* U = 2.*\(5, 3\)"),
        (np.zeros(5), {}, ValueError, r"inputs must .*\(5,\)"),
        (X[:0], {}, ValueError, r"inputs must .*at least 1.*\(0, 2\)"),
        (BATCH[:0], {}, ValueError, r"inputs must .*at least 1.*\(0, 5, 2\)"),
        (X.astype(int), {}, TypeError, "inputs must .*int64"),
        (X + 1j, {}, TypeError, "inputs must .*complex128"),
        (
            spoiled(np.nan, 2, 3, 1),
            {},
            ValueError,
            "inputs must be finite, .*nan in sequence 2.* 3",
        ),
        (spoiled(np.inf, 1), {}, ValueError, "inputs must be finite, .*inf in sequence 1.* 0"),
        (spoiled(np.nan, 3)[3], {"length": 1}, ValueError, "nan in step 0"),
        (X, {"resets": np.zeros(4, bool)}, ValueError, r"resets must be \(5,\).*\(4,\)"),
        (BATCH, {"resets": np.zeros(5, bool)}, ValueError, r"resets must be \(4, 5\).*\(5,\)"),
        (X, {"resets": np.zeros(5)}, TypeError, "resets must be bools"),
        (X, {"length": 6}, ValueError, "length must lie in .* T = 5, got 6"),
        (BATCH, {"length": [1, -1, 0, 5]}, ValueError, "length must lie in"),
        (BATCH, {"length": 3}, ValueError, r"length must be \(B,\) = \(4,\)"),
        (X, {"length": [3]}, ValueError, "length must be one integer"),
        (X, {"length": 2.0}, TypeError, "length must be of integers"),
        (X, {"initial_state": np.zeros(2)}, ValueError, r"initial_state .*\(3,\).*\(2,\)"),
        (BATCH, {"initial_state": np.zeros((5, 3))}, ValueError, r"\(3,\) or \(4, 3\)"),
        (X, {"initial_state": (np.zeros(3),)}, ValueError, "initial_state must be like"),
        (X, {"initial_state": np.zeros(3) + 1j}, TypeError, "initial_state .*complex"),
        (X, {"method": elkax.DEER}, TypeError, r"method must be an object such as elkax.DEER\(\)"),
    ],
)
@pytest.mark.parametrize("cell", [cells.GILR(2, 3), cells.Elman(2, 3)], ids=str)
def test_wrong_arguments_are_named(cell, inputs, options, error, message):
    params = cell.initialize(jax.random.key(0))
    with pytest.raises(error, match=message):
        cells.run(cell, params, inputs, **options)


def test_padding_may_hold_anything():
    cell = cells.GILR(2, 3)
    params = cell.initialize(jax.random.key(0))
    got = cells.run(cell, params, spoiled(np.nan, 2, 3), length=np.array([5, 5, 3, 5]))
    assert np.all(np.isfinite(got.outputs)) and not np.any(np.asarray(got.info.status))


@pytest.mark.parametrize("wrong", [cells.GRU, "GRU", None])
def test_a_cell_that_is_none(wrong):
    with pytest.raises(TypeError, match="cell must be an object such as elkax.cells.GRU"):
        cells.run(wrong, None, X)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: cells.GRU(2, 0), "state_dim must be an integer of at least 1, got 0"),
        (lambda: cells.GRU(-1, 3), "input_dim must be an integer of at least 0, got -1"),
        (lambda: cells.GRU(2.0, 3), "input_dim must be an integer"),
        (lambda: cells.GRU(2, True), "state_dim must be an integer"),
        (lambda: cells.GRU(2, 3, reset="between"), 'reset must be "after" or "before"'),
        (lambda: cells.RGLRU(2, 3, sharpness=0.0), "sharpness must be positive, got 0.0"),
        (lambda: cells.DiagonalComplex(2, 3, least=0.9, most=0.8), "least and most .* 0.9 and 0.8"),
        (lambda: cells.DiagonalComplex(2, 3, phase=0.0), "phase must be positive, got 0.0"),
        (lambda: cells.DiagonalComplex(2, 3, output_dim=0), "output_dim must be an integer"),
        (lambda: cells.QRNN(2, 3, width=0), "width must be an integer of at least 1"),
    ],
)
def test_wrong_sizes_and_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parameters_of_another_size():
    params = cells.GRU(3, 4).initialize(jax.random.key(0))
    with pytest.raises(ValueError, match=r"params.input_weights must be \(3, 4, 2\) .*\(3, 4, 3\)"):
        cells.run(cells.GRU(2, 4), params, jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match="params must be like those of LSTM.*ParamsLSTM.*GRU"):
        cells.run(cells.LSTM(3, 4), params, jnp.zeros((5, 3)))
