"""What arrays must hold: real numbers, covariances, one series; looked at where that is possible.

Values that are traced by a transformation cannot be looked at: those end in NaN when they are bad.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# Rounding of numbers that were computed in float32, whatever type they came in.
_ROUNDING = 1e-6
# Products of numbers in the factorizations that a check may take: well below a millisecond.
_WORK = 1_000_000
_SEVERAL = (
    "For several series use jax.vmap over one more leading axis, and with it length= where they "
    "differ in length, the shorter ones padded at their end"
)


def is_concrete(*values: Any) -> bool:
    """Tell whether the values can be looked at now, not only when the program runs."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def real_array(name: str, value: Any, *, booleans: bool = False) -> Array:
    """Return `value` as an array of real numbers, or raise TypeError that names it.

    Pandas objects and whatever else NumPy takes for an array are taken as NumPy does. `booleans`
    says whether there may be bools in their place.
    """
    try:
        if not isinstance(value, jax.Array) and hasattr(value, "__array__"):
            value = np.asarray(value)
            if value.dtype.kind in "iu" and value.dtype.itemsize > jnp.result_type(int).itemsize:
                # Cut to 32 bits, a large integer would become another one.
                value = value.astype(float)
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be an array of real numbers, got {type(value)}") from error
    if booleans and array.dtype == bool:
        return array
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    return array


def series_array(emissions: Any, weights: Any) -> Array:
    """Return the emissions of one series as (T, N).

    Args:
        emissions: (T, N), or (T,) where the model has one emission.
        weights: the model's emission weights (N, D), (T, N, D) or a callable of t, for N.

    Raises:
        ValueError: on another shape, or more than one series.
        TypeError: on an array that holds no real numbers.
    """
    if isinstance(emissions, list | tuple):
        shapes = [np.shape(each) if hasattr(each, "shape") else () for each in emissions]
        if any(len(shape) > 1 or shape != shapes[0] for shape in shapes):
            raise ValueError(
                "emissions must be one series (T, N), got a list of arrays of shapes "
                f"{', '.join(map(str, shapes[:3]))}{', ...' if len(shapes) > 3 else ''}. {_SEVERAL}"
            )
    emissions = real_array("emissions", emissions)
    size = _emission_dim(weights)
    shape = emissions.shape
    if emissions.ndim == 1 and size == 1:
        emissions = emissions[:, None]
    if emissions.ndim != 2 or 0 in emissions.shape or size not in (None, emissions.shape[1]):
        known = "" if size is None else f", here N = {size} by params.emissions.weights"
        raise ValueError(
            "emissions must be (T, N) with T >= 1 and N >= 1, one row per time step, or (T,) "
            f"where N = 1{known}; got shape {shape}. {_SEVERAL}"
        )
    return emissions


def _emission_dim(weights: Any) -> int | None:
    """Read N off the emission weights, None if they are none."""
    if callable(weights):
        function = weights
        weights = jax.eval_shape(
            lambda t: jnp.asarray(function(t)), jax.ShapeDtypeStruct((), jnp.int32)
        )
    shape = np.shape(weights)
    return shape[-2] if len(shape) > 1 else None


