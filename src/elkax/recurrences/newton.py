r"""One iteration: linearize a window of the trajectory, see what has converged, solve for the rest.

The window starts at the first state that has not converged, so that nothing is computed again for
those before it, and the first of its states is exact after the step, its predecessor being so.
Newton's method can throw states away where the guesses are far from the trajectory; these are
restarted (`restarts`), and undamped steps reach less far then, where a damping grows instead.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.recurrences.method import Method
from elkax.recurrences.point import Damped, Guess, Options, Point, Record
from elkax.recurrences.problem import Problem, fit, leading, sizes
from elkax.recurrences.restarts import EXPLODED, find_lost, lengthen, measure, shorten
from elkax.recurrences.step import Step, View, solve
from elkax.smoothers.damping import Attempt, Damping
from elkax.smoothers.iteration import Progress


def advance(
    problem: Problem, method: Method, options: Options, point: Point
) -> tuple[Point, Progress]:
    """Evaluate the trajectory, and unless it has converged take a step."""
    small, *larger = [partial(_advance, problem, method, options, w) for w in options.windows]
    if not larger:
        return small(point)
    return jax.lax.cond(point.reach.width <= options.windows[0], small, larger[0], point)


class Seen(NamedTuple):
    r"""What there is to see of the newest trajectory.

    Attributes:
        view: a window of it, or of the one before where the last step is refused.
        lost: index of the first state that is lost.
        blown: whether that is a guess which has to be restarted.
        astray: the same without patience.
        strength: $\lambda$ of its states (W, D); None without damping.
        stalled: whether no step will get any further.
        done: whether no step is taken, all states being exact or the iterations used up.
    """

    view: View
    lost: Array
    blown: Array
    astray: Array
    strength: Array | None
    stalled: Array
    done: Array


def _advance(
    problem: Problem, method: Method, options: Options, size: int, point: Point
) -> tuple[Point, Progress]:
    seen, judged = _evaluate(problem, method, options, size, point)
    new = _step(problem, method, options, seen, judged)
    prefix = new.prefix
    # The state before the first that has not converged is exact, and so is f there.
    exact = jnp.where(seen.view.index == prefix, sizes(seen.view.values), 0.0)
    zero = jnp.zeros((), exact.dtype)
    largest = zero if seen.strength is None else jnp.max(seen.strength)
    progress = Progress(
        finite=jnp.all(jnp.isfinite(exact)),
        step=jnp.where(prefix == problem.length, 0.0, jnp.inf),
        change=zero,
        settled=jnp.asarray(False),
        stalled=seen.stalled & ~seen.done,
        record=Record(prefix, largest, new.residual),
    )
    return new, progress


def _look(problem: Problem, method: Method, size: int, prefix: Array, guess: Guess) -> View:
    """Linearize the window that starts at the first state that has not converged."""
    start = jnp.minimum(prefix, problem.length - size)
    index = start + jnp.arange(size)

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    current = jnp.where((index < guess.front)[:, None], cut(guess.states), guess.held)
    first = jnp.where(start == 0, problem.initial, guess.states[jnp.maximum(start - 1, 0)])
    before = jnp.concatenate((first[None], current[:-1]))
    inputs = jax.tree.map(cut, problem.inputs)
    values, jacobian = method.jacobian.linearize(problem.step, before, inputs)
    return View(start, index, current, values, jacobian)


def _evaluate(
    problem: Problem, method: Method, options: Options, size: int, point: Point
) -> tuple[Seen, Point]:
    """Evaluate the trajectory in a window, and judge what has converged and what is lost."""
    look = partial(_look, problem, method, size, point.prefix)
    view = look(point.guess)
    found = fit(view.values, view.states, point.scale.known, options.tolerance)
    prefix = view.start + leading((view.index < point.prefix) | found.good)
    residual = point.residual
    if residual is not None:
        residual = view.write(residual, found.relative)
    first, stalled = point.steps == 0, jnp.asarray(False)
    damping, damped = method.damping, point.damped
    refuses = damping is not None and damping.refuses
    if refuses:
        merit = 0.5 * jnp.sum((view.values - view.states) ** 2)
        damped, stalled, refused = _judge(damping, point, merit, jnp.asarray(False))
        former = point.guess._replace(states=damped.before)
        view = jax.lax.cond(refused, lambda: look(former), lambda: view)
        damped = damped._replace(
            before=view.write(damped.before, view.states),
            merit=jnp.where(refused, damped.merit, merit),
        )
    lost = astray = view.start + size
    if options.restarts:
        lost = astray = find_lost(view, point.scale, prefix, first)
    if options.patient:
        lost = find_lost(view, point.scale, prefix, first, patient=True)
    guessed = jnp.minimum(point.guess.front, view.start + size)
    blown = lost < guessed
    if damping is not None and not refuses:
        damped, stalled, _ = _judge(damping, point, damped.merit, blown)
    strength = None
    if damping is not None:
        strength = view.read(damping.precision(damped.control, jnp.zeros_like(point.guess.states)))
    done = (prefix == problem.length) | (point.steps >= options.max_iters)
    judged = point._replace(
        prefix=prefix,
        scale=measure(point.scale, view, prefix, first),
        damped=damped,
        evaluations=point.evaluations + size,
        residual=residual,
    )
    return Seen(view, lost, blown, astray < guessed, strength, stalled, done), judged


def _judge(
    damping: Damping, point: Point, merit: Array, blown: Array
) -> tuple[Damped, Array, Array]:
    """Let a damping judge the last step; there is nothing to judge before the first.

    Returns:
        What the damping knows then, whether it has stalled, and whether it refuses the step.
    """
    last = point.damped
    attempt = Attempt(
        fall=(last.merit - merit)[None],
        predicted=(last.merit - last.expected)[None],
        rival=jnp.full_like(merit, jnp.nan),
        rounding=256 * jnp.finfo(merit.dtype).eps * (1.0 + jnp.abs(merit)),
        violated=blown,
        length=jnp.zeros_like(merit),
        # A recurrence has no posterior to measure a step in.
        moved=jnp.zeros_like(merit),
        size=jnp.full_like(merit, jnp.inf),
        share=jnp.zeros_like(merit),
        spread=jnp.ones_like(point.guess.states[0]),
    )
    verdict = damping.judge(last.control, attempt)
    first = point.steps == 0
    control = jax.tree.map(
        lambda new, old: jnp.where(first, old, new), verdict.control, last.control
    )
    return last._replace(control=control), verdict.stalled & ~first, ~verdict.accepted & ~first


def _step(problem: Problem, method: Method, options: Options, seen: Seen, point: Point) -> Point:
    """Take a step unless all is done, and restart the guesses behind what it reaches."""
    view, prefix, guess, damped = seen.view, point.prefix, point.guess, point.damped
    length, size = problem.length, len(view.index)
    # What undamped steps do by taking fewer states, damping does for all of them.
    most = options.windows[0] if damped is None and not options.patient else None
    largest = wild = EXPLODED * point.scale.usual
    if options.patient:
        largest = jnp.full_like(wild, jnp.finfo(wild.dtype).max)
    reach = lengthen(point.reach, length, most)
    reach = shorten(reach, seen.blown, seen.lost - prefix, most)
    end = jnp.minimum(jnp.minimum(prefix + reach.width, seen.lost), view.start + size)
    taken = jax.lax.cond(
        seen.done,
        lambda: Step(view.states, None if damped is None else damped.merit, end),
        lambda: solve(
            method, options.backend, options.restarts, view, prefix, end, seen.strength, largest
        ),
    )
    exploded = taken.end < end
    reach = shorten(reach, exploded, taken.end - prefix, most)
    if options.patient:
        exploded |= jnp.any(sizes(taken.states) > wild)
    reach = reach._replace(resets=reach.resets + (seen.astray | exploded))
    last = jnp.clip(taken.end - 1 - view.start, 0, size - 1)
    front = jnp.where(reach.holding, taken.end, length)

    def unless_done(new: Array, old: Array) -> Array:
        return jnp.where(seen.done, old, new)

    return point._replace(
        guess=Guess(
            states=view.write(guess.states, taken.states),
            front=unless_done(front, guess.front),
            held=unless_done(taken.states[last], guess.held),
        ),
        reach=jax.tree.map(unless_done, reach, point.reach),
        damped=None if damped is None else damped._replace(expected=taken.expected),
        steps=point.steps + (~seen.done & (prefix < view.start + size)),
    )
