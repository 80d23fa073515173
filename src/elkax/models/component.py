"""What every structural component is made of: checked variances and univariate parameters."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from dynamax.linear_gaussian_ssm.inference import (
    ParamsLGSSMDynamics,
    ParamsLGSSMEmissions,
    ParamsLGSSMInitial,
)
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from elkax.smoothers.diffuse_initial import DiffuseInitial

Numbers = ArrayLike | Sequence[ArrayLike]


def concrete(value: Numbers) -> np.ndarray | None:
    """Give the numbers of a value, or None while any of it is traced by a transformation."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
        return None
    return np.asarray(value)


def floating_dtype(*values: Numbers | None) -> jnp.dtype:
    """Give the floating-point dtype that the arguments of a component share.

    Python numbers and integers adapt to the arrays beside them.
    """
    return jnp.result_type(float, *jax.tree.leaves(values))


def variances(
    name: str, value: Numbers, dtype: jnp.dtype, size: int | None = None
) -> Float[Array, "..."]:
    """Check a variance, or a vector of them.

    Args:
        name: argument to name in errors.
        value: scalar, or where `size` is given also one value for each of `size` entries.
        dtype: of the result.
        size: length of the result; a scalar result if None.

    Returns:
        Array of shape () or (size,).

    Raises:
        ValueError: on another shape, or a value known to be negative.
    """
    array = _filled(name, value, dtype, size)
    known = concrete(value)
    if known is not None and np.any(known < 0):
        raise ValueError(f"{name} must not be negative, got {known}")
    return array


def initial_state(
    mean: Numbers | None, variance: Numbers | None, dtype: jnp.dtype, size: int
) -> ParamsLGSSMInitial:
    """Make the record of an initial state.

    Args:
        mean: None for zero, one number for all states, or (size,).
        variance: None if all states start exactly diffuse, one number for all, or (size,); those
            known to be infinite belong to diffuse states.
        dtype: of the arrays.
        size: D.

    Returns:
        dynamax's record, or a `DiffuseInitial` if a state is diffuse.

    Raises:
        ValueError: on another shape, a variance known to be negative, or a mean where all states
            are diffuse.
    """
    known = variances("initial_variance", 0.0 if variance is None else variance, dtype, size)
    diffuse = np.full(size, True) if variance is None else _infinite(variance, size)
    if mean is not None and diffuse.all():
        raise ValueError(
            "initial_mean has no effect on a start that is exactly diffuse: give a finite "
            f"initial_variance too, or leave initial_mean out, got {mean}"
        )
    center = _filled("initial_mean", 0.0 if mean is None else mean, dtype, size)
    if diffuse.any():
        return DiffuseInitial.of(center, jnp.diag(known), diffuse)
    return ParamsLGSSMInitial(mean=center, cov=jnp.diag(known))


def _infinite(value: Numbers, size: int) -> np.ndarray:
    """Tell which variances are known to be infinite, also those in a list with traced ones."""
    parts = value if isinstance(value, list | tuple) else [value]
    known = [not isinstance(part, Tracer) and np.isposinf(np.asarray(part)) for part in parts]
    flat = np.concatenate([np.atleast_1d(np.asarray(each)) for each in known])
    return np.broadcast_to(flat, (size,))


def _filled(name: str, value: Numbers, dtype: jnp.dtype, size: int | None) -> Array:
    array = jnp.asarray(value, dtype)
    if array.shape not in ((), () if size is None else (size,)):
        expected = "a scalar" if size is None else f"a scalar or of shape ({size},)"
        raise ValueError(f"{name} must be {expected}, got shape {array.shape}")
    return jnp.broadcast_to(array, () if size is None else (size,))


def component(
    *,
    initial: ParamsLGSSMInitial,
    weights: ArrayLike,
    cov: Float[Array, "D D"],
    emission_weights: ArrayLike,
    emission_variance: Float[Array, ""],
    emission_bias: ArrayLike = 0.0,
) -> ParamsLGSSM:
    """Put the pieces of a univariate component without inputs into dynamax's parameters."""
    dtype, size = cov.dtype, cov.shape[0]
    return ParamsLGSSM(
        initial=initial,
        dynamics=ParamsLGSSMDynamics(
            weights=jnp.asarray(weights, dtype),
            bias=jnp.zeros(size, dtype),
            input_weights=jnp.zeros((size, 0), dtype),
            cov=cov,
        ),
        emissions=ParamsLGSSMEmissions(
            weights=jnp.asarray(emission_weights, dtype),
            bias=jnp.asarray(emission_bias, dtype)[None],
            input_weights=jnp.zeros((1, 0), dtype),
            cov=emission_variance[None, None],
        ),
    )
