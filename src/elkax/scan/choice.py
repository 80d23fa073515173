"""Which backend runs when none is named."""

import math
from functools import partial
from typing import Literal

import jax
from jaxtyping import PyTree

from elkax.scan.blocked import Blocked
from elkax.scan.lanes import LOOPS_ARE_KERNELS
from elkax.scan.protocol import Backend, Scannable, State, sequence_length
from elkax.scan.sequential import Sequential
from elkax.scan.series import run_series

# From this many on, series under `vmap` fill the vector lanes of a CPU by themselves.
MANY_SERIES = 8


def choose(
    *,
    num_timesteps: int,
    state_dim: int,
    platform: str | None = None,
    recurrence: Literal["kalman", "affine"] = "kalman",
    num_series: int = 1,
) -> Backend:
    r"""Name the backend for a recurrence from measured crossovers.

    On a CPU, `Sequential` with JAX 0.12 and later: it compiles in less than half the time of
    blocks, which gain a third at most (D = 8 in float64, small D in float32). With earlier
    versions, `Blocked` with about $\sqrt T$ blocks for Kalman recurrences with D <= 8 and
    T >= 512, else `Sequential`: an affine recurrence runs at full speed as it is, and from D of
    about 9 on a Kalman step keeps the machine busy by itself.
    `MANY_SERIES` or more under `vmap` fill the lanes without blocks of time: `Sequential`. On a GPU
    (by reasoning, not measured), `Blocked` for T >= 64.

    Args:
        num_timesteps: T.
        state_dim: D.
        platform: "cpu", "gpu" or "tpu"; by default the one JAX computes on.
        recurrence: "kalman" where covariances are carried, "affine" where vectors are.
        num_series: how many series run side by side under `vmap`.

    Returns:
        The backend that the library uses when `backend=None`.
    """
    platform = platform or jax.default_backend()
    # The power of two next above the square root of T.
    num_blocks = 2 ** math.ceil(math.log2(num_timesteps) / 2)
    if platform == "cpu":
        slow_loop = not LOOPS_ARE_KERNELS and num_series < MANY_SERIES
        if recurrence == "kalman" and state_dim <= 8 and num_timesteps >= 512 and slow_loop:
            return Blocked(min(num_blocks, 256))
        return Sequential()
    return Blocked(num_blocks) if num_timesteps >= 64 else Sequential()


def runs_in_sequence(backend: Backend | None, num_timesteps: int, state_dim: int) -> bool:
    """Tell whether steps of a Kalman recurrence run one after the other."""
    if backend is None:
        backend = choose(num_timesteps=num_timesteps, state_dim=state_dim)
    return isinstance(backend, Sequential)


def run(
    scannable: Scannable,
    state: State,
    xs: PyTree,
    *,
    backend: Backend | None = None,
    state_dim: int = 1,
    recurrence: Literal["kalman", "affine"] = "kalman",
    reverse: bool = False,
) -> tuple[State, PyTree]:
    """Run a recurrence with the named backend, or with the one that `choose` gives.

    Args:
        scannable: the recurrence, a pytree whose leaves are arrays.
        state: state before the first step.
        xs: inputs, leading axis T.
        backend: how to run it; chosen from T and `state_dim` if None.
        state_dim: D, for the choice.
        recurrence: kind, for the choice.
        reverse: run from the last input to the first.

    Returns:
        The state after the last step run, and the outputs with leading axis T.
    """
    length = sequence_length(xs)
    best = partial(choose, num_timesteps=length, state_dim=state_dim, recurrence=recurrence)
    return run_series(
        scannable,
        state,
        xs,
        backend=best() if backend is None else backend,
        fills=lambda n: backend is None and isinstance(best(num_series=n), Sequential),
        reverse=reverse,
    )
