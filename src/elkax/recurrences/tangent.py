r"""Solutions of the linearized recurrence $e_t = J_te_{t-1} + b_t$, $e_0 = 0$, and of its adjoint.

J is the whole Jacobian, whatever the iteration that found the trajectory keeps of it: derivatives
and error bounds rest on these solutions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.linearize import Structure
from elkax.recurrences.problem import Problem, shift, shift_back
from elkax.scan import Backend
from elkax.smoothers.iteration import Progress, Status, Tolerance, iterate

Solve = Callable[[Array], Array]


@runtime_checkable
class Gradient(Protocol):
    """How derivatives of a solution are found; hashable."""

    def tangent(
        self,
        problem: Problem,
        states: Array,
        structure: Structure,
        window: int,
        backend: Backend | None,
    ) -> Solve:
        """Return the solution of the linearized recurrence about `states` as a function of b."""
        ...

    def adjoint(
        self,
        problem: Problem,
        states: Array,
        structure: Structure,
        window: int,
        backend: Backend | None,
    ) -> Solve:
        r"""Return that of the adjoint equation, $g_t = J_{t+1}^\top g_{t+1} + b_t$."""
        ...


def residual_map(problem: Problem, states: Array) -> Solve:
    """Return the function $e_t - J_te_{t-1}$."""

    def apply(e: Array) -> Array:
        def step(before: Array) -> Array:
            return jax.vmap(problem.step)(before, problem.inputs)

        return e - jax.jvp(step, (problem.before(states),), (shift(e),))[1]

    return apply


def solve_linearized(
    gradient: Gradient,
    problem: Problem,
    states: Array,
    structure: Structure,
    window: int,
    backend: Backend | None,
) -> Solve:
    """Return the solution of the linearized recurrence, differentiable to every order."""
    fixed = jax.lax.stop_gradient((problem.initial, problem.inputs, states))

    def find(_: Solve, b: Array, which: str) -> Array:
        initial, inputs, at = fixed
        still = Problem(problem.step, initial, inputs)
        return getattr(gradient, which)(still, at, structure, window, backend)(b)

    return partial(
        jax.lax.custom_linear_solve,
        residual_map(problem, states),
        solve=partial(find, which="tangent"),
        transpose_solve=partial(find, which="adjoint"),
    )


@dataclass(frozen=True)
class Implicit:
    """Derivatives of the implicit function theorem, through the whole Jacobians.

    One affine scan; memory O(W D^2) for windows of W steps, O(T D^2) without.
    """

    def tangent(
        self,
        problem: Problem,
        states: Array,
        structure: Structure,
        window: int,
        backend: Backend | None,
    ) -> Solve:
        """Solve by an affine scan; see `Gradient`."""

        def part(before: Array, inputs: PyTree, b: Array, carry: Array) -> tuple[Array, Array]:
            _, jacobian = structure.linearize(problem.step, before, inputs)
            e = structure.scan(jacobian, b, carry, backend=backend)
            return e[-1], e

        return lambda b: _by_windows(problem, states, window, part, b, reverse=False)

    def adjoint(
        self,
        problem: Problem,
        states: Array,
        structure: Structure,
        window: int,
        backend: Backend | None,
    ) -> Solve:
        r"""Solve for $u_t = J_t^\top(b_t + u_{t+1})$; $g_t = b_t + u_{t+1}$."""

        def part(before: Array, inputs: PyTree, b: Array, carry: Array) -> tuple[Array, Array]:
            _, jacobian = structure.linearize(problem.step, before, inputs)
            back = structure.transpose(jacobian)
            u = structure.scan(back, structure.times(back, b), carry, reverse=True, backend=backend)
            return u[0], b + jnp.concatenate((u[1:], carry[None]))

        return lambda b: _by_windows(problem, states, window, part, b, reverse=True)


def _by_windows(
    problem: Problem, states: Array, window: int, part: Callable, b: Array, *, reverse: bool
) -> Array:
    """Solve window by window, each from the end of the one before."""
    length = len(b)
    before, inputs = problem.before(states), problem.inputs
    zero = jnp.zeros_like(b[0])
    if window >= length:
        return part(before, inputs, b, zero)[1]
    count = -(-length // window)
    padding = count * window - length

    def cut(x: Array) -> Array:
        # Repeated inputs are ones that f is defined for; their results are dropped. What stands
        # before a reversed run must not reach it.
        fill = jnp.repeat(x[-1:], padding, axis=0)
        return jnp.concatenate((x, fill)).reshape((count, window, *x.shape[1:]))

    rows = jnp.concatenate((b, jnp.zeros((padding, b.shape[1]), b.dtype)))
    rows = rows.reshape((count, window, -1))

    def advance(carry: Array, row: tuple) -> tuple[Array, Array]:
        return part(*row, carry)

    xs = (cut(before), jax.tree.map(cut, inputs), rows)
    _, out = jax.lax.scan(advance, zero, xs, reverse=reverse)
    return out.reshape((count * window, -1))[:length]


@dataclass(frozen=True)
class MatrixFree:
    """Derivatives of the implicit function theorem from products with Jacobians alone.

    The linear equation is solved by the quasi-Newton iteration that found the trajectory: memory
    O(T D) with a diagonal Jacobian. If it does not converge, the derivative is NaN.

    Args:
        tolerance: largest residual, relative to the right-hand side; by default ten units of
            rounding.
        max_iters: most iterations.
    """

    tolerance: float | None = None
    max_iters: int = 1000

    def tangent(
        self,
        problem: Problem,
        states: Array,
        structure: Structure,
        window: int,
        backend: Backend | None,
    ) -> Solve:
        """Iterate on the linearized recurrence; see `Gradient`."""
        _, jacobian = structure.linearize(problem.step, problem.before(states), problem.inputs)

        def correct(b: Array) -> Array:
            return structure.scan(jacobian, b, jnp.zeros_like(b[0]), backend=backend)

        return partial(self._iterate, residual_map(problem, states), correct)

    def adjoint(
        self,
        problem: Problem,
        states: Array,
        structure: Structure,
        window: int,
        backend: Backend | None,
    ) -> Solve:
        """Iterate on the adjoint equation; see `Gradient`."""
        _, jacobian = structure.linearize(problem.step, problem.before(states), problem.inputs)
        later = structure.transpose(jax.tree.map(shift_back, jacobian))
        forward = residual_map(problem, states)

        def correct(b: Array) -> Array:
            zero = jnp.zeros_like(b[0])
            return structure.scan(later, b, zero, reverse=True, backend=backend)

        def backward(g: Array) -> Array:
            return jax.linear_transpose(forward, g)(g)[0]

        return partial(self._iterate, backward, correct)

    def _iterate(self, apply: Solve, correct: Solve, b: Array) -> Array:
        """Solve `apply(e) = b`, `correct` being an approximate solution."""
        eps = jnp.finfo(b.dtype).eps
        tolerance = 10 * eps if self.tolerance is None else self.tolerance
        scale = jnp.max(jnp.abs(b))

        def step(point: tuple[Array, Array]) -> tuple[tuple[Array, Array], Progress]:
            e, rest = point
            e = e + correct(rest)
            rest = b - apply(e)
            size = jnp.max(jnp.abs(rest))
            no = jnp.asarray(False)
            progress = Progress(
                finite=jnp.all(jnp.isfinite(rest)),
                step=size,
                change=jnp.zeros_like(size),
                settled=no,
                stalled=no,
                record=size,
            )
            return (e, rest), progress

        bound = tolerance * scale
        (e, _), outcome = iterate(
            step,
            (jnp.zeros_like(b), b),
            max_iters=self.max_iters,
            tolerance=Tolerance(bound, bound),
        )
        return jnp.where(outcome.status == int(Status.CONVERGED), e, jnp.nan)


@dataclass(frozen=True)
class Unrolled:
    """Derivatives of the iterations themselves: those of the truncated model.

    The number of iterations is `max_iters`; memory grows with it. A model that is meant to take
    just that many sweeps has these derivatives, converged or not.
    """
