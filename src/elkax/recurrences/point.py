"""What an iteration knows: settings, the trajectory, and what was seen of it so far."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from elkax.recurrences.method import Method
from elkax.recurrences.problem import Problem
from elkax.recurrences.restarts import Reach, Scale
from elkax.scan import Backend


class Options(NamedTuple):
    """What stays the same from one iteration to the next.

    Attributes:
        windows: sizes of the windows, ascending; the first that holds the active part is used.
        tolerance: largest residual, relative to the size of the states so far.
        max_iters: most steps taken.
        backend: how to run the linear problems over time.
        history: whether to keep the residual of every step.
        restarts: whether guesses of the tail may be restarted.
        patient: whether that is done only where states are not finite, and steps reach as far as
            ever: plain Newton.
    """

    windows: tuple[int, ...]
    tolerance: ArrayLike
    max_iters: ArrayLike
    backend: Backend | None
    history: bool
    restarts: bool
    patient: bool = False


class Guess(NamedTuple):
    """A trajectory whose tail may be one state.

    Attributes:
        states: (T, D).
        front: states from this index on are all `held`.
        held: (D,).
    """

    states: Array
    front: Array
    held: Array

    def whole(self) -> Array:
        """Return all states (T, D)."""
        index = jnp.arange(len(self.states))
        return jnp.where((index < self.front)[:, None], self.states, self.held)


class Damped(NamedTuple):
    """What a damping knows of the last step.

    Attributes:
        control: its state.
        before: trajectory before the step, where it may be refused; else None.
        merit: half the sum of squared residuals before the step.
        expected: the same after it, as the linearized recurrence has it.
    """

    control: Any
    before: Array | None
    merit: Array
    expected: Array


class Point(NamedTuple):
    """State of the iteration.

    Attributes:
        guess: the trajectory.
        prefix: how many of its states have converged.
        reach: how far steps reach.
        scale: how large states are.
        damped: `Damped`; None without damping.
        steps: number of steps taken.
        evaluations: number of evaluations of f.
        residual: of every state (T,), NaN where never evaluated; None unless kept.
    """

    guess: Guess
    prefix: Array
    reach: Reach
    scale: Scale
    damped: Any
    steps: Array
    evaluations: Array
    residual: Array | None


class Record(NamedTuple):
    r"""What is kept of an iteration.

    Attributes:
        prefix: number of converged states.
        damping: largest $\lambda$.
        residual: (T,) largest entry of $s_t - f(s_{t-1}, x_t)$ relative to the size of the states
            so far, as last evaluated; None unless the history is kept.
    """

    prefix: Array
    damping: Array
    residual: Array | None


def start_at(problem: Problem, method: Method, guess: Array | None, options: Options) -> Point:
    """Return the point before the first iteration.

    Args:
        problem: the recurrence.
        method: how it is solved.
        guess: trajectory (T, D), None for the initial state at all times.
        options: see `Options`.
    """
    length, initial = problem.length, problem.initial
    states = jnp.broadcast_to(initial, (length, *initial.shape)) if guess is None else guess
    zero, none, all_ = jnp.zeros((), initial.dtype), jnp.asarray(0), jnp.asarray(length)
    damped = None
    if method.damping is not None:
        damped = Damped(
            control=method.damping.start(jnp.ones_like(states)),
            before=states if method.damping.refuses else None,
            merit=zero + jnp.inf,
            expected=zero,
        )
    return Point(
        guess=Guess(states, all_, initial),
        prefix=none,
        reach=Reach(all_, none, none, jnp.asarray(guess is None)),
        scale=Scale(jnp.max(jnp.abs(initial)), zero),
        damped=damped,
        steps=none,
        evaluations=none,
        residual=jnp.full(length, jnp.nan, initial.dtype) if options.history else None,
    )
