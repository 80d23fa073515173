"""Which backend runs when none is named."""

import jax
from jaxtyping import PyTree

from elkax.scan.blocked import Blocked
from elkax.scan.protocol import Backend, Scannable, State, sequence_length
from elkax.scan.sequential import Sequential


def choose(*, num_timesteps: int, state_dim: int, platform: str | None = None) -> Backend:
    """Name the backend for a Kalman recurrence from measured crossovers.

    Args:
        num_timesteps: T.
        state_dim: D.
        platform: "cpu", "gpu" or "tpu"; by default the one JAX computes on.

    Returns:
        The backend that the library uses when `backend=None`.
    """
    platform = platform or jax.default_backend()
    if platform == "cpu":
        if 3 <= state_dim <= 6 and num_timesteps >= 1024:
            return Blocked(32)
        return Sequential()
    if num_timesteps < 64:
        return Sequential()
    return Blocked(max(8, int(num_timesteps**0.5)))


def run(
    scannable: Scannable,
    state: State,
    xs: PyTree,
    *,
    backend: Backend | None = None,
    state_dim: int = 1,
    reverse: bool = False,
) -> tuple[State, PyTree]:
    """Run a recurrence with the named backend, or with the one that `choose` gives.

    Args:
        scannable: the recurrence.
        state: state before the first step.
        xs: inputs, leading axis T.
        backend: how to run it; chosen from T and `state_dim` if None.
        state_dim: D, for the choice.
        reverse: run from the last input to the first.

    Returns:
        The state after the last step run, and the outputs with leading axis T.
    """
    if backend is None:
        backend = choose(num_timesteps=sequence_length(xs), state_dim=state_dim)
    return backend(scannable, state, xs, reverse=reverse)
