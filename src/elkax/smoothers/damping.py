r"""How a step of the iterated smoother is kept from going too far.

A damping gives pseudo-observations of the states, and judges what came of the step.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array


class Verdict(NamedTuple):
    """What becomes of a step.

    Attributes:
        choice: which of the fractions of the step is taken.
        accepted: whether any is.
        stalled: whether no later step can be accepted either.
        control: state of the damping for the next step.
    """

    choice: Array
    accepted: Array
    stalled: Array
    control: Any


class Attempt(NamedTuple):
    """What is known of a step and of its fractions, the whole step first.

    Attributes:
        fall: by how much the merit falls for every fraction, NaN where it is not finite.
        predicted: by how much the model that made the step says it does.
        rival: by how much the other model says the whole step does, that with second derivatives
            where the step was made without, and the other way around; NaN if there is none.
        rounding: what of a fall may be rounding.
        violated: whether the trajectory violates an exact constraint.
        length: Euclidean norm of the whole step over all states and times.
        moved: largest move of a state by the whole step, in posterior standard deviations.
        size: the same as it would be without damping.
        share: largest precision of a pseudo-observation, relative to that of the posterior.
        spread: largest posterior variance of each state over time (D,), damped.
    """

    fall: Array
    predicted: Array
    rival: Array
    rounding: Array
    violated: Array
    length: Array
    moved: Array
    size: Array
    share: Array
    spread: Array

    def trusted(self) -> Array:
        """Tell for which fractions model and cost agree up to rounding."""
        return (jnp.abs(self.predicted) <= self.rounding) & (self.fall >= -self.rounding)

    def pays(self, sufficient: float) -> Array:
        """Tell which fractions bring at least a part of what the model says they do."""
        return (self.fall > 0) & (self.fall >= sufficient * self.predicted)


@runtime_checkable
class Damping(Protocol):
    """How steps are damped; hashable.

    Attributes:
        fractions: parts of the step that are tried, the largest first.
        refuses: whether a step that raises the merit is refused.
        second_order: whether the pseudo-observations may also carry what the linearized model
            leaves out of the Hessian of the MAP cost, as far as they stay positive.
    """

    fractions: tuple[float, ...]
    refuses: bool
    second_order: Any

    def start(self, hessian: Array) -> Any:
        """Return the first control from the diagonal of the Hessian (T, D)."""
        ...

    def precision(self, control: Any, means: Array) -> Array | None:
        """Return the precision of the pseudo-observations of `means`, (T, D); None for none."""
        ...

    def curved(self, control: Any) -> Any:
        """Tell whether they do now."""
        ...

    def judge(self, control: Any, attempt: Attempt) -> Verdict:
        """Judge a step and its fractions, given the state of the damping."""
        ...


@dataclass(frozen=True)
class GaussNewton:
    """No damping: every finite step is taken."""

    fractions: ClassVar[tuple[float, ...]] = (1.0,)
    refuses: ClassVar[bool] = False
    second_order: ClassVar[bool] = False

    def start(self, hessian: Array) -> None:
        """Return nothing; see `Damping`."""
        return None

    def precision(self, control: None, means: Array) -> None:
        """Return no pseudo-observations; see `Damping`."""
        return None

    def curved(self, control: None) -> bool:
        """Tell that the step is that of the linearized model; see `Damping`."""
        return False

    def judge(self, control: None, attempt: Attempt) -> Verdict:
        """Take the step; see `Damping`."""
        finite = jnp.isfinite(attempt.fall[0])
        return Verdict(jnp.asarray(0), finite, ~finite, None)


class Gain(NamedTuple):
    """What a damped step brought.

    Attributes:
        whole: whether the whole step is accepted.
        partly: whether only a fraction of it is.
        choice: which fraction.
        ratio: fall of the whole step divided by the predicted one.
    """

    whole: Array
    partly: Array
    choice: Array
    ratio: Array


def judge_gain(attempt: Attempt) -> Gain:
    """Accept the whole step if the merit falls, or, off an exact constraint, a part of it.

    Every damped step meets the linearized constraints in full, so that damping does not make it
    short: where it goes too far along them, a part of it is taken.
    """
    fall, predicted = attempt.fall, attempt.predicted
    trusted = attempt.trusted()[0]
    whole = trusted | ((fall[0] > 0) & (predicted[0] > 0))
    parts = attempt.violated & attempt.pays(1e-4)
    ratio = jnp.where(trusted, 1.0, fall[0] / jnp.where(predicted[0] > 0, predicted[0], 1.0))
    partly = ~whole & jnp.any(parts)
    return Gain(whole, partly, jnp.where(whole, 0, jnp.argmax(parts)), ratio)


# Parts of a step that are tried.
FRACTIONS = (1.0, 0.3, 0.1, 0.03, 0.01)


def least_strength(like: Array) -> float:
    r"""Return the smallest $\lambda$, far below rounding, in the dtype of an array."""
    return float(jnp.finfo(like.dtype).eps) ** 1.25


def size_of(hessian: Array) -> Array:
    """Return the largest entry of the diagonal of a Hessian, one if none is positive."""
    largest = jnp.max(hessian)
    return jnp.where(largest > 0, largest, 1.0)


# An undamped step is tried again when it seems shorter than this, in posterior deviations, and
# the damping that says so is a tenth of the posterior precision at most.
SHORT, SLIGHT = 1.0, 0.1


class Strength(NamedTuple):
    r"""Control of `LevenbergMarquardt`.

    Attributes:
        value: $\lambda$ of the next damped step (D,).
        growth: by what the next rejection multiplies it.
        reference: $d$ (D,).
        free: whether the next step is undamped.
        reach: how long an undamped step may seem to be tried again; infinite until one failed.
        curved: whether the next step uses second derivatives.
    """

    value: Array
    growth: Array
    reference: Array
    free: Array
    reach: Array
    curved: Array


@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Gauss-Newton while it goes well, else pseudo-observations of precision $\lambda d$.

    An undamped step is taken if it brings at least half the fall of the merit that the linearized
    model predicts, and no state moves by more than `longest` posterior standard deviations; or
    the longest of the fractions 0.3 and 0.1 of it for which that holds. From the first step that
    fails on they are damped. With $\rho$ the fall divided by the predicted one, a damped step is
    accepted if the merit falls; it multiplies $\lambda$ by $\max(\tfrac13, 1 - (2\rho - 1)^3)$,
    and rejections in a row by 2, 4, 8, ... Once the damping is slight and the undamped step short,
    that is tried again.

    d has an entry for each state, the largest on the Hessian's diagonal at the start, and
    $\lambda$ is at first what makes it `initial` times the posterior precision of that state where
    it is known least, 1 at most: no answer depends on the units of the states. Scaled by the
    diagonal itself, time by time, steps took longer, or to worse minima, where neighbouring
    states nearly determine each other.

    Args:
        initial: damping after the first undamped step that failed, in posterior precisions.
        second_order: damped steps may add the second derivatives of f and h to $\lambda d$,
            eigenvalues that come out negative left out: the first does, each other one if that
            predicted the last fall better than the model without. Without them an iteration with
            large residuals needs a damping that never goes away, and hundreds of steps. For
            `Taylor()` only.
        longest: limit of an undamped step. With 0 all steps are damped, $\lambda = 1$ at first.
        largest: $\lambda$ at which the iteration has stalled.

    References:
        Nielsen (1999), IMM-REP-1999-05; Dennis, Gay & Welsch (1981), ACM TOMS 7(3), for the choice
        of the model; Särkkä & Svensson (2020), arXiv:2003.12371.
    """

    initial: float = 100.0
    second_order: bool = True
    longest: float = 10.0
    largest: float = 1e14
    fractions: ClassVar[tuple[float, ...]] = FRACTIONS
    refuses: ClassVar[bool] = True

    def start(self, hessian: Array) -> Strength:
        """Return the first strength; see `Damping`."""
        largest = jnp.max(hessian, axis=0)
        reference = jnp.where(largest > 0, largest, size_of(hessian))
        one, free = jnp.ones((), hessian.dtype), jnp.asarray(self.longest > 0)
        return Strength(
            jnp.ones_like(reference),
            2.0 * one,
            reference,
            free,
            jnp.inf * one,
            ~free & self.second_order,
        )

    def precision(self, control: Strength, means: Array) -> Array:
        r"""Return $\lambda d$; see `Damping`."""
        value = jnp.where(control.free, 0.0, control.value) * control.reference
        return jnp.broadcast_to(value, means.shape)

    def curved(self, control: Strength) -> Array:
        """Tell whether the next step uses second derivatives; see `Damping`."""
        return control.curved

    def judge(self, control: Strength, attempt: Attempt) -> Verdict:
        """Compare the fall with the predicted one; see `Damping`."""
        gain = judge_gain(attempt)
        choice, good = self._judge_free(attempt)
        free = control.free
        choice = jnp.where(free, choice, gain.choice)
        whole = jnp.where(free, good & (choice == 0), gain.whole)
        accepted = jnp.where(free, good, gain.whole | gain.partly)
        # Bounded before the cube, which would overflow for a step far better than predicted.
        shrink = jnp.maximum(1 / 3, 1.0 - (2.0 * jnp.clip(gain.ratio, 0.0, 2.0) - 1.0) ** 3)
        factor = jnp.where(whole, shrink, jnp.where(accepted, 1.0, control.growth))
        value = jnp.maximum(control.value * jnp.where(free, 1.0, factor), least_strength(shrink))
        growth = jnp.where(whole, 2.0, jnp.where(free, 1.0, 2.0) * control.growth)
        failed, first = free & ~accepted, jnp.isinf(control.reach)
        known = attempt.spread * control.reference
        known = jnp.where(known > self.initial, self.initial / known, 1.0)
        value = jnp.where(failed & first, known, value)
        shorter = jnp.minimum(jnp.minimum(control.reach, SHORT), 0.3 * attempt.size)
        reach = jnp.where(failed, shorter, control.reach)
        again = (gain.ratio > 0.75) & (attempt.size < reach) & (attempt.share < SLIGHT)
        free = jnp.where(free, accepted, whole & again & (self.longest > 0))
        miss, other = abs(attempt.fall - attempt.predicted)[0], abs(attempt.fall[0] - attempt.rival)
        better = (other < miss - attempt.rounding) & ~(control.free & first)
        curved = ((failed & first) | (control.curved ^ better)) & self.second_order
        stalled = ~accepted & jnp.all(value > self.largest)
        control = Strength(value, growth, control.reference, free, reach, curved)
        return Verdict(choice, accepted, stalled, control)

    def _judge_free(self, attempt: Attempt) -> tuple[Array, Array]:
        """Find the longest fraction of an undamped step to take, and whether there is one."""
        fractions = jnp.asarray(self.fractions, attempt.fall.dtype)
        good = attempt.pays(0.5) & (fractions * attempt.moved <= self.longest) & (fractions >= 0.1)
        good = good.at[0].set(good[0] | attempt.trusted()[0])
        return jnp.argmax(good), jnp.any(good)


