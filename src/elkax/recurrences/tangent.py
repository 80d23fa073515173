r"""Solutions of the linearized recurrence $e_t = J_te_{t-1} + b_t$, $e_0 = 0$, and of its adjoint.

J is the whole Jacobian, whatever the iteration that found the trajectory keeps of it: derivatives
and error bounds rest on these solutions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.linearize import Structure
from elkax.recurrences.problem import Problem, shift, shift_back, sizes
from elkax.scan import Associative, Backend, Sequential, choose
from elkax.scan.fallback import where_sound
from elkax.smoothers.iteration import Progress, Status, Tolerance, iterate

Solve = Callable[[Array], Array]
# So many entries of Jacobians are kept at once where memory is what a method saves.
LARGE = 2**25


class Course(NamedTuple):
    """A trajectory of a recurrence, and how linear problems about it are solved.

    Attributes:
        problem: the recurrence.
        states: the trajectory (T, D).
        exact: a structure that holds its Jacobians.
        kept: one that approximates them.
        window: number of steps whose Jacobians are kept at once; all if None.
        backend: how to run over time.
    """

    problem: Problem
    states: Array
    exact: Structure
    kept: Structure
    window: int | None
    backend: Backend | None

    def saving(self) -> "Course":
        """Return the same in windows that limit memory, unless a window is named."""
        length, size = self.states.shape
        most = max(1, LARGE // size**2)
        return self if self.window or most >= length else self._replace(window=most)

    def shallow(self) -> "Course":
        """Return the same with fewest steps one after the other, if these are not the fastest.

        Prefixes of many short blocks round more than others do.
        """
        length, size = self.states.shape
        if self.backend or isinstance(_usual_backend(length, size), Sequential):
            return self
        return self._replace(backend=Associative(2 ** math.ceil(math.log2(length / 16))))


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

    One affine scan; memory O(W D^2) for windows of W steps, O(T D^2) without. Where products of
    Jacobians overflow and solutions do not, it is run one step after the other.
    """

    def tangent(self, course: Course) -> Solve:
        """Solve by an affine scan; see `Gradient`."""

        def part(before: Array, inputs: PyTree, b: Array, carry: Array) -> tuple[Array, Array]:
            _, jacobian = course.exact.linearize(course.problem.step, before, inputs)
            e = _scan(course, jacobian, b, carry, reverse=False)
            return e[-1], e

        return lambda b: _by_windows(course, part, b, reverse=False)

    def adjoint(self, course: Course) -> Solve:
        r"""Solve for $u_t = J_t^\top(b_t + u_{t+1})$; $g_t = b_t + u_{t+1}$."""

        def part(before: Array, inputs: PyTree, b: Array, carry: Array) -> tuple[Array, Array]:
            _, jacobian = course.exact.linearize(course.problem.step, before, inputs)
            back = course.exact.transpose(jacobian)
            u = _scan(course, back, course.exact.times(back, b), carry, reverse=True)
            return u[0], b + jnp.concatenate((u[1:], carry[None]))

        return lambda b: _by_windows(course, part, b, reverse=True)


def _scan(course: Course, jacobian: Any, b: Array, start: Array, *, reverse: bool) -> Array:
    """Solve an affine recurrence, in parallel unless a summary of a block overflows."""
    solve = partial(course.exact.scan, jacobian, b, start, reverse=reverse)
    found = solve(backend=course.backend)
    if isinstance(course.backend or _usual_backend(*b.shape), Sequential):
        return found
    finite = jnp.all(jnp.isfinite(found))
    return where_sound(finite, lambda: found, lambda: solve(backend=Sequential()))


def _usual_backend(length: int, size: int) -> Backend:
    return choose(num_timesteps=length, state_dim=size, recurrence="affine")