def check_symmetric(name: str, value: Array, *, skip_first: bool = False) -> None:
    """Raise ValueError if a concrete matrix, or one of a stack, is known to be no covariance.

    It must be symmetric and have no negative variance and, scaled to variances of one, no negative
    eigenvalue beyond rounding. What is not finite is not judged. Eigenvalues of a stack of more
    than a million products are looked at in evenly spaced steps.

    Args:
        name: the argument to name.
        value: (D, D) or (T, D, D).
        skip_first: whether entry 0 of a stack is not used.
    """
    if not is_concrete(value):
        return
    eps = float(jnp.finfo(value.dtype).eps) if jnp.issubdtype(value.dtype, jnp.floating) else 0.0
    given = np.asarray(value)
    stack = (given if given.ndim == 3 else given[None])[int(skip_first) :]

    def at(index: int) -> str:
        return f" at time index {index + int(skip_first)}" if given.ndim == 3 else ""

    if not np.array_equal(stack, np.swapaxes(stack, -1, -2)):
        finite = np.where(np.isfinite(stack), stack, 0.0).astype(np.float64)
        gap = np.abs(finite - np.swapaxes(finite, -1, -2)).max((-1, -2))
        wrong = gap > np.sqrt(eps) * np.abs(finite).max((-1, -2))
        if wrong.any():
            t = int(np.argmax(wrong))
            raise ValueError(
                f"{name} must be symmetric, got entries that differ from their mirror images by "
                f"{gap[t]:.3g}{at(t)}; (A + A.T) / 2 is symmetric"
            )
    variances = np.diagonal(stack, axis1=-2, axis2=-1)
    if (variances < 0).any():
        t, i = np.argwhere(variances < 0)[0]
        raise ValueError(
            f"{name} must have variances >= 0 on its diagonal, got a negative one, "
            f"{variances[t, i]:.3g} in entry {i}{at(t)}"
        )
    tolerance = max(float(np.sqrt(eps)), _ROUNDING)
    stride = -(-stack.size * stack.shape[-1] // _WORK) or 1
    # NumPy factors no shorter type than float32, and that one more slowly.
    lowest = _negative_eigenvalues(stack[::stride].astype(np.float64), eps, tolerance)
    if lowest is not None:
        t = int(np.argmax(lowest < -tolerance))
        raise ValueError(
            f"{name} must be positive semidefinite, got a negative eigenvalue{at(t * stride)}, "
            f"{lowest[t]:.3g} when scaled to variances of one: a covariance in it is larger than "
            "its variances allow"
        )


def check_variances(name: str, value: Array) -> None:
    """Raise ValueError if one of concrete variances, (N,) or (T, N), is negative."""
    if not is_concrete(value):
        return
    variances = np.asarray(value)
    if (variances < 0).any():
        *time, entry = np.argwhere(variances < 0)[0]
        raise ValueError(
            f"{name} must hold variances >= 0, got {variances[*time, entry]:.3g} in entry {entry}"
            f"{f' at time index {time[0]}' if time else ''}"
        )


def check_data(emissions: Array, valid: Array | None) -> None:
    """Raise ValueError if concrete emissions hold an infinity.

    Args:
        emissions: (T, N).
        valid: (T,), which time steps exist; all if None.
    """
    if not is_concrete(emissions, valid):
        return
    y = np.asarray(emissions)
    infinite = np.isinf(y) if valid is None else np.isinf(y) & np.asarray(valid)[:, None]
    if infinite.any():
        t, i = np.argwhere(infinite)[0]
        raise ValueError(
            f"emissions must be finite, or NaN where missing, got {y[t, i]} at time index {t}, "
            f"channel {i}; NaN in its place is a missing value"
        )


def check_observed(emissions: Array, valid: Array | None) -> None:
    """Raise ValueError if it is known that nothing was observed.

    Args:
        emissions: (T, N).
        valid: (T,), which time steps exist; all if None.
    """
    if not is_concrete(emissions, valid):
        return
    observed = ~np.isnan(np.asarray(emissions))
    if not (observed if valid is None else observed & np.asarray(valid)[:, None]).any():
        raise ValueError(
            "emissions must hold an observation where every state starts exactly diffuse, got "
            f"{len(emissions)} time steps, all of them missing; give a proper start by "
            "initial_variance or params.initial.cov"
        )


def check_inputs(inputs: Array, used: np.ndarray, what: str) -> None:
    """Raise ValueError if concrete inputs are not finite where they are used.

    Args:
        inputs: (T, U).
        used: (T,), the time steps at which they are.
        what: what they enter there.
    """
    u = np.asarray(inputs)
    wrong = ~np.isfinite(u) & used[:, None]
    if wrong.any():
        t, i = np.argwhere(wrong)[0]
        raise ValueError(
            f"inputs must be finite where they are used, got {u[t, i]} at time index {t}, input "
            f"{i}, which enters {what} there"
        )


def _negative_eigenvalues(stack: np.ndarray, eps: float, tolerance: float) -> np.ndarray | None:
    """Find the lowest eigenvalue of each matrix when it is scaled to variances of one.

    Args:
        stack: (T, D, D), symmetric, variances not negative.
        eps: relative rounding of the entries.
        tolerance: how far below zero rounding may bring an eigenvalue.

    Returns:
        (T,), or None if none is below minus the tolerance.
    """
    size = stack.shape[-1]
    entries = np.arange(size)
    variances = np.diagonal(stack, axis1=-2, axis2=-1)
    lifted = stack.copy()
    lifted[:, entries, entries] = np.where(variances == 0, 1.0, variances * (1 + tolerance))
    try:
        # A factor of C + tolerance I, in whatever units, is the quick answer to most stacks.
        np.linalg.cholesky(lifted)
        if not stack[variances == 0].any():
            return None
    except np.linalg.LinAlgError:
        pass  # an eigenvalue below, or a number that is not finite
    finite = np.all(np.isfinite(stack), axis=(-1, -2), keepdims=True)[:, 0]
    # What is left of a covariance that should be zero is rounding of the larger variance.
    largest = np.maximum(variances[:, :, None], variances[:, None, :])
    noise = np.abs(stack) <= 8 * size * eps * largest
    clean = np.where(finite[:, None] & ~noise, stack, 0.0)
    varies = finite & (variances > 0)
    deviations = np.sqrt(np.where(varies, variances, 1.0))
    scaled = clean / (deviations[:, :, None] * deviations[:, None, :])
    scaled[:, entries, entries] = varies
    lowest = np.linalg.eigvalsh(scaled)[:, 0]
    # Nothing covaries with what does not vary.
    alone = np.where(varies[:, :, None], 0.0, scaled).any((-1, -2))
    lowest = np.where(alone, np.minimum(lowest, -1.0), lowest)
    return lowest if (lowest < -tolerance).any() else None


def falls_too_far(
    initial_cov: Any, dynamics: Any, weights: Any, cov: Any, *, full: bool
) -> frozenset[str]:
    r"""Tell what covariances have too few digits for, where that can be looked at.

    Data take the prior variance of a measurement, $h^\top P_0h$ or one step on, down to about
    $r + h^\top Qh$. In covariance form the filter loses as many digits as the variance falls by,
    and shall keep half of them. The smoother loses twice as many in states that nothing disturbs,
    and more the longer a trend is: above $10^3$ its variances may be wrong altogether.

    Args:
        initial_cov: $P_0$ (D, D).
        dynamics: of dynamax's record, F and Q arrays.
        weights: $H$, (N, D) or (T, N, D).
        cov: $R$; measurements without error are not judged here.
        full: whether R has covariances.

    Returns:
        Those of "filter" and "smooth" that need factors.
    """
    if not is_concrete(initial_cov, dynamics.weights, dynamics.cov, weights, cov):
        return frozenset()

    def over_time(array: Any, rank: int, extreme: Any) -> np.ndarray:
        array = np.abs(np.asarray(array, float))
        return extreme(array, axis=0) if array.ndim > rank else array

    sd = np.sqrt(np.abs(np.diagonal(np.asarray(initial_cov, float))))
    h, f = over_time(weights, 2, np.max), over_time(dynamics.weights, 2, np.max)
    # By NumPy: while a caller is traced, what JAX takes out of a constant is traced as well.
    q = np.asarray(dynamics.cov)
    q = q[1:] if q.ndim == 3 and len(q) > 1 else q
    q = over_time(np.diagonal(q, axis1=-2, axis2=-1), 1, np.min)
    r = np.diagonal(np.asarray(cov), axis1=-2, axis2=-1) if full else cov
    r = over_time(r, 1, np.min)
    prior, noise = np.maximum(h @ sd, h @ (f @ sd)) ** 2, r + (h * h) @ q
    limits = {"filter": np.finfo(float).eps ** -0.5, "smooth": 1e3}
    return frozenset(k for k, limit in limits.items() if np.any((prior > limit * noise) & (r > 0)))


def may_be_exact(cov: Any, *, full: bool) -> bool:
    """Tell whether a measurement may be without error; it may where that cannot be looked at."""
    if callable(cov) or not is_concrete(cov):
        return True
    known = np.asarray(cov, float)
    if not full:
        return not np.all(known > 0)
    if known.ndim == 3 and known.shape[-1] > 1:
        return True
    sizes = np.sqrt(np.abs(np.diagonal(known, axis1=-2, axis2=-1)))
    if not np.all(sizes > 0) or not np.all(np.isfinite(sizes)):
        return True
    correlations = known / (sizes[..., :, None] * sizes[..., None, :])
    # Far above the level at which a pivot of R is taken for zero, in float32 as well.
    return bool(np.min(np.linalg.eigvalsh(correlations)) < 1e-3)
