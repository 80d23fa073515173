"""The filter over a whole sequence."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from elkax.gaussian.kalman import KalmanFilter
from elkax.gaussian.model import Model, constant_part, over_time
from elkax.gaussian.output import FilterOutput
from elkax.scan import Backend, Sequential, run
from elkax.scan.choice import runs_in_sequence
from elkax.scan.fallback import where_sound
from elkax.scan.lanes import from_lanes, to_lanes


def encode_model(model: Model, form: Any) -> Model:
    """Store the covariances of a model in a form."""
    noise = model.noise
    return model._replace(
        initial_cov=form.encode(model.initial_cov),
        noise=form.encode(noise) if noise.ndim == 2 else from_lanes(form.encode(to_lanes(noise))),
    )


def filter_model(
    model: Model, form: Any, backend: Backend | None, *, turning: bool = False
) -> FilterOutput:
    """Run the Kalman filter over a model.

    Args:
        model: covariances themselves, not yet stored in `form`.
        form: how covariances are stored while filtering.
        backend: how to run the recurrence.
        turning: see `KalmanFilter`.

    Returns:
        Output of every step, covariances stored in `form`.
    """
    stored = encode_model(model, form)
    length, size = len(model.first), len(model.initial_mean)
    kalman = KalmanFilter(constant_part(stored), form, turning)
    xs = over_time(lambda field, rank: field, stored)
    start = kalman.begin(model.initial_mean.dtype)
    if model.unknown is None or runs_in_sequence(backend, length, size):
        output = run(kalman, start, xs, backend=backend, state_dim=size)[1]
    else:
        output = _filter_unknown(kalman, start, xs, backend)
    # The same, without a copy.
    return output._replace(observed=model.observed)


def _filter_unknown(
    kalman: KalmanFilter, start: Any, xs: Model, backend: Backend | None
) -> FilterOutput:
    """Filter step by step while something may be unknown, and then by a parallel backend.

    A block of steps has no summary for a state of which something is unknown. Twice as many steps
    as there are states, and some, usually tell everything; else all steps run in sequence.
    """
    size = len(kalman.fixed.initial_mean)
    length = len(jax.tree.leaves(xs)[0])
    head = min(2 * size + 8, length)
    early, late = (
        jax.tree.map(lambda leaf, s=s: leaf[s], xs) for s in (slice(head), slice(head, None))
    )
    sequential = partial(run, kalman, backend=Sequential())
    state, first = sequential(start, early)
    if head == length:
        return first

    def in_parallel() -> FilterOutput:
        known = state._replace(unknown=None)
        output = run(kalman, known, late, backend=backend, state_dim=size)[1]
        shape = (length - head, *state.unknown.shape)
        return output._replace(unknown=jnp.broadcast_to(state.unknown, shape))

    rest = where_sound(
        jnp.all(state.unknown[:size] == 0), in_parallel, lambda: sequential(state, late)[1]
    )
    return jax.tree.map(lambda a, b: jnp.concatenate((a, b)), first, rest)
