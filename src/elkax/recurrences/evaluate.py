r"""Evaluation of a recurrence, in parallel over time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, PyTree

from elkax.recurrences.choice import choose_for
from elkax.recurrences.guess import check_guess, first_guess
from elkax.recurrences.in_parallel import evaluate_in_parallel
from elkax.recurrences.in_sequence import evaluate_any_types, evaluate_in_sequence
from elkax.recurrences.method import DEER, Method
from elkax.recurrences.plan import make_plan
from elkax.recurrences.prepare import Arguments, Cell, prepare
from elkax.recurrences.solution import RecurrenceSolution
from elkax.recurrences.state_types import join, separate
from elkax.recurrences.tangent import Gradient, Unrolled
from elkax.scan import Backend, Sequential
from elkax.smoothers.prepare import check_backend


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
        initial_state: $s_0$, not part of the output; arrays of one floating-point type, and of any
            others (integers, flags, keys, complex numbers, another precision) whose update reads
            none of these: they are found first, by one scan. `Sequential()` takes all types.
        inputs: $x_{1:T}$, leading axis T; None for a cell that takes none.
        num_timesteps: T, where `inputs` has no array.
        method: `DEER()`, `QuasiDEER()`, `ELK()`, `QuasiELK()`, `Jacobi()`, `Picard()`, another
            `Method`, or `Sequential()`, one step after the other; chosen by `choose_method` if
            None.
        guess: first trajectory, like `states`; "zeros"; "inputs" for $f(0, x_t)$; another `Method`,
            for ten iterations of it; or None for $s_0$ at all times.
        length: number of steps that exist, the rest being padding, in which the state stays; all
            if None. May be traced, so that under `vmap` every sequence has its own, and may be 0
            then: the state stays.
        reverse: run from the last input to the first, $s_t = f(s_{t+1}, x_t)$.
        window: W, the number of steps that an iteration works on, starting after what has
            converged; memory O(W D^2), derivatives and error bound included. By default all, and
            without damping 48 once guesses had to be restarted; with `DEER()` on an accelerator
            both then, side by side, until one has arrived.
        block: B, for one unknown in B steps: blocks of B steps are run one after the other inside,
            all blocks at once, and the method finds the states between them (Gauss-Seidel inside
            and Jacobi across with `Jacobi()`, multiple shooting with `DEER()`).
        max_iters: most iterations; by default the number of unknown states, at most 1000.
        tolerance: largest relative residual of a converged trajectory; see `RecurrenceInfo`. By
            default $\epsilon^{3/4}$ of the precision of the state, from where further Newton steps
            are taken while each halves the residual (`info.corrections`).
        error_tolerance: largest error bound, relative to the states up to that time; by default
            $\epsilon^{1/3}$, in float32 1e-3, or 100 times `tolerance` if that is more. Infinity
            for no bound. What is found one step after the other has a bound only if a number is
            given: it takes all Jacobians, the evaluation none.
        gradient: `Implicit()`, `MatrixFree()` or `Unrolled()`; by default the first, for D > 16, a
            cell that does not state its structure and a method that keeps less the second.
        on_failure: "report", or "sequential" to evaluate step by step if the iteration does not
            converge, or the error bound is above tolerance (under `vmap`, all sequences if that
            is so for one).
        backend: how to run the linear problems; chosen by `elkax.scan.choose` if None.
        history: whether to keep residuals (T,) and damping of every iteration.

    Returns:
        Trajectory and `RecurrenceInfo`. States that are not finite in the sequential recurrence
        end the evaluation with the status nonfinite; from the first of them on all are NaN.
        Derivatives, of any order and in both modes, are those of the exact trajectory, whatever
        was kept of the Jacobian. An iteration costs D + 1 products of the Jacobian with a vector
        for full and diagonal structures, and O(T D^3) or O(T D) for the scan.

    Raises:
        TypeError: on states of several types whose updates read each other where the method is not
            `Sequential()`, a cell that changes the type, and methods, gradients or backends that
            are none.
        ValueError: on T = 0, shapes that do not fit, a window longer than T.

    References:
        Gonzalez et al. (2024), arXiv:2407.19115; Lim et al. (2024), arXiv:2309.12252; Song et al.
        (2021), arXiv:2002.03629.
    """
    check_backend(backend)
    arguments = prepare(cell, initial_state, inputs, num_timesteps, length)
    if reverse:
        arguments = arguments.turn_round()
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
    if not isinstance(method, Method | Sequential):
        raise TypeError(f"method must be an object such as elkax.DEER(), got {method!r}")
    bounded = error_tolerance != float("inf")
    if isinstance(method, Sequential):
        bounded = bounded and error_tolerance is not None
    if not arguments.has_one_type():
        unbounded = isinstance(method, Sequential) and not bounded
        separated = None if unbounded else separate(arguments)
        if separated is None:
            make_plan(arguments, DEER(), bounded=False, **options)
            return evaluate_any_types(arguments)
        if not (guess is None or isinstance(guess, Method | str)):
            guess = separated.take(guess)
        states, info = _dispatch(
            separated.arguments, method, guess, reverse, tolerance, error_tolerance, options
        )
        return RecurrenceSolution(join(separated, arguments.initial, states), info)
    dtype = jax.tree.leaves(arguments.initial)[0].dtype
    eps = float(jnp.finfo(dtype).eps)
    refined = tolerance is None
    tolerance = jnp.asarray(eps**0.75 if tolerance is None else tolerance, dtype)
    usual = eps ** (1 / 3)
    limit = jnp.maximum(usual if eps > 1e-4 else min(usual, 1e-3), 100 * tolerance)
    if error_tolerance is not None:
        limit = jnp.asarray(error_tolerance, dtype)
    if isinstance(method, Sequential):
        # The linear problems of the audit, where one is asked for, are those of Newton's method.
        plan = make_plan(arguments, DEER(), bounded=bounded, **options)
        return evaluate_in_sequence(arguments, tolerance, limit, plan=plan)
    plan = make_plan(arguments, method, bounded=bounded, refined=refined, **options)
    start = first_guess(arguments, guess, reverse, plan)
    return evaluate_in_parallel(arguments, start, tolerance, limit, plan=plan)
