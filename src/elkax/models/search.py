r"""Search for the minimum of a negative log-likelihood whose last digits are noise.

A trust-region Newton method in float64, outside of JAX, around a function that may round in
float32. Three things make it independent of units: every parameter is measured by the root of its
expected information, so that a step of length $\sqrt n$ changes each of n predictions by about its
own uncertainty; the search ends by the gain in nats that a further step would bring; and where
differences of values are noise, gains are told from gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# What rounding may do to a sum of n terms, in units of eps (|value| + n). Smaller differences of
# values are not looked at; gradients tell which of two points that close is the better one.
NOISE = 32.0
# A step is at most this many times sqrt(n) long: about six powers of e for a variance.
LONGEST = 4.0
# A point within the tolerance is improved as long as a step lowers the gain that is left this
# much: Newton's method does until it meets rounding, and a walk to a boundary does not.
WORTHWHILE = 0.1
# What is left, after a step, of the information that a variance had: near a unit root there is more
# than elsewhere, and short steps are to be long again behind it.
MEMORY = 0.25
# Below this share of the information expected, a number is looked along before the search ends: the
# logarithm of a variance that others drown has no slope, and still may be far from its best value.
DROWNED = 0.01
# How far, in units of the information that it had at best: about 30 powers of e for a variance.
LOOKS = 16
# Steps refused in a row before the search gives up; each is at most a quarter of the one before.
REFUSALS = 40


class Point(NamedTuple):
    """The negative log-likelihood and its gradient at a point."""

    theta: np.ndarray
    value: float
    gradient: np.ndarray

    def is_finite(self) -> bool:
        """Tell whether the point may be stepped to; an infinite likelihood may not."""
        return bool(np.isfinite(self.value) and np.all(np.isfinite(self.gradient)))


class Curvature(NamedTuple):
    """Second derivatives at a point, and what measures a step.

    Attributes:
        hessian: of the negative log-likelihood (p, p).
        by_means: information expected from predicted means (p, p).
        by_variances: the same from predicted variances (p, p).
        by_scale: its product with the direction that makes all variances grow at the same rate.
        excess: mean squared error of the predictions over what their variances say.

    All but the Hessian are zero or NaN where they are not known.
    """

    hessian: np.ndarray
    by_means: np.ndarray
    by_variances: np.ndarray
    by_scale: np.ndarray
    excess: np.ndarray


class Problem(NamedTuple):
    """What is minimised, and how exactly.

    Attributes:
        evaluate: from theta (p,) to a point, whose theta is rounded to the type of the function.
        curvature: from theta to its curvature; costs about p times as much.
        count: n, observed numbers.
        eps: rounding unit of the function.
        tolerance: gain in nats that counts as converged.
        target: gain at which the search ends at once.
    """

    evaluate: Callable[[np.ndarray], Point]
    curvature: Callable[[np.ndarray], Curvature]
    count: int
    eps: float
    tolerance: float
    target: float


class Search:
    """A search for a minimum, and the best point that it has seen.

    Attributes:
        point: the point accepted last. None before was lower by more than rounding.
        curvature: at that point.
        gain: expected at that point, see `expected_gain`.
        iterations: number of steps accepted.
    """

    def __init__(
        self,
        problem: Problem,
        start: Point,
        report: Callable[["Search"], None] | None = None,
    ) -> None:
        """Begin at a finite point; `report` is called after every accepted step."""
        self._problem, self._report = problem, report
        self._radius = np.sqrt(problem.count)
        self._by_variances = self._most = np.zeros_like(start.theta)
        self._lowest = np.inf
        self.iterations = 0
        self._accept(start)

    def run(self, max_iters: int) -> str:
        """Search, and say why it ended: "converged", "max_iters" or "stalled"."""
        while self.iterations < max_iters and self._rescale():
            pass
        ending = self._descend(max_iters)
        while self.iterations < max_iters and self._look_along():
            ending = self._descend(max_iters)
        return "converged" if self.gain <= self._problem.tolerance else ending

    def _descend(self, max_iters: int) -> str:
        before = np.inf
        while self.gain > self._problem.target:
            converged = self.gain <= self._problem.tolerance
            if converged and self.gain > WORTHWHILE * before:
                break
            if self.iterations >= max_iters:
                return "max_iters"
            before = self.gain
            # A point that is good enough is left for one try only.
            if not self._step(1 if converged else REFUSALS):
                return "stalled"
        return "converged"

    def _move(self, point: Point) -> None:
        """Accept a point as the next step."""
        self._accept(point)
        self.iterations += 1
        if self._report is not None:
            self._report(self)

    def _accept(self, point: Point) -> None:
        """Go to a point, and find the curvature there."""
        self.point = point
        self._lowest = min(self._lowest, point.value)
        curvature = self._problem.curvature(point.theta)
        known = bool(np.all(np.isfinite(curvature.hessian)))
        if not known:
            # Then the gradient alone has to do: a step along it, as long as the radius allows.
            curvature = curvature._replace(hessian=np.zeros_like(curvature.hessian))
        self.curvature = curvature
        self._scale = self._measure()
        gain = expected_gain(curvature.hessian, point.gradient, self._scale, self._problem.eps)
        self.gain = gain if known else np.inf

    def _measure(self) -> np.ndarray:
        """Give the root of the information that the data are expected to hold on each number."""
        hessian = self.curvature.hessian
        by_means, by_variances = map(np.diagonal, self.curvature[1:3])
        self._most = np.fmax(self._most, by_variances)
        # A variance that others drown at the moment has no information, but may not run away.
        self._by_variances = np.fmax(MEMORY * self._by_variances, by_variances)
        expected = by_means + self._by_variances
        # The outer product of n scores is at least the square of their sum over n.
        least = np.square(self.point.gradient) / self._problem.count
        observed = np.maximum(np.abs(np.diagonal(hessian)), least)
        square = np.where(np.isfinite(expected) & (expected > 0), expected, observed)
        return np.sqrt(np.where(square > 0, square, 1.0))

    def _rescale(self) -> bool:
        """Bring all variances to the size of the data together, or tell that they have it.

        Where they are far off, the likelihood would be raised by any one of them, and the one that
        grows first hides the others.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            missing = np.log(self.curvature.excess)
        expected = self.curvature.by_means + self.curvature.by_variances
        known = np.isfinite(missing) and np.all(np.isfinite(expected))
        if not known or abs(missing) < 1.0:
            return False
        scaled = expected / (self._scale[:, None] * self._scale)
        direction = np.linalg.lstsq(scaled, self.curvature.by_scale / self._scale, rcond=1e-6)[0]
        there = self._problem.evaluate(self.point.theta + missing * direction / self._scale)
        if not there.is_finite() or there.value >= self.point.value - self._noise():
            return False
        self._move(there)
        return True

    def _look_along(self) -> bool:
        """Go to a better value along a number without information, or tell that there is none."""
        here, best = self.point, self.point
        scale = np.fmax(self._scale, np.sqrt(self._most))
        unit = np.sqrt(self._problem.count) / scale
        drowned = np.diagonal(self.curvature.hessian) < DROWNED * scale**2
        for i in np.flatnonzero(drowned):
            for looks in (*range(-LOOKS, 0), *range(1, LOOKS + 1)):
                theta = here.theta.copy()
                theta[i] += looks * unit[i]
                there = self._problem.evaluate(theta)
                if there.is_finite() and there.value < best.value:
                    best = there
        if here.value - best.value <= max(self._noise(), self._problem.tolerance):
            return False
        self._radius = np.sqrt(self._problem.count)
        self._move(best)
        return True

    def _noise(self) -> float:
        return NOISE * self._problem.eps * (abs(self.point.value) + self._problem.count)

    def _step(self, tries: int) -> bool:
        """Take a step, or tell that none of so many was good enough."""
        here, scale = self.point, self._scale
        # Far from the minimum the value is an exponential of parameters, and its logarithm is more
        # like a parabola: what is modelled is m log(value), shifted to have the same gradient.
        m = self._problem.count + (self.gain if np.isfinite(self.gain) else 0.0)
        hessian = self.curvature.hessian - np.outer(here.gradient, here.gradient) / m
        for _ in range(tries):
            wanted = bounded_step(
                hessian / (scale[:, None] * scale), here.gradient / scale, self._radius
            )
            there = self._problem.evaluate(here.theta + wanted / scale)
            moved = there.theta - here.theta
            predicted = -(here.gradient @ moved + 0.5 * moved @ hessian @ moved)
            ratio = -1.0
            if there.is_finite() and predicted > 0:
                fall = self._fall(there, moved, predicted)
                ratio = -m * np.log1p(-min(fall / m, 0.999)) / predicted
            length = float(np.linalg.norm(wanted))
            # So short a step that values do not show it: the gradient is not that of the value.
            if predicted < min(1e-6 * self.gain, self._noise() / NOISE):
                return False
            if ratio < 0.25:
                self._radius = 0.25 * length
            elif ratio > 0.75 and length > 0.9 * self._radius:
                longest = LONGEST * np.sqrt(self._problem.count)
                self._radius = min(2.5 * self._radius, longest)
            if ratio > 1e-4:
                self._move(there)
                # In the units found there, which may be quite others.
                self._radius = max(self._radius, 0.25 * float(np.linalg.norm(moved * self._scale)))
                return True
        return False

    def _fall(self, there: Point, moved: np.ndarray, predicted: float) -> float:
        """Give by how much the value falls, to as many digits as can be had."""
        here, noise = self.point, self._noise()
        fall = here.value - there.value
        # A rise is never more than noise above the lowest value, however many steps there are.
        if max(abs(fall), predicted) > noise or there.value > self._lowest + noise:
            return fall
        # By the trapezoidal rule, whose error is of third order in the step.
        return -0.5 * float((here.gradient + there.gradient) @ moved)


