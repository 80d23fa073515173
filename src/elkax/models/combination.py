"""Sum of independent components."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from dynamax.linear_gaussian_ssm.inference import (
    ParamsLGSSMDynamics,
    ParamsLGSSMEmissions,
    ParamsLGSSMInitial,
)
from jaxtyping import Array, Shaped

from elkax.smoothers.diffuse_initial import DiffuseInitial
from elkax.smoothers.prepare import diffuse_mask


def combine(*components: ParamsLGSSM) -> ParamsLGSSM:
    r"""Add up independent components, for instance trend + seasonal + regression.

    With components $y^{(i)}_t = H_i z^{(i)}_t + D_i u_t + d_i + \varepsilon^{(i)}_t$ of the same
    number N of emissions, the sum $y_t = \sum_i y^{(i)}_t$ has the stacked state
    $(z^{(1)}_t, z^{(2)}_t, \dots)$, block-diagonal $F$, $Q$ and $P_0$, emission weights
    $[H_1, H_2, \dots]$, stacked $b$ and $B$, and summed $d$, $D$ and $R$. States that start exactly
    diffuse in a component do so in the sum.

    Args:
        components: parameters as arrays, constant or with leading axis T; those of one field are
            broadcast over time as soon as one of them varies. Biases and input weights may be None,
            which is zero. Emission covariances may be diagonal: (N,) or (T, N).

    Returns:
        Parameters of the sum, D being the sum of the state dimensions, with full emission
        covariances.

    Raises:
        ValueError: if there is no component, or they differ in N, in T, or in the number of inputs.
        TypeError: if a parameter is a function of time.

    References:
        Durbin & Koopman (2012), "Time Series Analysis by State Space Methods", Sec. 3.2; Harvey
        (1989), "Forecasting, Structural Time Series Models and the Kalman Filter", Sec. 4.1.
    """
    if not components:
        raise ValueError("combine needs at least one component, got none")
    input_dim = _common("number of inputs", {n for each in components for n in _inputs(each)} - {0})
    parts = [_written_out(each, input_dim or 0) for each in components]
    _common("emission dimension N", {part.emission_weights.shape[-2] for part in parts})
    _common("number of time steps T", {length for part in parts for length in _lengths(part)})
    masks = [diffuse_mask(each.initial) for each in components]
    columns = _Arrays(
        *(_aligned(list(x), rank) for x, rank in zip(zip(*parts, strict=True), RANKS, strict=True))
    )
    initial = ParamsLGSSMInitial(
        mean=jnp.concatenate(columns.initial_mean), cov=_block_diagonal(columns.initial_cov)
    )
    diffuse = sum(masks, ())
    return ParamsLGSSM(
        initial=DiffuseInitial.of(*initial, diffuse) if any(diffuse) else initial,
        dynamics=ParamsLGSSMDynamics(
            weights=_block_diagonal(columns.weights),
            bias=jnp.concatenate(columns.bias, axis=-1),
            input_weights=jnp.concatenate(columns.input_weights, axis=-2),
            cov=_block_diagonal(columns.cov),
        ),
        emissions=ParamsLGSSMEmissions(
            weights=jnp.concatenate(columns.emission_weights, axis=-1),
            bias=_add(columns.emission_bias),
            input_weights=_add(columns.emission_input_weights),
            cov=_add(columns.emission_cov),
        ),
    )


class _Arrays(NamedTuple):
    """The parameters of one component, or lists of those of all."""

    initial_mean: Any
    initial_cov: Any
    weights: Any
    bias: Any
    input_weights: Any
    cov: Any
    emission_weights: Any
    emission_bias: Any
    emission_input_weights: Any
    emission_cov: Any


# Number of axes of each without time.
RANKS = _Arrays(1, 2, 2, 1, 2, 2, 2, 1, 2, 2)


def _common(what: str, values: set[int]) -> int | None:
    """Give the one value in a set, None if it is empty."""
    if len(values) > 1:
        raise ValueError(f"components must share one {what}, got {sorted(values)}")
    return next(iter(values), None)


def _inputs(params: ParamsLGSSM) -> set[int]:
    weights: tuple[Any, Any] = (params.dynamics.input_weights, params.emissions.input_weights)
    return {value.shape[-1] for value in weights if value is not None and not callable(value)}


def _written_out(params: ParamsLGSSM, input_dim: int) -> _Arrays:
    """Put zeros where a component has None or no inputs, and a full matrix for a diagonal R."""
    values = _Arrays(*params.initial, *params.dynamics, *params.emissions)
    if any(callable(value) for value in values):
        raise TypeError("combine needs parameters as arrays, got a function of time")
    N, D = values.emission_weights.shape[-2:]
    dtype = values.emission_weights.dtype

    def vector(value: Array | None, size: int) -> Array:
        return jnp.zeros(size, dtype) if value is None else value

    def input_weights(value: Array | None, size: int) -> Array:
        return jnp.zeros((size, input_dim), dtype) if value is None or 0 in value.shape else value

    R = values.emission_cov
    return values._replace(
        bias=vector(values.bias, D),
        input_weights=input_weights(values.input_weights, D),
        emission_bias=vector(values.emission_bias, N),
        emission_input_weights=input_weights(values.emission_input_weights, N),
        emission_cov=R if R.shape[-2:] == (N, N) else R[..., None] * jnp.eye(N, dtype=R.dtype),
    )


def _lengths(values: _Arrays) -> set[int]:
    """Collect the lengths of the time axes."""
    pairs = zip(values, RANKS, strict=True)
    return {value.shape[0] for value, rank in pairs if value.ndim > rank}


def _aligned(values: list[Array], rank: int) -> list[Array]:
    """Broadcast over time those without a time axis, if one has it."""
    times = next((value.shape[:1] for value in values if value.ndim > rank), ())
    return [jnp.broadcast_to(value, times + value.shape[-rank:]) for value in values]


def _add(values: list[Array]) -> Array:
    return jnp.sum(jnp.stack(values), axis=0)


def _block_diagonal(values: list[Array]) -> Shaped[Array, "... D D"]:
    """Put square matrices on the diagonal."""
    size = sum(value.shape[-1] for value in values)
    rows, start = [], 0
    for value in values:
        width = value.shape[-1]
        margins = ((0, 0),) * (value.ndim - 1) + ((start, size - start - width),)
        rows.append(jnp.pad(value, margins))
        start += width
    return jnp.concatenate(rows, axis=-2)
