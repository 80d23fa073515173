r"""Evaluation of a recurrence, in parallel over time."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, PyTree

from elkax.linearize import Full, Structure
from elkax.recurrences.audit import Audit, audit
from elkax.recurrences.choice import choose_for
from elkax.recurrences.method import Method
from elkax.recurrences.newton import Options, Record, advance, start_at
from elkax.recurrences.prepare import (
    Arguments,
    Cell,
    clean,
    declared_structure,
    flat_step,
    prepare,
    steps_of,
)
from elkax.recurrences.problem import Problem
from elkax.recurrences.tangent import Gradient, Implicit, MatrixFree, Unrolled, solve_linearized
from elkax.scan import Backend, Sequential
from elkax.scan.fallback import where_sound
from elkax.smoothers.iteration import Status, Tolerance, iterate
from elkax.smoothers.prepare import check_backend, check_count

# Up to this dimension whole Jacobians are kept for derivatives and error bounds.
SMALL = 16
# Size of the windows after a restart, where none is named.
WINDOW = 48
# Iterations of a method that gives the first guess.
ROUGH = 10


class RecurrenceInfo(NamedTuple):
    r"""How the evaluation of a recurrence ended, readable under `jit`.

    Attributes:
        status: a `Status` as an integer: 0 converged, 1 max_iters, 2 nonfinite, 3 stalled,
            4 ill_conditioned (the residual is within its tolerance, the error bound is not).
        iterations: number of linear problems solved, one scan each.
        sweeps: evaluations of the cell, divided by T.
        prefix: number of states at the beginning that have converged.
        residual: largest entry of $|s_t - f(s_{t-1}, x_t)|$, relative to the largest entry of a
            state up to t.
        error_bound: (T,) first-order bound on the entries of the error of $s_t$, among them what
            another rounding of f would change; NaN where it was not asked for.
        resets: how often guesses of the tail were restarted.
        damping: largest $\lambda$ of the last iteration.
        history: `Record` with leading axis `max_iters + 1`, NaN after the last; None if not kept.
    """

    status: Array
    iterations: Array
    sweeps: Array
    prefix: Array
    residual: Array
    error_bound: Array
    resets: Array
    damping: Array
    history: Record | None


class RecurrenceSolution(NamedTuple):
    """A trajectory, and how its evaluation ended.

    Attributes:
        states: $s_{1:T}$, the pytree of the state with leading axis T.
        info: how the evaluation ended.
    """

    states: PyTree
    info: RecurrenceInfo


@dataclass(frozen=True)
class Plan:
    """How a recurrence is evaluated; hashable."""

    length: int
    method: Method
    gradient: Gradient | Unrolled
    structure: Structure
    windows: tuple[int, ...]
    backend: Backend | None
    max_iters: int
    history: bool
    bounded: bool
    sequential_on_failure: bool


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
            converged; memory O(W D^2). By default all, and 48 once guesses had to be restarted.
        max_iters: most iterations; by default T, at most 1000.
        tolerance: largest relative residual of a converged trajectory; see `RecurrenceInfo`. By
            default $\epsilon^{3/4}$ of the precision of the state.
        error_tolerance: largest error bound, relative to the states up to that time; by default
            $\epsilon^{1/3}$. Infinity for no bound.
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
            max_iters=max_iters,
            gradient=gradient,
            on_failure=on_failure,
            backend=backend,
            history=history,
        ),
    )
    if not reverse:
        return solution
    bound = jnp.flip(solution.info.error_bound)
    return RecurrenceSolution(
        jax.tree.map(lambda leaf: jnp.flip(leaf, 0), solution.states),
        solution.info._replace(error_bound=bound),
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
    if isinstance(method, Sequential):
        return _one_after_another(arguments)
    if not isinstance(method, Method):
        raise TypeError(f"method must be an object such as elkax.DEER(), got {method!r}")
    dtype = jax.tree.leaves(arguments.initial)[0].dtype
    eps = float(jnp.finfo(dtype).eps)
    limit = eps ** (1 / 3) if error_tolerance is None else error_tolerance
    plan = _plan(arguments, method, bounded=limit != float("inf"), **options)
    start = _first_guess(arguments, guess, reverse, plan, dtype)
    return _evaluate(
        arguments.cell,
        arguments.initial,
        arguments.inputs,
        arguments.valid,
        start,
        jnp.asarray(eps**0.75 if tolerance is None else tolerance, dtype),
        jnp.asarray(limit, dtype),
        plan=plan,
    )


def _plan(
    arguments: Arguments,
    method: Method,
    *,
    window: int | None,
    max_iters: int | None,
    gradient: Any,
    on_failure: str,
    backend: Backend | None,
    history: bool,
    bounded: bool,
) -> Plan:
    length = arguments.length
    size = sum(leaf.size for leaf in jax.tree.leaves(arguments.initial))
    declared = declared_structure(arguments.cell)
    if gradient is None:
        gradient = Implicit() if declared is not None or size <= SMALL else MatrixFree()
    if isinstance(gradient, type) or not isinstance(gradient, Gradient | Unrolled):
        raise TypeError(f"gradient must be an object such as elkax.Implicit(), got {gradient!r}")
    if window is not None:
        check_count("window", window)
        if window > length:
            raise ValueError(f"window must be at most T = {length}, got {window}")
    if max_iters is None:
        max_iters = min(length, 1000)
    elif max_iters != 0:
        check_count("max_iters", max_iters)
    if on_failure not in ("report", "sequential"):
        raise ValueError(f'on_failure must be "report" or "sequential", got {on_failure!r}')
    whole = window or length
    refuses = method.damping is not None and method.damping.refuses
    if refuses and whole < length:
        raise ValueError(
            f"{method.damping} judges steps by the residuals of all states, so that a window is "
            f"none of its own, got window = {window}"
        )
    small = window is None and not refuses and length > 2 * WINDOW
    exact = Full() if declared is None else declared
    if declared is not None and isinstance(method.jacobian, Full):
        method = Method(declared, method.damping, method.form)
    return Plan(
        length,
        method,
        gradient,
        exact if isinstance(gradient, Implicit) else method.jacobian,
        (WINDOW, length) if small else (whole,),
        backend,
        max_iters,
        history,
        bounded,
        on_failure == "sequential",
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
        if guess != "inputs":
            raise ValueError(
                f'guess must be None, "zeros", "inputs", a trajectory or a method, got {guess!r}'
            )
        step = flat_step(arguments.cell, unravel)
        return jax.vmap(step)(zeros, steps_of(arguments.inputs, arguments.valid, length))
    if isinstance(guess, Method):
        coarse = replace(
            plan,
            method=guess,
            windows=(length,),
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
        start = _ravel_states(rough.states)
        return jax.lax.stop_gradient(start)
    if jax.tree.structure(guess) != jax.tree.structure(arguments.initial):
        raise ValueError(
            f"guess must be a trajectory like the state, {jax.tree.structure(arguments.initial)}, "
            f"got {jax.tree.structure(guess)}"
        )
    for leaf, one in zip(jax.tree.leaves(guess), jax.tree.leaves(arguments.initial), strict=True):
        if jnp.shape(leaf) != (length, *one.shape):
            raise ValueError(f"guess must have shape {(length, *one.shape)}, got {jnp.shape(leaf)}")
    guess = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), guess)
    if reverse:
        guess = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), guess)
    return _ravel_states(guess)


def _ravel_states(states: PyTree) -> Array:
    return jax.vmap(lambda state: ravel_pytree(state)[0])(states)


def _one_after_another(arguments: Arguments) -> RecurrenceSolution:
    flat, unravel = ravel_pytree(arguments.initial)
    xs = steps_of(arguments.inputs, arguments.valid, arguments.length)
    step = flat_step(arguments.cell, unravel)
    states = jax.lax.scan(lambda s, x: (step(s, x),) * 2, flat, xs)[1]
    finite = jnp.all(jnp.isfinite(states), axis=1)
    prefix = jnp.sum(jnp.cumprod(finite.astype(int)))
    status = jnp.where(jnp.all(finite), int(Status.CONVERGED), int(Status.NONFINITE))
    zero, none = jnp.zeros((), flat.dtype), jnp.asarray(0)
    info = RecurrenceInfo(
        status,
        none,
        jnp.ones_like(zero),
        prefix,
        zero,
        jnp.full(len(states), jnp.nan, flat.dtype),
        none,
        zero,
        None,
    )
    return RecurrenceSolution(jax.vmap(unravel)(states), jax.lax.stop_gradient(info))


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

    options = Options(plan.windows, tolerance, plan.max_iters, plan.backend, plan.history)
    moving = isinstance(plan.gradient, Unrolled)
    problem = recurrence(closed, flat, xs)
    still = problem if moving else recurrence(*jax.lax.stop_gradient((closed, flat, xs)))
    start = start_at(still, plan.method, guess, options)
    point, outcome = iterate(
        partial(advance, still, plan.method, options),
        start if moving else jax.lax.stop_gradient(start),
        max_iters=plan.max_iters + 1,
        tolerance=Tolerance(0.0, 0.0),
        history=plan.max_iters + 1 if plan.history else 0,
        unroll=plan.max_iters + 1 if moving else None,
    )
    index = jnp.arange(problem.length)
    states = jnp.where((index < point.front)[:, None], point.states, point.held)
    fixed = jax.lax.stop_gradient((closed, flat, xs, states))
    found = audit(recurrence(*fixed[:3]), fixed[3], plan, tolerance)
    status = _judge(outcome.status, found, error_tolerance, plan.bounded)
    lost = (status == int(Status.NONFINITE)) & (index >= found.prefix)
    states = jnp.where(lost[:, None], jnp.nan, states)
    if plan.sequential_on_failure:
        states, status = _give_way(still, states, status)
    if not moving:
        states = _attach(recurrence, plan)(closed, flat, xs, jax.lax.stop_gradient(states))
    info = RecurrenceInfo(
        status=status,
        iterations=point.steps,
        sweeps=point.evaluations / problem.length,
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


def _give_way(problem: Problem, states: Array, status: Array) -> tuple[Array, Array]:
    """Evaluate step by step unless the iteration has converged."""
    good = (status == int(Status.CONVERGED)) | (status == int(Status.NONFINITE))

    def sequential() -> tuple[Array, Array]:
        def step(state: Array, x: PyTree) -> tuple[Array, Array]:
            state = problem.step(state, x)
            return state, state

        states = jax.lax.scan(step, problem.initial, problem.inputs)[1]
        finite = jnp.all(jnp.isfinite(states))
        return states, jnp.where(finite, int(Status.CONVERGED), int(Status.NONFINITE))

    return where_sound(good, lambda: (states, status), sequential)


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
            problem = recurrence(closed, flat, xs)
            return jax.vmap(problem.step)(problem.before(states), problem.inputs)

        change = jax.jvp(steps, primals[:3], tangents[:3])[1]
        solve = solve_linearized(
            plan.gradient,
            recurrence(*primals[:3]),
            states,
            plan.structure,
            plan.windows[0],
            plan.backend,
        )
        return states, solve(change)

    return attach
