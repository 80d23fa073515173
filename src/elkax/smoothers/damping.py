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
        predicted: by how much the linearized model says it does.
        rounding: what of a fall may be rounding.
        violated: whether the trajectory violates an exact constraint.
        length: Euclidean norm of the whole step over all states and times.
    """

    fall: Array
    predicted: Array
    rounding: Array
    violated: Array
    length: Array


@runtime_checkable
class Damping(Protocol):
    """How steps are damped; hashable.

    Attributes:
        fractions: parts of the step that are tried, the largest first.
        refuses: whether a step that raises the merit is refused.
        second_order: whether the pseudo-observations also carry what the linearized model leaves
            out of the Hessian of the MAP cost, as far as they stay positive.
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
    fall, predicted, rounding, violated, _ = attempt
    trusted = (jnp.abs(predicted[0]) <= rounding) & (fall[0] >= -rounding)
    whole = trusted | ((fall[0] > 0) & (predicted[0] > 0))
    parts = violated & (fall > 0) & (fall >= 1e-4 * predicted)
    ratio = jnp.where(trusted, 1.0, fall[0] / jnp.where(predicted[0] > 0, predicted[0], 1.0))
    partly = ~whole & jnp.any(parts)
    return Gain(whole, partly, jnp.where(whole, 0, jnp.argmax(parts)), ratio)


# Parts of a damped step that are tried; see `judge_gain`.
FRACTIONS = (1.0, 0.3, 0.1, 0.03, 0.01)


def least_strength(like: Array) -> float:
    r"""Return the smallest $\lambda$, far below rounding, in the dtype of an array."""
    return float(jnp.finfo(like.dtype).eps) ** 1.25


def size_of(hessian: Array) -> Array:
    """Return the largest entry of the diagonal of a Hessian, one if none is positive."""
    largest = jnp.max(hessian)
    return jnp.where(largest > 0, largest, 1.0)


class Strength(NamedTuple):
    r"""Control of `LevenbergMarquardt`.

    Attributes:
        value: $\lambda$.
        growth: by what the next rejection multiplies it.
        reference: largest entry of the Hessian's diagonal at the start.
    """

    value: Array
    growth: Array
    reference: Array


@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Pseudo-observations of precision $\lambda d$, $\lambda$ set by the gain ratio.

    d is the largest entry of the Hessian's diagonal at the start, the same for all states: scaling
    by the diagonal itself took longer, or to worse minima, where neighbouring states nearly
    determine each other. A step is accepted if the merit falls. With $\rho$ the fall divided by
    that of the linearized model, an accepted step multiplies $\lambda$ by
    $\max(\tfrac13, 1 - (2\rho - 1)^3)$, rejections in a row multiply it by 2, 4, 8, ...

    Args:
        initial: first $\lambda$; relative, because d has the size of the Hessian.
        second_order: add the second derivatives of f and h to $\lambda d$, eigenvalues that come
            out negative left out. Without them an iteration with large residuals needs a damping
            that never goes away, and hundreds of steps. For `Taylor()` only.
        largest: $\lambda$ at which the iteration has stalled.

    References:
        Nielsen (1999), IMM-REP-1999-05; Särkkä & Svensson (2020), arXiv:2003.12371.
    """

    initial: float = 1.0
    second_order: bool = True
    largest: float = 1e14
    fractions: ClassVar[tuple[float, ...]] = FRACTIONS
    refuses: ClassVar[bool] = True

    def start(self, hessian: Array) -> Strength:
        """Return the first strength; see `Damping`."""
        initial = jnp.asarray(self.initial, hessian.dtype)
        return Strength(initial, jnp.asarray(2.0, hessian.dtype), size_of(hessian))

    def precision(self, control: Strength, means: Array) -> Array:
        r"""Return $\lambda d$; see `Damping`."""
        return jnp.broadcast_to(control.value * control.reference, means.shape)

    def judge(self, control: Strength, attempt: Attempt) -> Verdict:
        """Compare the fall with the predicted one; see `Damping`."""
        whole, partly, choice, ratio = judge_gain(attempt)
        # Bounded before the cube, which would overflow for a step far better than predicted.
        shrink = jnp.maximum(1 / 3, 1.0 - (2.0 * jnp.clip(ratio, 0.0, 2.0) - 1.0) ** 3)
        factor = jnp.where(whole, shrink, jnp.where(partly, 1.0, control.growth))
        value = jnp.maximum(control.value * factor, least_strength(ratio))
        accepted = whole | partly
        growth = jnp.where(whole, 2.0, 2.0 * control.growth)
        stalled = ~accepted & (value > self.largest)
        return Verdict(choice, accepted, stalled, Strength(value, growth, control.reference))


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

    def judge(self, control: None, attempt: Attempt) -> Verdict:
        """Find the longest fraction that pays; see `Damping`."""
        fall, predicted, rounding, _, _ = attempt
        trusted = (jnp.abs(predicted) <= rounding) & (fall >= -rounding)
        good = trusted | ((fall > 0) & (fall >= self.sufficient * predicted))
        return Verdict(jnp.argmax(good), jnp.any(good), ~jnp.any(good), None)
