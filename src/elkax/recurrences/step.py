r"""The linear problem of one iteration, in the active part of a window."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.linearize.structure import Jacobian
from elkax.recurrences.method import Method
from elkax.recurrences.problem import shift, shift_back, sizes, where_rows
from elkax.scan import Backend


class View(NamedTuple):
    """A window on the trajectory, leading axis its size.

    Attributes:
        start: index of its first state.
        index: indices of its states.
        states: the trajectory there.
        values: f at the states before.
        jacobian: what is kept of the Jacobian.
    """

    start: Array
    index: Array
    states: Array
    values: Array
    jacobian: Jacobian

    def read(self, x: Array) -> Array:
        """Cut the window out of an array with leading axis T."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, len(self.index))

    def write(self, x: Array, part: Array) -> Array:
        """Put the window into an array with leading axis T."""
        return jax.lax.dynamic_update_slice_in_dim(x, part, self.start, 0)

    def first(self, flags: Array) -> Array:
        """Return the index of the first state that is flagged, beyond T if none is."""
        return jnp.min(jnp.where(flags, self.index, jnp.iinfo(self.index.dtype).max))


class Step(NamedTuple):
    """What a step has come to.

    Attributes:
        states: the window after it.
        expected: half the sum of squared residuals there, as the linearized recurrence has it;
            None without damping.
        end: where the part ends whose new states are of a sane size; behind it nothing has changed.
    """

    states: Array
    expected: Array | None
    end: Array


def solve(
    method: Method,
    backend: Backend | None,
    restarts: bool,
    view: View,
    prefix: Array,
    end: Array,
    strength: Array | None,
    wild: Array,
) -> Step:
    r"""Take a step in the active part.

    Args:
        method: what is kept of the Jacobian, and the form.
        backend: how to run over time.
        restarts: whether the step ends where states are wild.
        view: the window.
        prefix: number of converged states.
        end: where the active part ends.
        strength: $\lambda$; None without damping.
        wild: states larger than this are.
    """
    structure = method.jacobian
    active = (view.index >= prefix) & (view.index < end)
    coupled = active & (view.index > prefix)
    residual = jnp.where(active[:, None], view.values - view.states, 0.0)
    jacobian = jax.tree.map(partial(where_rows, coupled), view.jacobian)
    covs = None
    if strength is None:
        change = structure.scan(jacobian, residual, jnp.zeros_like(residual[0]), backend=backend)
    else:
        noise = jnp.where(coupled[:, None], strength, 0.0)
        change, covs = structure.filter(jacobian, residual, noise, backend)
    if restarts:
        # Where the part ends that has not exploded.
        exploded = ~(sizes(view.states + change) <= wild) & (view.index > prefix)
        end = jnp.minimum(end, view.first(exploded))
    kept = view.index < end
    change = jnp.where(kept[:, None], change, 0.0)
    residual = jnp.where(kept[:, None], residual, 0.0)
    jacobian = jax.tree.map(partial(where_rows, kept), jacobian)
    if covs is not None and method.form == "smoother":
        covs = jax.tree.map(partial(where_rows, kept), covs)
        change = _smooth(method, backend, jacobian, change, covs)
    carried = structure.times(jacobian, shift(change))
    # Without damping this is f where the state before has not changed, to the last digit.
    new = view.values + carried if strength is None else view.states + change
    new = jnp.where((view.index == prefix)[:, None], view.values, new)
    states = jnp.where((active & kept)[:, None], new, view.states)
    expected = None
    if strength is not None:
        expected = 0.5 * jnp.sum((residual + carried - change) ** 2)
    return Step(states, expected, end)


def _smooth(
    method: Method, backend: Backend | None, jacobian: Jacobian, change: Array, covs: Jacobian
) -> Array:
    r"""Smooth what was filtered.

    With unit observation noise the gain is $P_{t|t}$ and the innovation divided by its covariance
    is $-\delta_{t|t}$, so that Bryson-Frazier's costate obeys
    $q_t = -\delta_{t|t} + (I - P_{t|t})A_{t+1}^\top q_{t+1}$ and the smoothed mean is
    $\delta_{t|t} + P_{t|t}A_{t+1}^\top q_{t+1} = A_{t+1}^\top q_{t+1} - q_t$: nothing is inverted.
    """
    structure = method.jacobian
    back = structure.transpose(jax.tree.map(shift_back, jacobian))
    costates = structure.scan(
        structure.gap(covs, back), -change, jnp.zeros_like(change[0]), reverse=True, backend=backend
    )
    return structure.times(back, shift_back(costates)) - costates
