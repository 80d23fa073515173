"""Weights of other libraries, from plain arrays under their names."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elkax.cells.gru import GRU, ParamsGRU
from elkax.cells.lstm import LSTM, ParamsLSTM

Converted = ParamsGRU | ParamsLSTM
# Names of the gates in Flax, in the order of our parameters, which is PyTorch's as well.
GATES = {"GRU": "rzn", "LSTM": "ifgo"}


def from_torch(cell: GRU | LSTM, state_dict: Mapping[str, Any]) -> Converted:
    """Convert the weights of one layer of `torch.nn.GRU` or `torch.nn.LSTM`.

    Args:
        cell: a `GRU` whose reset comes after the product, or an `LSTM`.
        state_dict: arrays under PyTorch's names, `weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0` and
            `bias_hh_l0`, without the biases where the layer has none; of another layer or the
            backward direction, all with its suffix, such as `_l1` or `_l0_reverse`. What
            `module.state_dict()` gives may be passed as it is.

    Returns:
        Parameters of the cell, in the type of the arrays.

    Raises:
        TypeError: on another cell.
        ValueError: on names that are missing or unknown, and shapes that do not fit.
    """
    gates = _gates(cell)
    suffix = _suffix(state_dict)
    weights = [f"weight_ih{suffix}", f"weight_hh{suffix}"]
    biases = [f"bias_ih{suffix}", f"bias_hh{suffix}"]
    with_bias = any(name in state_dict for name in biases)
    _check_names(state_dict, weights + (biases if with_bias else []))
    count, size = len(gates), cell.state_dim
    into, recurrent = (
        _take(state_dict, name, (count * size, width)).reshape((count, size, width))
        for name, width in zip(weights, (cell.input_dim, size), strict=True)
    )
    zero = jnp.zeros((count, size), into.dtype)
    one, two = (
        _take(state_dict, name, (count * size,)).reshape((count, size)) if with_bias else zero
        for name in biases
    )
    return _params(cell, recurrent, into, one, two)


def from_flax(cell: GRU | LSTM, params: Mapping[str, Any]) -> Converted:
    """Convert the parameters of `flax.linen.GRUCell`, `LSTMCell` or `OptimizedLSTMCell`.

    Args:
        cell: a `GRU` whose reset comes after the product, or an `LSTM`.
        params: what Flax has under "params": for every gate, such as "ir" and "hr", a "kernel" and,
            where it has one, a "bias".

    Returns:
        Parameters of the cell, in the type of the arrays.

    Raises:
        TypeError: on another cell.
        ValueError: on names that are missing or unknown, and shapes that do not fit.
    """
    gates = _gates(cell)
    _check_names(params, [side + gate for side in "ih" for gate in gates])

    def read(side: str, width: int) -> tuple[Array, Array]:
        kernels, biases = [], []
        for gate in gates:
            part = params[side + gate]
            named = {f"{side}{gate}/{name}": value for name, value in part.items()}
            kernel, bias = f"{side}{gate}/kernel", f"{side}{gate}/bias"
            _check_names(named, [kernel, *({bias} & set(named))])
            kernels.append(_take(named, kernel, (width, cell.state_dim)).T)
            zero = jnp.zeros(cell.state_dim, kernels[-1].dtype)
            biases.append(_take(named, bias, zero.shape) if bias in named else zero)
        return jnp.stack(kernels), jnp.stack(biases)

    into, one = read("i", cell.input_dim)
    recurrent, two = read("h", cell.state_dim)
    return _params(cell, recurrent, into, one, two)


def _gates(cell: Any) -> str:
    if isinstance(cell, GRU) and cell.reset == "after" or isinstance(cell, LSTM):
        return GATES[type(cell).__name__]
    raise TypeError(f'cell must be a GRU with reset="after" or an LSTM, got {cell!r}')


def _params(cell: GRU | LSTM, recurrent: Array, into: Array, one: Array, two: Array) -> Converted:
    """Assemble parameters; `one` and `two` are biases beside input and recurrent weights."""
    if isinstance(cell, LSTM):
        return ParamsLSTM(recurrent, into, one + two)
    # That of the candidate is inside of the reset.
    return ParamsGRU(recurrent, into, one.at[:2].add(two[:2]), two[2])


def _suffix(names: Iterable[str]) -> str:
    """Return what follows `weight_ih` in the names."""
    found = [name.removeprefix("weight_ih") for name in names if name.startswith("weight_ih")]
    return found[0] if len(found) == 1 else "_l0"


def _check_names(given: Mapping[str, Any], expected: Iterable[str]) -> None:
    if set(given) != set(expected):
        raise ValueError(f"expected arrays named {sorted(expected)}, got {sorted(given)}")


def _take(given: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Array:
    value = jnp.asarray(np.asarray(given[name]))
    if value.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {value.shape}")
    return value