def _by_windows(course: Course, part: Callable, b: Array, *, reverse: bool) -> Array:
    """Solve window by window, each from the end of the one before."""
    length, window = len(b), course.window
    before, inputs = course.problem.before(course.states), course.problem.inputs
    zero = jnp.zeros_like(b[0])
    if window is None or window >= length:
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
    r"""Derivatives of the implicit function theorem from products with Jacobians alone.

    The linear equation is solved by the quasi-Newton iteration that found the trajectory: memory
    O(T D) with a diagonal Jacobian. It ends where the residual $b_t - e_t + J_te_{t-1}$ of every
    step is what rounding makes it, $c\epsilon(|b_t| + |e_t| + |J_t||e_{t-1}|)$: e is then exact for
    Jacobians and right-hand sides that are off by c roundings, as a solution step by step is. Where
    it does not get there, whole Jacobians are used (`Implicit`), in windows that limit memory.

    Args:
        tolerance: $c\epsilon$, by default of ten roundings.
        max_iters: most iterations; about as many as a whole Jacobian is worth.
    """

    tolerance: float | None = None
    max_iters: int = 100

    def tangent(self, course: Course) -> Solve:
        """Iterate on the linearized recurrence; see `Gradient`."""
        jacobian = _kept_jacobian(course)
        # What one iteration rounds the next corrects.
        backend = course.shallow().backend

        def correct(b: Array) -> Array:
            return course.kept.scan(jacobian, b, jnp.zeros_like(b[0]), backend=backend)

        apply = residual_map(course.problem, course.states)
        return partial(self._solve, apply, correct, shift, Implicit().tangent(course.saving()))

    def adjoint(self, course: Course) -> Solve:
        """Iterate on the adjoint equation; see `Gradient`."""
        later = course.kept.transpose(jax.tree.map(shift_back, _kept_jacobian(course)))
        forward = residual_map(course.problem, course.states)
        backend = course.shallow().backend

        def correct(b: Array) -> Array:
            zero = jnp.zeros_like(b[0])
            return course.kept.scan(later, b, zero, reverse=True, backend=backend)

        def backward(g: Array) -> Array:
            return jax.linear_transpose(forward, g)(g)[0]

        whole = Implicit().adjoint(course.saving())
        return partial(self._solve, backward, correct, shift_back, whole)

    def _solve(self, apply: Solve, correct: Solve, move: Solve, whole: Solve, b: Array) -> Array:
        """Solve `apply(e) = b`.

        Args:
            apply: $e_t - J_te_{t-1}$, or its transpose.
            correct: an approximate solution.
            move: brings $e_{t-1}$ to t.
            whole: the solution by whole Jacobians.
            b: the right-hand side.
        """
        eps = jnp.finfo(b.dtype).eps
        tolerance = 10 * eps if self.tolerance is None else self.tolerance
        # One product with random signs tells how large Jacobians are.
        signs = jax.random.rademacher(jax.random.key(1), b.shape, b.dtype)
        growth = sizes(signs - apply(signs))

        def step(point: tuple[Array, Array]) -> tuple[tuple[Array, Array], Progress]:
            e, rest = point
            e = e + correct(rest)
            rest = b - apply(e)
            size = sizes(rest)
            terms = sizes(b) + sizes(e) + growth * move(sizes(e))
            relative = jnp.max(jnp.where(size == 0, 0.0, size / (tolerance * terms)))
            no = jnp.asarray(False)
            progress = Progress(
                finite=jnp.all(jnp.isfinite(rest)),
                step=relative,
                change=jnp.zeros_like(relative),
                settled=no,
                stalled=no,
                record=relative,
            )
            return (e, rest), progress

        (e, _), outcome = iterate(
            step,
            (jnp.zeros_like(b), b),
            max_iters=self.max_iters,
            tolerance=Tolerance(1.0, 1.0),
        )
        arrived = outcome.status == int(Status.CONVERGED)
        return where_sound(arrived, lambda: e, lambda: whole(b))


def _kept_jacobian(course: Course) -> Any:
    before = course.problem.before(course.states)
    return course.kept.linearize(course.problem.step, before, course.problem.inputs)[1]


@dataclass(frozen=True)
class Unrolled:
    """Derivatives of the iterations themselves: those of the truncated model.

    The number of iterations is `max_iters`; memory grows with it. A model that is meant to take
    just that many sweeps has these derivatives, converged or not.
    """
