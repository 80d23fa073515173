r"""Dampings of recurrences, beside those of the iterated smoother.

The process noise of the linearized recurrence is I and every new state is observed at the old one
with precision $\lambda$; since only their product counts, the noise is $\lambda I$ and the
observation has the variance one. $\lambda = 0$ is the undamped iteration.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from elkax.smoothers.damping import Attempt, Verdict


@dataclass(frozen=True)
class ConstantDamping:
    r"""The same $\lambda$ in every iteration.

    Args:
        strength: $\lambda \ge 0$, or a function that maps the indices 0, ..., T - 1 of the steps
            (T,) to one $\lambda$ for each.
    """

    strength: float | Callable[[Array], Array] = 1e-3
    fractions: ClassVar[tuple[float, ...]] = (1.0,)
    refuses: ClassVar[bool] = False
    second_order: ClassVar[bool] = False

    def start(self, hessian: Array) -> None:
        """Return nothing; see `Damping`."""
        return None

    def precision(self, control: None, means: Array) -> Array:
        r"""Return $\lambda$; see `Damping`."""
        strength = self.strength
        if callable(strength):
            strength = jnp.asarray(strength(jnp.arange(len(means))), means.dtype)[:, None]
        return jnp.broadcast_to(jnp.asarray(strength, means.dtype), means.shape)

    def curved(self, control: None) -> bool:
        """Tell that there are no second derivatives; see `Damping`."""
        return False

    def judge(self, control: None, attempt: Attempt) -> Verdict:
        """Take every step; see `Damping`."""
        return Verdict(jnp.asarray(0), jnp.asarray(True), jnp.asarray(False), None)


@dataclass(frozen=True)
class PrefixDamping:
    r"""$\lambda$ set by how the converged prefix grows.

    In chaos the sum of all residuals says little: it rises while more and more states at the
    beginning become exact. Where the guesses of the tail had to be restarted $\lambda$ grows
    fourfold, to `least` at the least, otherwise it halves, and below `smallest` it is zero, so that
    the end is Newton's.

    Args:
        initial: first $\lambda$.
        least: $\lambda$ after a restart, at least.
        smallest: $\lambda$ that counts as none.
    """

    initial: float = 1e-3
    least: float = 4e-4
    smallest: float = 1e-8
    fractions: ClassVar[tuple[float, ...]] = (1.0,)
    refuses: ClassVar[bool] = False
    second_order: ClassVar[bool] = False

    def start(self, hessian: Array) -> Array:
        r"""Return the first $\lambda$; see `Damping`."""
        return jnp.asarray(self.initial, hessian.dtype)

    def precision(self, control: Array, means: Array) -> Array:
        r"""Return $\lambda$; see `Damping`."""
        return jnp.broadcast_to(jnp.where(control > self.smallest, control, 0.0), means.shape)

    def curved(self, control: Array) -> bool:
        """Tell that there are no second derivatives; see `Damping`."""
        return False

    def judge(self, control: Array, attempt: Attempt) -> Verdict:
        """Take every step, and look at the tail; see `Damping`."""
        raised = jnp.clip(4.0 * control, self.least, 1e3)
        lowered = jnp.maximum(0.5 * control, 0.5 * self.smallest)
        control = jnp.where(attempt.violated, raised, lowered).astype(control.dtype)
        return Verdict(jnp.asarray(0), jnp.asarray(True), jnp.asarray(False), control)
