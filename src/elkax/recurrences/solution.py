"""What the evaluation of a recurrence returns."""

from typing import NamedTuple

from jaxtyping import Array, PyTree

from elkax.recurrences.point import Record


class RecurrenceInfo(NamedTuple):
    r"""How the evaluation of a recurrence ended, readable under `jit`.

    Attributes:
        status: a `Status` as an integer: 0 converged, 1 max_iters, 2 nonfinite, 3 stalled,
            4 ill_conditioned (the residual is within its tolerance, the error bound is not). States
            found one after the other are converged if they are finite.
        iterations: number of linear problems solved until the residuals were within tolerance, one
            scan each.
        corrections: number of Newton steps after them, by which residuals fell to rounding; they
            are taken unless a `tolerance` is named or there is no bound.
        sweeps: evaluations of the cell in the iterations, divided by T.
        prefix: number of states at the beginning that have converged.
        residual: largest entry of $|s_t - f(s_{t-1}, x_t)|$, relative to the largest entry of a
            state up to t.
        error_bound: (T,) first-order bound on the entries of the error of $s_t$, among them what
            another rounding of f, by its own size, would change. NaN where it was not asked for:
            with an infinite `error_tolerance`, and with none where the states were found one after
            the other. These are those of `jax.lax.scan`, which in chaos says nothing about their
            error.
        resets: how often guesses of the tail were restarted.
        damping: largest $\lambda$ of the last iteration.
        history: `Record` whose leading axis holds every evaluation of the trajectory, at first that
            of the guess, NaN after the last; None if not kept.
    """

    status: Array
    iterations: Array
    corrections: Array
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