def bounded_step(hessian: np.ndarray, gradient: np.ndarray, radius: float) -> np.ndarray:
    r"""Minimise $g^\top s + \tfrac12 s^\top Hs$ over $|s|$ up to a radius.

    References:
        Moré & Sorensen (1983), SIAM Journal on Scientific and Statistical Computing 4(3).
    """
    values, vectors = np.linalg.eigh(hessian)
    slopes = vectors.T @ gradient
    # At a saddle the slope along a falling direction is zero, and either way out will do.
    tiny = 1e-12 * (np.linalg.norm(slopes) + radius * np.max(np.abs(values)))
    slopes = np.where((values <= 0) & (np.abs(slopes) < tiny), tiny, slopes)
    if values[0] > 0 and np.linalg.norm(slopes / values) <= radius:
        return -vectors @ (slopes / values)
    size = np.linalg.norm(slopes)
    if size == 0.0:
        return np.zeros_like(gradient)
    low = max(0.0, -values[0])
    high = low + size / radius
    for _ in range(100):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            outside = np.linalg.norm(slopes / (values + middle)) > radius
        low, high = (middle, high) if outside else (low, middle)
    return -vectors @ (slopes / (values + high))


def expected_gain(
    hessian: np.ndarray, gradient: np.ndarray, scale: np.ndarray, eps: float
) -> float:
    r"""Give what a Newton step is expected to gain, $\tfrac12 g^\top H^{-1} g$, in nats.

    The eigenvalues are those of the Hessian in units in which its diagonal is one; in a direction
    that is flat but for rounding, p square roots of the rounding unit stand in for the curvature.
    A direction that curves the wrong way adds what a step of one unit along it gains.

    Args:
        hessian: H (p, p).
        gradient: g (p,).
        scale: (p,), units for numbers without positive curvature.
        eps: rounding unit of both.
    """
    diagonal = np.diagonal(hessian)
    unit = np.sqrt(np.where(diagonal > 0, diagonal, scale * scale))
    values, vectors = np.linalg.eigh(hessian / (unit[:, None] * unit))
    slopes = vectors.T @ (gradient / unit)
    floor = len(unit) * np.sqrt(eps)
    newton = 0.5 * np.sum(slopes**2 / np.maximum(np.abs(values), floor))
    return float(newton + 0.5 * np.sum(np.maximum(-values - floor, 0.0)))