@dataclass(frozen=True)
class LineSearch:
    r"""The longest of the fractions $1, \tfrac12, \tfrac14, ...$ of an undamped step that pays.

    It must lower the merit by at least `sufficient` times what the linearized model predicts.

    Args:
        halvings: how often the step is halved.
        sufficient: part of the predicted fall.
        second_order: as `LevenbergMarquardt`; without it the step is that of Gauss-Newton.
    """

    halvings: int = 20
    sufficient: float = 1e-4
    second_order: bool = True
    refuses: ClassVar[bool] = True

    @property
    def fractions(self) -> tuple[float, ...]:
        """Return the fractions; see `Damping`."""
        return tuple(0.5**k for k in range(self.halvings + 1))

    def start(self, hessian: Array) -> None:
        """Return nothing; see `Damping`."""
        return None

    def precision(self, control: None, means: Array) -> None:
        """Return no pseudo-observations; see `Damping`."""
        return None

    def curved(self, control: None) -> bool:
        """Tell whether there are second derivatives; see `Damping`."""
        return self.second_order

    def judge(self, control: None, attempt: Attempt) -> Verdict:
        """Find the longest fraction that pays; see `Damping`."""
        good = attempt.trusted() | attempt.pays(self.sufficient)
        return Verdict(jnp.argmax(good), jnp.any(good), ~jnp.any(good), None)
