r"""How much of the Jacobian of a recurrence is kept.

A structure linearizes all steps of $s_t = f(s_{t-1}, x_t)$ at once, and solves the two problems
that the iteration poses in what it keeps of $A_t = \partial f/\partial s_{t-1}$: the affine
recurrence $\delta_t = A_t\delta_{t-1} + r_t$, and the same with process noise and a
pseudo-observation of every state.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, PyTree

from elkax.scan import Backend, linear_recurrence

# (state (D,), input) to the next state (D,).
Step = Callable[[Array, PyTree], Array]
# What a structure keeps of T Jacobians: an array with leading axis T; None where it is constant.
Jacobian = Any


@runtime_checkable
class Structure(Protocol):
    """What is kept of a Jacobian; hashable."""

    def linearize(self, step: Step, states: Array, inputs: PyTree) -> tuple[Array, Jacobian]:
        """Evaluate f and what is kept of its Jacobians.

        Args:
            step: f.
            states: $s_{t-1}$ (T, D), the states before the steps.
            inputs: leading axis T.

        Returns:
            $f(s_{t-1}, x_t)$ (T, D), and the Jacobians.
        """
        ...

    def times(self, jacobian: Jacobian, vectors: Array) -> Array:
        r"""Compute $A_tv_t$, (T, D)."""
        ...

    def transpose(self, jacobian: Jacobian) -> Jacobian:
        r"""Return $A_t^\top$."""
        ...

    def scan(
        self,
        jacobian: Jacobian,
        offset: Array,
        start: Array,
        *,
        reverse: bool = False,
        backend: Backend | None = None,
    ) -> Array:
        r"""Solve $\delta_t = A_t\delta_{t-1} + b_t$ from $\delta_0$: `linear_recurrence`."""
        ...


@runtime_checkable
class Dampable(Structure, Protocol):
    """A structure that can be damped."""

    def filter(
        self, jacobian: Jacobian, offset: Array, noise: Array, backend: Backend | None
    ) -> tuple[Array, Jacobian]:
        r"""Filter $\delta_t = A_t\delta_{t-1} + b_t + N(0, \mathrm{diag}(q_t))$, $\delta_0 = 0$.

        Every $\delta_t$ is observed as $0 + N(0, I)$.

        Args:
            jacobian: of the steps.
            offset: $b$ (T, D).
            noise: $q$ (T, D).
            backend: how to run over time.

        Returns:
            Filtered means (T, D), and covariances $P_{t|t}$, kept as a Jacobian is.
        """
        ...

    def gap(self, covs: Jacobian, jacobian: Jacobian) -> Jacobian:
        r"""Compute $(I - P_t)A_t$ for covariances from `filter`."""
        ...


def pushforward(step: Step, states: Array, inputs: PyTree) -> tuple[Array, Callable]:
    """Evaluate all steps, and return the function that multiplies with all their Jacobians."""
    return jax.linearize(lambda s: jax.vmap(step)(s, inputs), states)


class Scanned:
    """Structures whose Jacobians `linear_recurrence` takes, (T, D) or (T, D, D)."""

    def scan(
        self,
        jacobian: Array,
        offset: Array,
        start: Array,
        *,
        reverse: bool = False,
        backend: Backend | None = None,
    ) -> Array:
        """Solve the affine recurrence; see `Structure`."""
        return linear_recurrence(jacobian, offset, start, reverse=reverse, backend=backend)


class Entrywise(Scanned):
    """What structures have in common whose Jacobians are vectors (T, D)."""

    def times(self, jacobian: Array, vectors: Array) -> Array:
        """Multiply entry by entry; see `Structure`."""
        return jacobian * vectors

    def transpose(self, jacobian: Array) -> Array:
        """Return the same; see `Structure`."""
        return jacobian
