"""Giving way to the sequential recurrence where a summary does not exist."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, PyTree


@custom_vmap
def all_lanes(flags: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Tell whether every flag holds, under `vmap` over the whole batch.

    One answer for the batch keeps a `lax.cond` a real branch under `vmap`, where a batched
    predicate would run both branches for every series.
    """
    return jnp.all(flags)


@all_lanes.def_vmap
def _all_lanes_batched(axis_size: int, in_batched: list[bool], flags: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    # Through the wrapped function again, so that nested vmaps are reduced as well.
    return all_lanes(flags), False


def where_sound(
    sound: Array | bool, parallel: Callable[[], PyTree], sequential: Callable[[], PyTree]
) -> PyTree:
    """Evaluate `parallel()` if every summary is sound, otherwise `sequential()`."""
    if sound is True:
        return parallel()
    return jax.lax.cond(all_lanes(jax.lax.stop_gradient(sound)), parallel, sequential)
