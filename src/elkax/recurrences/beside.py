"""Steps over the whole trajectory and steps in windows, side by side.

Where the guesses of a tail are lost, windows save evaluations of the cell; on an accelerator the
number of iterations counts instead, and either may take fewer. From the first loss on every
iteration is one of both, each on a trajectory of its own, until one of them has arrived: so there
are no more of them than plain Newton steps would take, and a window costs little beside these.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from elkax.recurrences.method import Method
from elkax.recurrences.newton import advance
from elkax.recurrences.point import Options, Point
from elkax.recurrences.problem import Problem
from elkax.smoothers.iteration import Progress


class Pair(NamedTuple):
    """Two trajectories.

    Attributes:
        whole: one by plain Newton steps, whose resets count where windows would restart.
        short: one in windows, since the first of these; the same before.
    """

    whole: Point
    short: Point

    def best(self) -> Point:
        """Return the one of which more has converged, with the evaluations of both."""
        further = self.short.prefix > self.whole.prefix
        parted = self.whole.reach.resets > 0
        evaluations = self.whole.evaluations + jnp.where(parted, self.short.evaluations, 0)
        point = jax.tree.map(lambda a, b: jnp.where(further, a, b), self.short, self.whole)
        reach = point.reach._replace(resets=jnp.where(parted, self.short.reach.resets, 0))
        return point._replace(evaluations=evaluations, reach=reach)


def advance_beside(
    problem: Problem, method: Method, options: Options, pair: Pair
) -> tuple[Pair, Progress]:
    """Take a step in both; see `advance`."""
    wide = options._replace(windows=options.windows[1:], patient=True)
    narrow = options._replace(windows=options.windows[:1])
    whole, progress = advance(problem, method, wide, pair.whole)

    def apart() -> tuple[Point, Progress]:
        parted = pair.whole.reach.resets > 0
        fresh = _in_windows(pair.whole, options.windows[0])
        start = jax.tree.map(lambda a, b: jnp.where(parted, a, b), pair.short, fresh)
        return advance(problem, method, narrow, start)

    short, other = jax.lax.cond(whole.reach.resets > 0, apart, lambda: (whole, progress))
    further = other.record.prefix > progress.record.prefix
    joint = Progress(
        finite=progress.finite & other.finite,
        step=jnp.minimum(progress.step, other.step),
        change=progress.change,
        settled=progress.settled,
        stalled=progress.stalled,
        record=jax.tree.map(lambda a, b: jnp.where(further, a, b), other.record, progress.record),
    )
    return Pair(whole, short), joint


def _in_windows(point: Point, width: int) -> Point:
    """Go on from a trajectory in windows: guesses behind them follow their last state."""
    zero = jnp.zeros_like(point.steps)
    reach = point.reach._replace(
        width=jnp.full_like(point.reach.width, width),
        resets=zero + 1,
        calm=zero,
        holding=jnp.ones_like(point.reach.holding),
    )
    return point._replace(reach=reach, evaluations=zero)
