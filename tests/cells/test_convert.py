"""Weights of PyTorch and Flax: what these make of them, and what is made of them here.

The numbers come from PyTorch 2.14.1 and Flax 0.12.12, in float64.
"""

from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest

from elkax import cells

INPUTS = np.array([[0.3], [-1.0], [2.0]])
HIDDEN, CELL = np.array([0.5, -0.25]), np.array([1.0, -1.0])
CELLS = {"GRU": cells.GRU(1, 2), "LSTM": cells.LSTM(1, 2)}
STARTS = {"GRU": HIDDEN, "LSTM": cells.StateLSTM(cell=CELL, hidden=HIDDEN)}

TORCH = {
    "GRU": (
        {
            "weight_ih_l0": [[0.3], [0.8], [0.3], [-1.3], [0.9], [0.4]],
            "weight_hh_l0": [
                [-0.5, 0.6],
                [0.4, 0.3],
                [0.0, 0.5],
                [-0.7, -0.2],
                [-0.5, 0.6],
                [0.0, -0.3],
            ],
            "bias_ih_l0": [-0.8, -0.3, 0.0, -0.3, 1.3, 1.0],
            "bias_hh_l0": [-2.7, -1.9, -0.2, -0.4, 0.2, 0.2],
        },
        [
            [0.7325145013474663, 0.6069048069833816],
            [0.5409896856129385, 0.5718615938485132],
            [0.6934139983464201, 0.9398186292131442],
        ],
    ),
    "LSTM": (
        {
            "weight_ih_l0": [[2.1], [-1.1], [-0.4], [2.0], [0.6], [0.7], [-0.5], [-1.6]],
            "weight_hh_l0": [
                [0.2, 0.1],
                [-1.2, -0.7],
                [-0.1, -0.9],
                [-0.1, 0.1],
                [0.0, -0.5],
                [0.6, 0.9],
                [0.3, -0.8],
                [0.7, -0.5],
            ],
            "bias_ih_l0": [0.9, -1.1, 0.9, -0.0, -1.2, -0.3, 0.1, 0.3],
            "bias_hh_l0": [-1.0, -1.1, 0.2, -0.5, 0.2, 0.8, -1.6, 0.3],
        },
        [
            [0.07610793742396459, -0.28439936818680733],
            [0.07193788915232986, -0.12738515315603216],
            [0.03159461205833964, -0.009493434449012909],
        ],
    ),
}
FLAX = {
    "GRU": (
        {
            "hn": {"bias": [0.1, -0.1], "kernel": [[0.6, 0.1], [-0.5, 0.4]]},
            "hr": {"kernel": [[1.3, 0.9], [-0.7, -1.3]]},
            "hz": {"kernel": [[-0.6, 0.0], [-2.3, -0.2]]},
            "in": {"bias": [-1.2, -0.7], "kernel": [[-0.5, -0.3]]},
            "ir": {"bias": [0.4, 1.0], "kernel": [[-0.1, 1.4]]},
            "iz": {"bias": [-0.7, 0.4], "kernel": [[0.9, 0.1]]},
        },
        [
            [-0.16710199779047102, -0.43280829031843593],
            [-0.38015874930044635, -0.45892624641206836],
            [-0.43022524315654287, -0.6141106116439333],
        ],
    ),
    "LSTM": (
        {
            "hf": {"bias": [-0.7, -0.9], "kernel": [[-0.5, 0.2], [-1.0, -0.2]]},
            "hg": {"bias": [-0.2, 0.5], "kernel": [[0.2, 0.4], [-0.7, -0.1]]},
            "hi": {"bias": [0.8, 1.5], "kernel": [[-1.3, 1.5], [1.3, 0.8]]},
            "ho": {"bias": [0.3, -0.3], "kernel": [[1.5, 2.0], [1.8, 1.3]]},
            "if": {"kernel": [[0.4, -1.2]]},
            "ig": {"kernel": [[-0.0, 0.7]]},
            "ii": {"kernel": [[-1.3, 0.4]]},
            "io": {"kernel": [[0.4, 0.7]]},
        },
        [
            [0.24749219332775593, 0.24945028705457317],
            [-0.13789784917635725, 0.05880928772477472],
            [-0.11300242059094918, 0.4932914061130974],
        ],
    ),
    "OptimizedLSTM": (
        {
            "hf": {"bias": [-1.2, -0.7], "kernel": [[-0.4, -1.2], [1.7, -0.5]]},
            "hg": {"bias": [0.3, -0.3], "kernel": [[1.6, 1.3], [0.6, -2.2]]},
            "hi": {"bias": [0.1, 0.7], "kernel": [[1.0, -0.6], [1.8, -1.3]]},
            "ho": {"bias": [-0.7, 0.9], "kernel": [[0.0, 2.0], [0.2, -0.6]]},
            "if": {"kernel": [[-0.4, -1.1]]},
            "ig": {"kernel": [[-1.3, 0.6]]},
            "ii": {"kernel": [[0.6, 1.3]]},
            "io": {"kernel": [[-0.8, 1.7]]},
        },
        [
            [0.10767476442930515, 0.3650366961451065],
            [0.3391132024300643, -0.0015770300552327972],
            [-0.05571998404043231, 0.6784064129520004],
        ],
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch(name):
    weights, outputs = TORCH[name]
    weights = OrderedDict((key, np.array(value)) for key, value in weights.items())
    params = cells.from_torch(CELLS[name], weights)
    got = cells.run(CELLS[name], params, INPUTS, STARTS[name])
    np.testing.assert_allclose(got.outputs, outputs, rtol=1e-14)
    second = {key.replace("_l0", "_l1_reverse"): value for key, value in weights.items()}
    for one, two in zip(params, cells.from_torch(CELLS[name], second), strict=True):
        np.testing.assert_array_equal(one, two)
    short = {key: value.astype("float32") for key, value in weights.items() if "bias" not in key}
    params = cells.from_torch(CELLS[name], short)
    assert params.bias.dtype == jnp.float32 and not np.any(params.bias)


@pytest.mark.parametrize("name", CELLS)
def test_torch_where_it_is_installed(name):
    torch = pytest.importorskip("torch")
    module = getattr(torch.nn, name)(2, 3)
    cell = type(CELLS[name])(2, 3)
    inputs = torch.randn(7, 2)
    got = cells.run(cell, cells.from_torch(cell, module.state_dict()), inputs.numpy())
    expected = module(inputs)[0].detach().numpy()
    np.testing.assert_allclose(got.outputs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FLAX)
def test_flax(name):
    weights, outputs = FLAX[name]
    name = name.removeprefix("Optimized")
    params = cells.from_flax(CELLS[name], weights)
    got = cells.run(CELLS[name], params, INPUTS, STARTS[name])
    np.testing.assert_allclose(got.outputs, outputs, rtol=1e-14)


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


GRU, LSTM = cells.GRU(1, 2), cells.LSTM(1, 2)
WEIGHTS, PARAMS = TORCH["GRU"][0], FLAX["LSTM"][0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "convert, cell, weights, error, message",
    [
        (cells.from_torch, GRU, WEIGHTS | {"weight_hr_l0": 0}, ValueError, "got .*weight_hr_l0"),
        (cells.from_torch, GRU, without(WEIGHTS, "bias_hh_l0"), ValueError, "named .*bias_hh_l0"),
        (cells.from_torch, GRU, {}, ValueError, r"named .*weight_ih_l0.* got \[\]"),
        (
            cells.from_torch,
            LSTM,
            WEIGHTS,
            ValueError,
            r"weight_ih_l0 must be \(8, 1\), got \(6, 1\)",
        ),
        (cells.from_torch, cells.GRU(1, 2, "before"), WEIGHTS, TypeError, 'reset="after"'),
        (cells.from_torch, cells.GILR(1, 2), WEIGHTS, TypeError, "cell must be a GRU .* got GILR"),
        (cells.from_flax, LSTM, PARAMS | {"ix": {}}, ValueError, "got .*ix"),
        (cells.from_flax, LSTM, without(PARAMS, "hf"), ValueError, "named .*hf"),
        (cells.from_flax, LSTM, PARAMS | {"hf": {"bias": 0}}, ValueError, "hf/kernel"),
        (cells.from_flax, LSTM, PARAMS | {"if": {"kernel": [[0.0]]}}, ValueError, "if/kernel must"),
        (cells.from_flax, GRU, PARAMS, ValueError, "named .*'hn'"),
        (cells.from_flax, cells.Elman(1, 2), PARAMS, TypeError, "cell must be .* got Elman"),
    ],
)
def test_what_does_not_fit_is_named(convert, cell, weights, error, message):
    with pytest.raises(error, match=message):
        convert(cell, weights)
