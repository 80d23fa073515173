r"""Evaluation of a recurrence, in parallel over time."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, PyTree

from elkax.linearize import Diagonal
from elkax.recurrences.audit import Audit, audit
from elkax.recurrences.blocks import coarsen, refine
from elkax.recurrences.choice import choose_for
from elkax.recurrences.in_sequence import evaluate_in_sequence, give_way
from elkax.recurrences.method import DEER, Method
from elkax.recurrences.newton import Options, advance, start_at
from elkax.recurrences.plan import Plan, make_plan
from elkax.recurrences.prepare import (
    Arguments,
    Cell,
    check_guess,
    clean,
    flat_step,
    flat_structure,
    prepare,
    steps_of,
)
from elkax.recurrences.problem import Problem, ravel_states
from elkax.recurrences.solution import RecurrenceInfo, RecurrenceSolution
from elkax.recurrences.tangent import Gradient, Unrolled, solve_linearized
from elkax.scan import Backend, Sequential
from elkax.smoothers.iteration import Status, Tolerance, iterate
from elkax.smoothers.prepare import check_backend

# Iterations of a method that gives the first guess.
ROUGH = 10


def evaluate_recurrence(
    cell: Cell,
    initial_state: PyTree,
    inputs: PyTree = None,
    *,
    num_timesteps: int | None = None,
    method: Method | Sequential | None = None,
    guess: PyTree | None = None,
    length: ArrayLike | None = None,
    reverse: bool = False,
    window: int | None = None,
    block: int = 1,
    max_iters: int | None = None,
    tolerance: ArrayLike | None = None,
    error_tolerance: float | None = None,
    gradient: Gradient | Unrolled | None = None,
    on_failure: str = "report",
    backend: Backend | None = None,
    history: bool = False,
) -> RecurrenceSolution:
    r"""Evaluate $s_t = f(s_{t-1}, x_t)$ for $t = 1, \dots, T$ in parallel.

    The trajectory is the root of $r_t(s) = f(s_{t-1}, x_t) - s_t$. Every iteration linearizes all
    steps along the last trajectory, keeps a part of their Jacobians, and solves for the change of
    the whole trajectory by a scan; see `Method`. After i undamped iterations at least i states are
    those of `jax.lax.scan`. What has converged is left alone: an iteration works on a window that
    starts after it.

    Args:
        cell: $f$, a pure function `(state, input) -> state`; states and inputs may be pytrees. Its
            attribute `jacobian_structure`, if it has one, is a structure that holds all of the
            Jacobian. What it closes over, or holds as a `jax.tree_util.Partial`, has derivatives.
        initial_state: $s_0$, not part of the output; arrays of one floating-point type.
        inputs: $x_{1:T}$, leading axis T; None for a cell that takes none.
        num_timesteps: T, where `inputs` has no array.
        method: `DEER()`, `QuasiDEER()`, `ELK()`, `QuasiELK()`, `Jacobi()`, `Picard()`, another
            `Method`, or `Sequential()`, one step after the other; chosen by `choose_method` if
            None.
        guess: first trajectory, like `states`; "zeros"; "inputs" for $f(0, x_t)$; another `Method`,
            for ten iterations of it; or None for $s_0$ at all times.
        length: number of steps that exist, the rest being padding, in which the state stays; all
            if None. May be traced, so that under `vmap` every sequence has its own.
        reverse: run from the last input to the first, $s_t = f(s_{t+1}, x_t)$.
        window: W, the number of steps that an iteration works on, starting after what has
            converged; memory O(W D^2). By default all, and without damping 48 once
            guesses had to be restarted.
        block: B, for one unknown in B steps: blocks of B steps are run one after the other inside,
            all blocks at once, and the method finds the states between them (Gauss-Seidel inside
            and Jacobi across with `Jacobi()`, multiple shooting with `DEER()`).
        max_iters: most iterations; by default the number of unknown states, at most 1000.
        tolerance: largest relative residual of a converged trajectory; see `RecurrenceInfo`. By
            default $\epsilon^{3/4}$ of the precision of the state.
        error_tolerance: largest error bound, relative to the states up to that time; by default
            $\epsilon^{1/3}$, or 100 times `tolerance` if that is more. Infinity for no bound.
        gradient: `Implicit()`, `MatrixFree()` or `Unrolled()`; by default the first, for D > 16 and
            a cell that does not state its structure the second.
        on_failure: "report", or "sequential" to evaluate step by step if the iteration does not
            converge (under `vmap`, all sequences if one does not).
        backend: how to run the linear problems; chosen by `elkax.scan.choose` if None.
        history: whether to keep residuals (T,) and damping of every iteration.

    Returns:
        Trajectory and `RecurrenceInfo`. States that are not finite in the sequential recurrence
        end the evaluation with the status nonfinite; from the first of them on all are NaN.
        Derivatives, of any order and in both modes, are those of the exact trajectory, whatever
        was kept of the Jacobian. An iteration costs D + 1 products of the Jacobian with a vector
        for full and diagonal structures, and O(T D^3) or O(T D) for the scan.

    Raises:
        TypeError: on states of no or several floating-point types, a cell that changes the type,
            and methods, gradients or backends that are none.
        ValueError: on T = 0, shapes that do not fit, a window longer than T.

    References:
        Gonzalez et al. (2024), arXiv:2407.19115; Lim et al. (2024), arXiv:2309.12252; Song et al.
        (2021), arXiv:2002.03629.
    """
    check_backend(backend)
    arguments = prepare(cell, initial_state, inputs, num_timesteps, length)
    if reverse:
        arguments = _turn_round(arguments)
    solution = _dispatch(
        arguments,
        method,
        guess,
        reverse,
        tolerance,
        error_tolerance,
        dict(
            window=window,
            block=block,
            max_iters=max_iters,
            gradient=gradient,
            on_failure=on_failure,
            backend=backend,
            history=history,
        ),
    )
    if not reverse:
        return solution
    info, kept = solution.info, solution.info.history
    if kept is not None and block == 1:
        kept = kept._replace(residual=jnp.flip(kept.residual, 1))
    return RecurrenceSolution(
        jax.tree.map(lambda leaf: jnp.flip(leaf, 0), solution.states),
        info._replace(error_bound=jnp.flip(info.error_bound), history=kept),
    )


def _turn_round(arguments: Arguments) -> Arguments:
    inputs = clean(arguments.inputs, arguments.valid)
    turned = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), (inputs, arguments.valid))
    return arguments._replace(inputs=turned[0], valid=turned[1])


def _dispatch(
    arguments: Arguments,
    method: Any,
    guess: Any,
    reverse: bool,
    tolerance: Any,
    error_tolerance: Any,
    options: dict,
) -> RecurrenceSolution:
    if method is None:
        method = choose_for(arguments).method
    check_guess(arguments, guess)
    if isinstance(method, Sequential):
        make_plan(arguments, DEER(), bounded=True, **options)
        return evaluate_in_sequence(arguments)
    if not isinstance(method, Method):
        raise TypeError(f"method must be an object such as elkax.DEER(), got {method!r}")
    dtype = jax.tree.leaves(arguments.initial)[0].dtype
    eps = float(jnp.finfo(dtype).eps)
    tolerance = jnp.asarray(eps**0.75 if tolerance is None else tolerance, dtype)
    limit = jnp.maximum(eps ** (1 / 3), 100 * tolerance)
    if error_tolerance is not None:
        limit = jnp.asarray(error_tolerance, dtype)
    plan = make_plan(arguments, method, bounded=error_tolerance != float("inf"), **options)
    start = _first_guess(arguments, guess, reverse, plan, dtype)
    return _evaluate(
        arguments.cell,
        arguments.initial,
        arguments.inputs,
        arguments.valid,
        start,
        tolerance,
        limit,
        plan=plan,
    )


def _first_guess(
    arguments: Arguments, guess: Any, reverse: bool, plan: Plan, dtype: Any
) -> Array | None:
    """Return a flat trajectory (T, D), None for the initial state at all times."""
    if guess is None:
        return None
    length = arguments.length
    flat, unravel = ravel_pytree(arguments.initial)
    if isinstance(guess, str):
        zeros = jnp.zeros((length, flat.shape[0]), dtype)
        if guess == "zeros":
            return zeros
        step = flat_step(arguments.cell, unravel)
        return jax.vmap(step)(zeros, steps_of(arguments.inputs, arguments.valid, length))
    if isinstance(guess, Method):
        coarse = replace(
            plan,
            method=guess,
            windows=plan.windows[-1:],
            max_iters=ROUGH,
            history=False,
            bounded=False,
            sequential_on_failure=False,
        )
        limit = jnp.asarray(jnp.sqrt(jnp.finfo(dtype).eps), dtype)
        rough = _evaluate(
            arguments.cell,
            arguments.initial,
            arguments.inputs,
            arguments.valid,
            None,
            limit,
            limit,
            plan=coarse,
        )
        start = ravel_states(rough.states)
        return jax.lax.stop_gradient(start)
    guess = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), guess)
    if reverse:
        guess = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), guess)
    return ravel_states(guess)


@partial(jax.jit, static_argnames=("plan",))
def _evaluate(
    cell: Cell,
    initial: PyTree,
    inputs: PyTree,
    valid: Array | None,
    guess: Array | None,
    tolerance: Array,
    error_tolerance: Array,
    *,
    plan: Plan,
) -> RecurrenceSolution:
    flat, unravel = ravel_pytree(initial)
    xs = steps_of(inputs, valid, plan.length)
    step = flat_step(cell, unravel)
    step, closed = jax.closure_convert(step, flat, jax.tree.map(lambda leaf: leaf[0], xs))

    def recurrence(closed: list, flat: Array, xs: PyTree) -> Problem:
        return Problem(lambda state, x: step(state, x, *closed), flat, xs)

    kept = flat_structure(plan.method.jacobian, unravel)
    if plan.block > 1 and isinstance(kept, Diagonal):
        # The derivative of one step is not that of a block.
        kept = replace(kept, derivative=None)
    method = replace(plan.method, jacobian=kept)
    plan = replace(plan, structure=flat_structure(plan.structure, unravel))
    moving = isinstance(plan.gradient, Unrolled)
    problem = recurrence(closed, flat, xs)
    still = problem if moving else recurrence(*jax.lax.stop_gradient((closed, flat, xs)))
    coarse = coarsen(still, plan.block)
    options = Options(
        plan.windows, tolerance, plan.max_iters, plan.backend, plan.history, not moving
    )
    if guess is not None:
        last = jnp.minimum(plan.block * (1 + jnp.arange(coarse.length)), plan.length) - 1
        guess = guess[last]
    start = start_at(coarse, method, guess, options)
    # A turn that finds all of its window converged takes no step.
    turns = plan.max_iters + 1 + (coarse.length - 1) // plan.windows[0]
    point, outcome = iterate(
        partial(advance, coarse, method, options),
        start if moving else jax.lax.stop_gradient(start),
        max_iters=turns,
        tolerance=Tolerance(0.0, 0.0),
        history=turns if plan.history else 0,
        unroll=turns if moving else None,
    )
    index = jnp.arange(coarse.length)
    ends = jnp.where((index < point.front)[:, None], point.states, point.held)
    states = refine(still, coarse, ends)
    fixed = jax.lax.stop_gradient((closed, flat, xs, states))
    found = audit(recurrence(*fixed[:3]), fixed[3], plan, tolerance)
    status = _judge(outcome.status, found, error_tolerance, plan.bounded)
    lost = (status == int(Status.NONFINITE)) & (jnp.arange(plan.length) >= found.prefix)
    states = jnp.where(lost[:, None], jnp.nan, states)
    if plan.sequential_on_failure:
        states, status, found = give_way(still, states, status, found)
    if not moving:
        states = _attach(recurrence, plan)(closed, flat, xs, jax.lax.stop_gradient(states))
    info = RecurrenceInfo(
        status=status,
        iterations=point.steps,
        sweeps=point.evaluations * plan.block / plan.length,
        prefix=found.prefix,
        residual=found.residual,
        error_bound=found.bound,
        resets=point.resets,
        damping=outcome.last.damping,
        history=outcome.history,
    )
    return RecurrenceSolution(jax.vmap(unravel)(states), jax.lax.stop_gradient(info))


def _judge(status: Array, found: Audit, error_tolerance: Array, bounded: bool) -> Array:
    """Call a trajectory ill-conditioned whose error bound is above tolerance."""
    if not bounded:
        return status
    wide = (status == int(Status.CONVERGED)) & ~(found.relative <= error_tolerance)
    return jnp.where(wide, int(Status.ILL_CONDITIONED), status)


def _attach(recurrence: Any, plan: Plan) -> Any:
    """Return the function that gives a trajectory the derivative of the recurrence."""

    @jax.custom_jvp
    def attach(closed: list, flat: Array, xs: PyTree, states: Array) -> Array:
        return states

    @attach.defjvp
    def rule(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        # Again by `attach`, so that second derivatives see the trajectory move.
        states = attach(*primals)

        def steps(closed: list, flat: Array, xs: PyTree) -> Array:
            return recurrence(closed, flat, xs).values(states)

        change = jax.jvp(steps, primals[:3], tangents[:3])[1]
        course = plan.course(recurrence(*primals[:3]), states)
        solve = solve_linearized(plan.gradient, course)
        return states, solve(change)

    return attach
