r"""Solutions of the linearized recurrence $e_t = J_te_{t-1} + b_t$, $e_0 = 0$, and of its adjoint.

J is the whole Jacobian, whatever the iteration that found the trajectory keeps of it: derivatives
and error bounds rest on these solutions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.linearize import Structure
from elkax.linearize.structure import Jacobian
from elkax.recurrences.problem import Problem, shift, shift_back
from elkax.scan import Backend
from elkax.smoothers.iteration import Progress, Status, Tolerance, iterate

Solve = Callable[[Array], Array]


class Course(NamedTuple):
    """A trajectory of a recurrence, and how linear problems about it are solved.

    Attributes:
        problem: the recurrence.
        states: the trajectory (T, D).
        structure: what holds its Jacobians, or approximates them.
        window: number of steps whose Jacobians are kept at once.
        backend: how to run over time.
    """

    problem: Problem
    states: Array
    structure: Structure
    window: int
    backend: Backend | None

    def scan(self, jacobian: Jacobian, b: Array, start: Array, *, reverse: bool = False) -> Array:
        """Solve an affine recurrence in what the structure keeps."""
        return self.structure.scan(jacobian, b, start, reverse=reverse, backend=self.backend)

    def jacobian(self) -> Jacobian:
        """Return what the structure keeps of all Jacobians."""
        before = self.problem.before(self.states)
        return self.structure.linearize(self.problem.step, before, self.problem.inputs)[1]


@runtime_checkable
class Gradient(Protocol):
    """How derivatives of a solution are found; hashable."""

    def tangent(self, course: Course) -> Solve:
        """Return the solution of the linearized recurrence as a function of b."""
        ...

    def adjoint(self, course: Course) -> Solve:
        r"""Return that of the adjoint equation, $g_t = J_{t+1}^\top g_{t+1} + b_t$."""
        ...


def residual_map(problem: Problem, states: Array) -> Solve:
    """Return the function $e_t - J_te_{t-1}$."""

    def apply(e: Array) -> Array:
        def step(before: Array) -> Array:
            return jax.vmap(problem.step)(before, problem.inputs)

        return e - jax.jvp(step, (problem.before(states),), (shift(e),))[1]

    return apply


def solve_linearized(gradient: Gradient, course: Course) -> Solve:
    """Return the solution of the linearized recurrence, differentiable to every order."""
    problem, states = course.problem, course.states
    fixed = jax.lax.stop_gradient((problem.initial, problem.inputs, states))

    def find(_: Solve, b: Array, which: str) -> Array:
        initial, inputs, at = fixed
        still = course._replace(problem=Problem(problem.step, initial, inputs), states=at)
        return getattr(gradient, which)(still)(b)

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

    def tangent(self, course: Course) -> Solve:
        """Solve by an affine scan; see `Gradient`."""

        def part(before: Array, inputs: PyTree, b: Array, carry: Array) -> tuple[Array, Array]:
            _, jacobian = course.structure.linearize(course.problem.step, before, inputs)
            e = course.scan(jacobian, b, carry)
            return e[-1], e

        return lambda b: _by_windows(course, part, b, reverse=False)

    def adjoint(self, course: Course) -> Solve:
        r"""Solve for $u_t = J_t^\top(b_t + u_{t+1})$; $g_t = b_t + u_{t+1}$."""

        def part(before: Array, inputs: PyTree, b: Array, carry: Array) -> tuple[Array, Array]:
            _, jacobian = course.structure.linearize(course.problem.step, before, inputs)
            back = course.structure.transpose(jacobian)
            u = course.scan(back, course.structure.times(back, b), carry, reverse=True)
            return u[0], b + jnp.concatenate((u[1:], carry[None]))

        return lambda b: _by_windows(course, part, b, reverse=True)


def _by_windows(course: Course, part: Callable, b: Array, *, reverse: bool) -> Array:
    """Solve window by window, each from the end of the one before."""
    length, window = len(b), course.window
    before, inputs = course.problem.before(course.states), course.problem.inputs
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

    def tangent(self, course: Course) -> Solve:
        """Iterate on the linearized recurrence; see `Gradient`."""
        jacobian = course.jacobian()

        def correct(b: Array) -> Array:
            return course.scan(jacobian, b, jnp.zeros_like(b[0]))

        return partial(self._iterate, residual_map(course.problem, course.states), correct)

    def adjoint(self, course: Course) -> Solve:
        """Iterate on the adjoint equation; see `Gradient`."""
        later = course.structure.transpose(jax.tree.map(shift_back, course.jacobian()))
        forward = residual_map(course.problem, course.states)

        def correct(b: Array) -> Array:
            return course.scan(later, b, jnp.zeros_like(b[0]), reverse=True)

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
