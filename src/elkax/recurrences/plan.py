"""How a recurrence is evaluated, from the options of a call."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jaxtyping import Array, PyTree

from elkax.linearize import Dampable, Full, Structure, Zero
from elkax.recurrences.method import Method
from elkax.recurrences.prepare import Arguments, declared_structure, flat_structure
from elkax.recurrences.problem import Problem
from elkax.recurrences.tangent import Course, Gradient, Implicit, MatrixFree, Unrolled
from elkax.scan import Backend
from elkax.smoothers.prepare import check_count

# Up to this dimension whole Jacobians are kept for derivatives and error bounds.
SMALL = 16
# Size of the windows after a restart, where none is named.
WINDOW = 48


@dataclass(frozen=True)
class Plan:
    """How a recurrence is evaluated; hashable."""

    method: Method
    gradient: Gradient | Unrolled
    exact: Structure
    kept: Structure
    window: int | None
    windows: tuple[int, ...]
    beside: bool
    block: int
    backend: Backend | None
    max_iters: int
    history: bool
    bounded: bool
    refined: bool
    sequential_on_failure: bool

    def course(self, problem: Problem, states: Array) -> Course:
        """Return how linear problems about a trajectory are solved."""
        return Course(problem, states, self.exact, self.kept, self.window, self.backend)

    def on_flat_states(self, unravel: Callable[[Array], PyTree]) -> "Plan":
        """Return the plan for states that have been made flat."""
        exact, kept = (flat_structure(each, unravel) for each in (self.exact, self.kept))
        return replace(self, exact=exact, kept=kept)


def make_plan(
    arguments: Arguments,
    method: Method,
    *,
    window: int | None,
    block: int,
    max_iters: int | None,
    gradient: Any,
    on_failure: str,
    backend: Backend | None,
    history: bool,
    bounded: bool,
    refined: bool = False,
) -> Plan:
    """Turn the options of `evaluate_recurrence` into a plan, and reject what cannot be.

    Raises:
        TypeError: on a gradient that is none.
        ValueError: on counts and options that cannot be.
    """
    length = arguments.length
    size = sum(leaf.size for leaf in jax.tree.leaves(arguments.initial))
    declared = declared_structure(arguments.cell)
    if gradient is None:
        # Newton's method itself keeps whole Jacobians.
        kept_anyway = declared is not None or size <= SMALL or isinstance(method.jacobian, Full)
        gradient = Implicit() if kept_anyway else MatrixFree()
    if isinstance(gradient, type) or not isinstance(gradient, Gradient | Unrolled):
        raise TypeError(f"gradient must be an object such as elkax.Implicit(), got {gradient!r}")
    if window is not None:
        check_count("window", window)
        if window > length:
            raise ValueError(f"window must be at most T = {length}, got {window}")
    check_count("block", block)
    unknown = -(-length // block)
    if max_iters is None:
        max_iters = min(unknown, 1000)
    elif max_iters != 0:
        check_count("max_iters", max_iters)
    if on_failure not in ("report", "sequential"):
        raise ValueError(f'on_failure must be "report" or "sequential", got {on_failure!r}')
    whole = unknown if window is None else -(-window // block)
    refuses = method.damping is not None and method.damping.refuses
    if refuses and whole < unknown:
        raise ValueError(
            f"{method.damping} judges steps by the residuals of all states, so it takes no window, "
            f"got window = {window}"
        )
    truncated = isinstance(gradient, Unrolled)
    undamped = method.damping is None
    shortens = window is None and undamped and not truncated and unknown > 2 * WINDOW
    exact = Full() if declared is None else declared
    if declared is not None and isinstance(method.jacobian, Full):
        method = Method(declared, method.damping, method.form)
    # Where no Jacobian is kept, the linear equation is solved by sweeps, at most T of them.
    kept = method.jacobian if isinstance(method.jacobian, Dampable) else Zero()
    return Plan(
        method=method,
        gradient=gradient,
        exact=exact,
        kept=kept,
        window=None if window is None else whole * block,
        windows=(WINDOW, unknown) if shortens else (whole,),
        beside=shortens and method.jacobian == exact and jax.default_backend() != "cpu",
        block=block,
        backend=backend,
        max_iters=max_iters,
        history=history,
        bounded=bounded,
        refined=refined,
        sequential_on_failure=on_failure == "sequential",
    )
