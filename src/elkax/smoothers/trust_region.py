r"""Levenberg-Marquardt steps whose length is bounded."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from elkax.smoothers.damping import FRACTIONS, Attempt, Verdict, judge_gain, least_strength, size_of


class Region(NamedTuple):
    r"""Control of `TrustRegion`.

    Attributes:
        strength: $\lambda$.
        radius: $\Delta$; infinite before the first step.
        reference: largest entry of the Hessian's diagonal at the start.
    """

    strength: Array
    radius: Array
    reference: Array


@dataclass(frozen=True)
class TrustRegion:
    r"""Pseudo-observations of precision $\lambda d$, $\lambda$ set for a step of bounded length.

    d as for `LevenbergMarquardt`, of which this is the form that bounds the length of the step over
    all states and times instead of choosing $\lambda$ itself. A step longer than
    $\tfrac54\Delta$ is not taken: $\lambda$ grows in the proportion in which it was too long, at
    least twofold. With $\rho$ the fall of the merit divided by that of the linearized model,
    $\Delta$ becomes a quarter of the step for $\rho < \tfrac14$ and twice the step, unless it is
    larger already, for $\rho > \tfrac34$; $\lambda$ follows in proportion.

    Args:
        initial: first $\lambda$, relative as d has the size of the Hessian; the length of the step
            that it gives is the first radius.
        second_order: as `LevenbergMarquardt`.
        largest: $\lambda$ at which the iteration has stalled.

    References:
        Nocedal & Wright (2006), Numerical Optimization, Alg. 4.1.
    """

    initial: float = 1.0
    second_order: bool = True
    largest: float = 1e14
    fractions: ClassVar[tuple[float, ...]] = FRACTIONS
    refuses: ClassVar[bool] = True

    def start(self, hessian: Array) -> Region:
        """Return the first region; see `Damping`."""
        initial = jnp.asarray(self.initial, hessian.dtype)
        infinite = jnp.asarray(jnp.inf, hessian.dtype)
        return Region(initial, infinite, size_of(hessian))

    def precision(self, control: Region, means: Array) -> Array:
        r"""Return $\lambda d$; see `Damping`."""
        return jnp.broadcast_to(control.strength * control.reference, means.shape)

    def curved(self, control: Region) -> bool:
        """Tell whether there are second derivatives; see `Damping`."""
        return self.second_order

    def judge(self, control: Region, attempt: Attempt) -> Verdict:
        """Compare length and fall of the step with what was expected; see `Damping`."""
        whole, partly, choice, ratio = judge_gain(attempt)
        length = attempt.length
        radius = jnp.where(jnp.isinf(control.radius), length, control.radius)
        inside = length <= 1.25 * radius
        good = inside & whole & (ratio >= 0.25)
        wider = jnp.where(ratio > 0.75, jnp.maximum(radius, 2.0 * length), radius)
        radius = jnp.where(good, wider, jnp.where(inside, 0.25 * length, radius))
        # A step that is not finite has no length to go by.
        known = jnp.isfinite(length) & (radius > 0)
        factor = jnp.where(known, jnp.clip(length / jnp.where(known, radius, 1.0), 0.1, 10.0), 2.0)
        factor = jnp.where(good, factor, jnp.maximum(factor, 2.0))
        strength = jnp.maximum(control.strength * factor, least_strength(length))
        accepted = inside & (whole | partly)
        stalled = ~accepted & (strength > self.largest)
        return Verdict(choice, accepted, stalled, Region(strength, radius, control.reference))
