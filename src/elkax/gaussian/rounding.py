r"""What rounding may have left in a covariance: the scale by which an exact zero is told.

A measurement without error (r = 0) of what is already known has the innovation variance
$h^\top Ph = 0$, of which rounding leaves something. Beside P is carried E, by the same recursions:
in units of $\epsilon$ (of $\epsilon^2$ for factors) the sizes of the terms that P was summed from.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.covariance import Covariance
from elkax.scan import lanes
from elkax.scan.lanes import dot, matvec


def of_prediction(form: Any, weights: Array, error: Array, stored: Array, noise: Array) -> Array:
    r"""Compute $FEF^\top + \epsilon\,\mathrm{diag}((|F|\sigma)^2 + q)$.

    Args:
        form: how P and Q are stored.
        weights: $F$.
        error: $E$ of P.
        stored: P; $\sigma$ are its standard deviations.
        noise: Q, of variances q.
    """
    weights, stored, noise = jax.lax.stop_gradient((weights, stored, noise))
    terms = matvec(jnp.abs(weights), jnp.sqrt(form.variances(stored))) ** 2
    size = lanes.add(terms, form.variances(noise))
    return Covariance().predict(weights, error, _diagonal(form, size))


def of_correction(
    form: Any, error: Array, stored: Array, row: Array, variance: Array, gain: Array
) -> Array:
    r"""Compute $AEA^\top + \epsilon\,\mathrm{diag}((|A|\sigma)^2 + rk^2)$ with $A = I - kh^\top$.

    Args:
        form: how P is stored.
        error: $E$ of P.
        stored: P before the correction; $\sigma$ are its standard deviations.
        row: $h$.
        variance: $r$.
        gain: $k$, zero where there is no correction, which leaves E as it is.
    """
    stored, row, variance, gain = jax.lax.stop_gradient((stored, row, variance, gain))
    sd = jnp.sqrt(form.variances(stored))
    far = lanes.scale(jnp.abs(gain), dot(jnp.abs(row), sd))
    size = lanes.add(sd, far) ** 2 + lanes.scale(gain * gain, variance)
    corrected = Covariance().correct(error, row, jnp.zeros_like(variance), gain)
    changed = jnp.any(gain != 0, axis=0)
    return corrected + _diagonal(form, size * changed)


def tells_nothing(
    form: Any, error: Array | None, row: Array, variance: Array, s: Array
) -> Array | bool:
    r"""Tell whether r = 0 and $h^\top Ph$ is at the level of rounding: at most 8 (64) $h^\top Eh$.

    Measurements with an error of their own always tell something. NaN is not told apart here.

    Args:
        form: how P is stored.
        error: $E$, None where no measurement is without error.
        row: $h$.
        variance: $r$.
        s: innovation variance.
    """
    if error is None:
        return False
    row, s = jax.lax.stop_gradient((row, s))
    _, units = form.rounding(s.dtype)
    return (variance == 0) & (s <= units * dot(row, matvec(error, row)))


def contradicts(
    form: Any, error: Array | None, row: Array, mean: Array, value: Array, residual: Array
) -> Array:
    r"""Tell whether a residual is more than rounding, where its variance is zero.

    Above $1000\epsilon(|y| + |h|^\top|m|) + 8(h^\top Eh)^{1/2}$.

    Args:
        form: how P is stored.
        error: $E$, None where no measurement is without error.
        row: $h$.
        mean: $m$.
        value: $y$.
        residual: $y - h^\top m$.
    """
    if error is None:
        return jnp.zeros(residual.shape, bool)
    row, mean, value, residual = jax.lax.stop_gradient((row, mean, value, residual))
    eps = jnp.finfo(residual.dtype).eps
    terms = jnp.abs(value) + dot(jnp.abs(row), jnp.abs(mean))
    noise = jnp.sqrt(jnp.maximum(dot(row, matvec(error, row)), 0.0))
    terms, noise = lanes.align(1000 * eps * terms, 0, 8 * noise, 0)
    return jnp.abs(residual) > terms + noise


def _diagonal(form: Any, size: Array) -> Array:
    unit, _ = form.rounding(size.dtype)
    return unit * lanes.identity(size.shape[0], size.shape[1:], size.dtype) * size[None]
