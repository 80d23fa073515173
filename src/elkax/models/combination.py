"""Sum of independent components."""

import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from dynamax.linear_gaussian_ssm.inference import (
    ParamsLGSSMDynamics,
    ParamsLGSSMEmissions,
    ParamsLGSSMInitial,
)
from jaxtyping import Array, Shaped


def combine(*components: ParamsLGSSM) -> ParamsLGSSM:
    r"""Add up independent components, for instance trend + seasonal + regression.

    With components $y^{(i)}_t = H_i z^{(i)}_t + D_i u_t + d_i + \varepsilon^{(i)}_t$ of the same
    number N of emissions, the sum $y_t = \sum_i y^{(i)}_t$ has the stacked state
    $(z^{(1)}_t, z^{(2)}_t, \dots)$, block-diagonal $F$, $Q$ and $P_0$, emission weights
    $[H_1, H_2, \dots]$, stacked $b$ and $B$, and summed $d$, $D$ and $R$.

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
    _common("emission dimension N", {part.emissions.weights.shape[-2] for part in parts})
    _common("number of time steps T", {length for part in parts for length in _lengths(part)})
    dynamics = [part.dynamics for part in parts]
    emissions = [part.emissions for part in parts]
    return ParamsLGSSM(
        initial=ParamsLGSSMInitial(
            mean=jnp.concatenate([part.initial.mean for part in parts]),
            cov=_block_diagonal([part.initial.cov for part in parts]),
        ),
        dynamics=ParamsLGSSMDynamics(
            weights=_block_diagonal([part.weights for part in dynamics]),
            bias=_concatenate([part.bias for part in dynamics], 1, axis=-1),
            input_weights=_concatenate([part.input_weights for part in dynamics], 2, axis=-2),
            cov=_block_diagonal([part.cov for part in dynamics]),
        ),
        emissions=ParamsLGSSMEmissions(
            weights=_concatenate([part.weights for part in emissions], 2, axis=-1),
            bias=_add([part.bias for part in emissions], 1),
            input_weights=_add([part.input_weights for part in emissions], 2),
            cov=_add([part.cov for part in emissions], 2),
        ),
    )


def _common(what: str, values: set[int]) -> int | None:
    """Give the one value in a set, None if it is empty."""
    if len(values) > 1:
        raise ValueError(f"components must share one {what}, got {sorted(values)}")
    return next(iter(values), None)


def _inputs(params: ParamsLGSSM) -> set[int]:
    weights = (params.dynamics.input_weights, params.emissions.input_weights)
    return {jnp.shape(value)[-1] for value in weights if value is not None}


def _written_out(params: ParamsLGSSM, input_dim: int) -> ParamsLGSSM:
    """Put zeros where a component has None or no inputs, and a full matrix for a diagonal R."""
    if any(callable(value) for part in params for value in part):
        raise TypeError("combine needs parameters as arrays, got a function of time")
    N, D = params.emissions.weights.shape[-2:]
    dtype = params.emissions.weights.dtype

    def vector(value: Array | None, size: int) -> Array:
        return jnp.zeros(size, dtype) if value is None else value

    def input_weights(value: Array | None, size: int) -> Array:
        return jnp.zeros((size, input_dim), dtype) if value is None or 0 in value.shape else value

    R = params.emissions.cov
    if R.shape[-2:] != (N, N):
        R = R[..., None] * jnp.eye(N, dtype=R.dtype)
    return ParamsLGSSM(
        initial=params.initial,
        dynamics=params.dynamics._replace(
            bias=vector(params.dynamics.bias, D),
            input_weights=input_weights(params.dynamics.input_weights, D),
        ),
        emissions=params.emissions._replace(
            bias=vector(params.emissions.bias, N),
            input_weights=input_weights(params.emissions.input_weights, N),
            cov=R,
        ),
    )


def _lengths(params: ParamsLGSSM) -> set[int]:
    """Collect the lengths of the time axes of a written-out component."""
    vectors = (params.dynamics.bias, params.emissions.bias)
    matrices = (*params.dynamics[:1], *params.dynamics[2:], *params.emissions[:1])
    matrices += params.emissions[2:]
    varying = [value for value in vectors if value.ndim == 2]
    varying += [value for value in matrices if value.ndim == 3]
    return {value.shape[0] for value in varying}


def _aligned(values: list[Array], rank: int) -> list[Array]:
    """Broadcast over time those without a time axis, if one has it; `rank` is without time."""
    times = next((value.shape[:1] for value in values if value.ndim > rank), ())
    return [jnp.broadcast_to(value, times + value.shape[-rank:]) for value in values]


def _concatenate(values: list[Array], rank: int, axis: int) -> Array:
    return jnp.concatenate(_aligned(values, rank), axis=axis)


def _add(values: list[Array], rank: int) -> Array:
    return jnp.sum(jnp.stack(_aligned(values, rank)), axis=0)


def _block_diagonal(values: list[Array]) -> Shaped[Array, "... D D"]:
    """Put square matrices on the diagonal."""
    values = _aligned(values, 2)
    size = sum(value.shape[-1] for value in values)
    rows, start = [], 0
    for value in values:
        width = value.shape[-1]
        margins = ((0, 0),) * (value.ndim - 1) + ((start, size - start - width),)
        rows.append(jnp.pad(value, margins))
        start += width
    return jnp.concatenate(rows, axis=-2)
