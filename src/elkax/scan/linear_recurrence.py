"""Linear recurrences with their derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from elkax.scan.affine import Affine, Restarted
from elkax.scan.choice import run
from elkax.scan.protocol import Backend


def linear_recurrence(
    decay: ArrayLike,
    increment: ArrayLike,
    initial_state: ArrayLike | None = None,
    *,
    resets: ArrayLike | None = None,
    length: ArrayLike | None = None,
    reverse: bool = False,
    backend: Backend | None = None,
) -> Array:
    r"""Evaluate $h_t = a_t h_{t-1} + b_t$ for $t = 1, \dots, T$.

    Differentiable in a, b and $h_0$ in both modes, as often as wanted, by one more recurrence,
    $\bar g_t = a_{t+1}^\top\bar g_{t+1} + \partial L/\partial h_t$:
    $\partial L/\partial a_t = \bar g_th_{t-1}^\top$, $\partial L/\partial b_t = \bar g_t$. It keeps
    a and h, and computes nothing again.

    Args:
        decay: $a_t$: diagonal, of the shape of `increment`; or dense, (T, D, D), exactly if it has
            one axis more. Real or complex.
        increment: $b_t$: (T, ...), (T, D) if the decay is dense. Batches go through `jax.vmap`.
        initial_state: $h_0$, not part of the output, (...); zero if None.
        resets: (T,) bools, whether a step starts from `initial_state`, in the order of processing:
            sequences packed one behind the other. Nothing passes a reset, NaN included.
        length: number of steps that exist, 0 to T, the rest being padding that is not looked at and
            in which the state stays; all if None. May be traced.
        reverse: run from the last entry to the first, $h_t = a_th_{t+1} + b_t$, with
            `initial_state` before the last (the last that exists).
        backend: how to run it; chosen by `elkax.scan.choose` if None.

    Returns:
        $h_{1:T}$, of the shape of `increment`. Half precision is accumulated in float32. With the
        sequential backend it costs O(T D), dense O(T D^2).

    Raises:
        TypeError: on integers for numbers, or numbers for bools.
        ValueError: on shapes that do not fit, T = 0, or a length outside of 0, ..., T.

    References:
        Martin & Cundy (2018), arXiv:1709.04057.
    """
    decay, increment = _numbers("decay", decay), _numbers("increment", increment)
    dense = decay.ndim == increment.ndim + 1
    if increment.ndim == 0 or dense and increment.ndim != 2:
        raise ValueError(
            "increment must be (T, ...), or (T, D) where decay is dense, (T, D, D); got increment "
            f"{increment.shape} and decay {decay.shape}"
        )
    count, *state_shape = increment.shape
    if count == 0:
        raise ValueError("increment must hold at least one time step, got T = 0")
    if decay.shape != increment.shape + (increment.shape[-1:] if dense else ()):
        raise ValueError(
            f"decay must have the shape of increment, {increment.shape}, or be dense, (T, D, D) "
            f"for (T, D), got {decay.shape}"
        )
    if initial_state is not None:
        initial_state = _numbers("initial_state", initial_state)
        if initial_state.shape != tuple(state_shape):
            raise ValueError(
                f"initial_state must be {tuple(state_shape)}, got {initial_state.shape}"
            )
    numbers = (decay, increment, initial_state)
    dtype = jnp.result_type(*jax.tree.leaves(numbers))
    work = jnp.promote_types(dtype, jnp.float32)
    states = _evaluate(
        *jax.tree.map(lambda leaf: leaf.astype(work), numbers),
        check_resets(resets, (count,)),
        _check_length(length, count),
        reverse=reverse,
        backend=backend,
    )
    return states.astype(dtype)


def _numbers(name: str, value: ArrayLike) -> Array:
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(f"{name} must be real or complex numbers, got dtype {value.dtype}")
    return value


def check_resets(resets: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """Return resets as an array.

    Raises:
        TypeError: if they are no bools.
        ValueError: unless there is one for each step.
    """
    if resets is None:
        return None
    resets = jnp.asarray(resets)
    if resets.dtype != bool:
        raise TypeError(f"resets must be bools, got dtype {resets.dtype}")
    if resets.shape != shape:
        raise ValueError(f"resets must be {shape}, one for each step, got {resets.shape}")
    return resets


def _check_length(length: ArrayLike | None, count: int) -> Array | None:
    """Return a length as an array.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is not one number in 0, ..., T.
    """
    if length is None:
        return None
    if not isinstance(length, jax.core.Tracer):
        length = np.asarray(length)
    if not jnp.issubdtype(length.dtype, jnp.integer):
        raise TypeError(f"length must be an integer, got dtype {length.dtype}")
    if length.ndim != 0:
        raise ValueError(f"length must be one integer (use vmap for a batch), got {length.shape}")
    if isinstance(length, np.ndarray) and not 0 <= length <= count:
        raise ValueError(f"length must lie in 0, ..., T = {count}, got {length}")
    return jnp.asarray(length)


@partial(jax.jit, static_argnames=("reverse", "backend"))
def _evaluate(
    decay: Array,
    increment: Array,
    start: Array | None,
    resets: Array | None,
    length: Array | None,
    *,
    reverse: bool,
    backend: Backend | None,
) -> Array:
    """Evaluate a recurrence whose arguments have been checked."""
    shape = increment.shape
    dense = decay.ndim == increment.ndim + 1
    if not dense:
        decay, increment = (leaf.reshape((shape[0], -1)) for leaf in (decay, increment))
    if length is not None:
        valid = jnp.arange(shape[0]) < length
        still = jnp.eye(shape[1], dtype=decay.dtype) if dense else 1
        decay = jnp.where(column(valid, decay), decay, still)
        increment = jnp.where(valid[:, None], increment, 0)
        resets = None if resets is None else resets & valid
    if start is not None:
        start = start.reshape(-1)
        first = -1 if reverse else 0
        if resets is None:
            increment = increment.at[first].add(_times(decay[first], start))
        else:
            begins = resets.at[first].set(True)
            carried = _times(decay, jnp.broadcast_to(start, increment.shape))
            increment = increment + jnp.where(begins[:, None], carried, 0)

    def residual(states: Array) -> Array:
        before = _shift(states, reverse)
        if resets is not None:
            before = jnp.where(resets[:, None], 0, before)
        return states - _times(decay, before)

    def solve(_: object, offset: Array) -> Array:
        return _scan(decay, offset, resets, reverse, backend)

    def solve_transposed(_: object, gradient: Array) -> Array:
        after = _shift(decay, not reverse)
        cut = None if resets is None else _shift(resets, not reverse)
        return _scan(after.mT if dense else after, gradient, cut, not reverse, backend)

    # Its derivatives are those of the equation, whatever the backend does.
    states = jax.lax.custom_linear_solve(residual, increment, solve, solve_transposed)
    return states.reshape(shape)


def _scan(
    decay: Array, offset: Array, resets: Array | None, reverse: bool, backend: Backend | None
) -> Array:
    size = offset.shape[1]
    recurrence = Affine(size, diagonal=decay.ndim == 2)
    xs = decay, offset
    if resets is not None:
        recurrence, xs = Restarted(recurrence), (xs, resets)
    start = jnp.zeros_like(offset[0])
    return run(
        recurrence,
        start,
        xs,
        backend=backend,
        state_dim=size,
        recurrence="affine",
        reverse=reverse,
    )[1]


def _times(decay: Array, states: Array) -> Array:
    """Multiply a decay and a state, or those of all times."""
    if decay.ndim == states.ndim:
        return decay * states
    return jnp.einsum("...ij,...j->...i", decay, states, precision="highest")


def _shift(x: Array, reverse: bool) -> Array:
    """Return what stands one step earlier in the order of processing, zero at first."""
    zero = jnp.zeros_like(x[:1])
    return jnp.concatenate((x[1:], zero) if reverse else (zero, x[:-1]))


def column(flags: Array, like: Array) -> Array:
    """Give flags (T,) as many axes as an array (T, ...) has."""
    return flags.reshape((-1,) + (1,) * (like.ndim - 1))
