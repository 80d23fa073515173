r"""One iteration: linearize a window of the trajectory, see what has converged, solve for the rest.

The window starts at the first state that has not converged, so that nothing is computed again for
those before it, and the first of its states is exact after the step, its predecessor being so.
Newton's method can throw states far away where the guesses are far from the trajectory. States
that are not finite, or far outside of what the recurrence has produced so far and far from
satisfying it, end the *active* part of the window; the guesses behind it are restarted from its
last state. Without damping the active part shrinks then, and grows again while all goes well; with
it the damping grows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from elkax.recurrences.method import Method
from elkax.recurrences.problem import Problem, fit, leading, sizes
from elkax.recurrences.step import View, solve
from elkax.scan import Backend
from elkax.smoothers.damping import Attempt, Damping
from elkax.smoothers.iteration import Progress

# A state this many times larger than any before it, and off by half of its size, is lost.
FAR = 2.0
# What becomes of the active part after a restart, and in every iteration without one.
SHRINK, GROW = 0.6, 1.1
# So many iterations without a restart are needed before all of a long trajectory is tried again.
CALM = 100


class Options(NamedTuple):
    """What stays the same from one iteration to the next.

    Attributes:
        windows: sizes of the windows, ascending; the first that holds the active part is used.
        tolerance: largest residual, relative to the size of the states so far.
        max_iters: most steps taken.
        backend: how to run the linear problems over time.
        history: whether to keep the residual of every step.
        restarts: whether guesses of the tail may be restarted.
    """

    windows: tuple[int, ...]
    tolerance: ArrayLike
    max_iters: ArrayLike
    backend: Backend | None
    history: bool
    restarts: bool


class Point(NamedTuple):
    """State of the iteration.

    Attributes:
        states: trajectory (T, D).
        prefix: how many states have converged.
        front: guesses from this index on are all `held`.
        held: (D,).
        width: largest length of the active part.
        known: largest entry of a state before `prefix`.
        usual: largest entry that the recurrence has produced from the first guesses.
        resets: how often guesses of the tail were restarted.
        calm: number of iterations since then.
        holding: whether guesses behind the active part follow its last state.
        control: state of the damping.
        before: trajectory before the last step, where a damping may refuse it; else None.
        merit: half the sum of squared residuals before the last step.
        expected: the same after it, as the linearized recurrence has it.
        steps: number of steps taken.
        evaluations: number of evaluations of f.
        residual: of every state (T,), NaN where never evaluated; None unless kept.
    """

    states: Array
    prefix: Array
    front: Array
    held: Array
    width: Array
    known: Array
    usual: Array
    resets: Array
    calm: Array
    holding: Array
    control: Any
    before: Array | None
    merit: Array
    expected: Array
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
    length, size = problem.length, problem.initial.shape[0]
    dtype = problem.initial.dtype
    states = guess
    if states is None:
        states = jnp.broadcast_to(problem.initial, (length, size))
    zero, none = jnp.zeros((), dtype), jnp.asarray(0)
    damping = method.damping
    return Point(
        states=states,
        prefix=none,
        front=jnp.asarray(length),
        held=problem.initial,
        width=jnp.asarray(length),
        known=jnp.max(jnp.abs(problem.initial)),
        usual=zero,
        resets=none,
        calm=none,
        holding=jnp.asarray(guess is None),
        control=None if damping is None else damping.start(jnp.ones_like(states)),
        before=states if damping is not None and damping.refuses else None,
        merit=jnp.asarray(jnp.inf, dtype),
        expected=zero,
        steps=none,
        evaluations=none,
        residual=jnp.full(length, jnp.nan, dtype) if options.history else None,
    )


def advance(
    problem: Problem, method: Method, options: Options, point: Point
) -> tuple[Point, Progress]:
    """Evaluate the trajectory, and unless it has converged take a step."""
    small, *larger = [partial(_advance, problem, method, options, w) for w in options.windows]
    if not larger:
        return small(point)
    return jax.lax.cond(point.width <= options.windows[0], small, larger[0], point)


def _look(problem: Problem, method: Method, size: int, point: Point, states: Array) -> View:
    """Linearize the window that starts at the first state that has not converged."""
    start = jnp.minimum(point.prefix, problem.length - size)
    index = start + jnp.arange(size)

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    current = jnp.where((index < point.front)[:, None], cut(states), point.held)
    first = jnp.where(start == 0, problem.initial, states[jnp.maximum(start - 1, 0)])
    before = jnp.concatenate((first[None], current[:-1]))
    inputs = jax.tree.map(cut, problem.inputs)
    values, jacobian = method.jacobian.linearize(problem.step, before, inputs)
    return View(start, index, current, values, jacobian)


def _advance(
    problem: Problem, method: Method, options: Options, size: int, point: Point
) -> tuple[Point, Progress]:
    length = problem.length
    view = _look(problem, method, size, point, point.states)
    prefix, residual = _converged(view, point, options)
    control, stalled = point.control, jnp.asarray(False)
    refused = jnp.asarray(False)
    merit = point.merit
    if method.damping is not None and method.damping.refuses:
        merit = _merit(view)
        control, stalled, refused = _judge(method.damping, point, merit, jnp.asarray(False))
        view = jax.lax.cond(
            refused, lambda: _look(problem, method, size, point, point.before), lambda: view
        )
        merit = jnp.where(refused, point.merit, merit)
    lost = _lost(view, point, prefix) if options.restarts else view.start + size
    blown = lost < jnp.minimum(point.front, view.start + size)
    if method.damping is not None and not method.damping.refuses:
        control, stalled, _ = _judge(method.damping, point, merit, blown)
    calm = jnp.where(blown, 0, point.calm + 1)
    longer = jnp.minimum((GROW * point.width).astype(int) + 1, options.windows[0])
    trusting = (point.resets == 0) | (calm >= CALM)
    width = jnp.where(trusting, length, longer)
    width = jnp.where(blown, _shorter(lost - prefix, options), width)
    if method.damping is not None:
        # What undamped steps do by taking fewer states, damping does for all of them.
        width = point.width
    end = jnp.minimum(jnp.minimum(prefix + width, lost), view.start + size)
    done = (prefix == length) | (point.steps >= options.max_iters)
    strength = None
    if method.damping is not None:
        strength = method.damping.precision(control, jnp.zeros_like(point.states))
        strength = jax.lax.dynamic_slice_in_dim(strength, view.start, size)
    usual = jnp.where(point.steps == 0, _largest(sizes(view.values)), point.usual)
    states, expected, sane = jax.lax.cond(
        done,
        lambda: (view.states, merit, end),
        lambda: solve(
            method, options.backend, options.restarts, view, prefix, end, strength, usual
        ),
    )
    exploded = sane < end
    blown, calm = blown | exploded, jnp.where(exploded, 0, calm)
    if method.damping is None:
        width = jnp.where(exploded, _shorter(sane - prefix, options), width)
    end = sane
    holding = point.holding | blown
    active = jnp.where(done, point.front, jnp.where(holding, end, length))
    last = jnp.clip(end - 1 - view.start, 0, size - 1)
    kept = point.residual
    if kept is not None:
        kept = jax.lax.dynamic_update_slice_in_dim(kept, residual, view.start, 0)
    new = Point(
        states=jax.lax.dynamic_update_slice_in_dim(point.states, states, view.start, 0),
        prefix=prefix,
        front=active,
        held=jnp.where(done, point.held, states[last]),
        width=jnp.where(done, point.width, width),
        known=jnp.maximum(
            point.known, jnp.max(jnp.where(view.index < prefix, sizes(view.states), 0.0))
        ),
        usual=usual,
        resets=point.resets + (blown & ~done),
        calm=calm,
        holding=holding,
        control=control,
        before=None
        if point.before is None
        else jax.lax.dynamic_update_slice_in_dim(point.before, view.states, view.start, 0),
        merit=merit,
        expected=expected,
        steps=point.steps + (~done & (prefix < view.start + size)),
        evaluations=point.evaluations + size,
        residual=kept,
    )
    # The state before the first that has not converged is exact, and so is f there.
    exact = jnp.where(view.index == prefix, sizes(view.values), 0.0)
    largest = jnp.zeros_like(merit) if strength is None else jnp.max(strength)
    progress = Progress(
        finite=jnp.all(jnp.isfinite(exact)),
        step=jnp.where(prefix == length, 0.0, jnp.inf),
        change=jnp.zeros_like(merit),
        settled=jnp.asarray(False),
        stalled=stalled & ~done,
        record=Record(prefix, largest, kept),
    )
    return new, progress


def _shorter(good: Array, options: Options) -> Array:
    """Return the width of the active part after a restart behind so many good states."""
    return jnp.clip((SHRINK * good).astype(int), 2, options.windows[0])


def _largest(x: Array) -> Array:
    """Return the largest finite entry."""
    return jnp.max(jnp.where(jnp.isfinite(x), x, 0.0))


def _judge(damping: Damping, point: Point, merit: Array, blown: Array) -> tuple[Any, Array, Array]:
    """Let a damping judge the last step; there is nothing to judge before the first."""
    rounding = 256 * jnp.finfo(merit.dtype).eps * (1.0 + jnp.abs(merit))
    attempt = Attempt(
        fall=(point.merit - merit)[None],
        predicted=(point.merit - point.expected)[None],
        rounding=rounding,
        violated=blown,
        length=jnp.zeros_like(merit),
    )
    verdict = damping.judge(point.control, attempt)
    first = point.steps == 0
    control = jax.tree.map(
        lambda new, old: jnp.where(first, old, new), verdict.control, point.control
    )
    return control, verdict.stalled & ~first, ~verdict.accepted & ~first


def _converged(view: View, point: Point, options: Options) -> tuple[Array, Array]:
    """Return how many states have converged, and the relative residuals of the window."""
    found = fit(view.values, view.states, point.known, options.tolerance)
    return view.start + leading((view.index < point.prefix) | found.good), found.relative


def _merit(view: View) -> Array:
    """Return half the sum of squared residuals."""
    return 0.5 * jnp.sum((view.values - view.states) ** 2)


def _lost(view: View, point: Point, prefix: Array) -> Array:
    """Return the index of the first state behind the prefix that is lost, T or more if none is."""
    size = sizes(view.states)
    off = sizes(view.values - view.states)
    usual = jnp.where(point.steps == 0, jnp.inf, jnp.maximum(point.usual, point.known))
    far = (size > FAR * usual) & (off > 0.5 * size)
    bad = (far | ~jnp.isfinite(off)) & (view.index > prefix)
    # The first state of the active part is found without its guess.
    beyond = jnp.iinfo(view.index.dtype).max
    first = jnp.min(jnp.where(bad, view.index, beyond))
    return jnp.maximum(first, prefix + 1)
