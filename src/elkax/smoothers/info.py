"""What an iterated smoother says about how it ended."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from elkax.smoothers.descent import Record
from elkax.smoothers.iteration import Status

ADVICE = {
    Status.CONVERGED: "",
    Status.MAX_ITERS: "the steps are still long; raise max_iters, or give another start",
    Status.NONFINITE: "f, h, the log-density or the linearized posterior is not finite where it "
    "starts or at any step from there; give another start, functions that are finite there, or "
    "more digits (float64)",
    Status.STALLED: "steps are not short, yet none lowers the cost by more than rounding, or, with "
    "sigma points, gets any shorter: a kink of f or h, or too few digits (float64 has more); "
    "trajectory and posterior are those of the lowest cost reached",
    Status.SADDLE: "the exact Hessian of the cost is not positive definite; give another start",
}


class Starts(NamedTuple):
    """How the iteration ended from each of several starts, leading axis the starts.

    Attributes:
        status: as `Info`.
        iterations: as `Info`.
        cost: as `Info`.
    """

    status: Array
    iterations: Array
    cost: Array


class Info(NamedTuple):
    r"""How an iterated smoother ended, readable under `jit`; `print` says it in a sentence.

    Attributes:
        status: a `Status` as an integer: 0 converged, 1 max_iters, 2 nonfinite, 3 stalled, and 5
            saddle from `Solution.check` alone.
        iterations: number of iterations.
        cost: MAP cost of `trajectory`, less the normalising constants of its Gaussian terms; for
            linearizers that use a covariance, that of the expected functions with it held fixed.
        damping: as `Record`, of the last iteration.
        step: as `Record`, of the last iteration.
        constraint_residual: sum of $|z_t - f(z_{t-1})|$ and $|y_t - h(z_t)|$ in the directions
            that have no noise; zero if every covariance is regular.
        history: a `Record` with leading axis `max_iters`, NaN after the last; None if not kept.
        excess: $(2J - n)/\sqrt{2n}$ with n entries observed: twice the least cost of a linear
            Gaussian model is $\chi^2_n$, so that more than 3 or 5 says that the minimum is a poor
            one, or the model; None if emissions have a distribution.
        starts: how it ended from each of the `starts`; None if there were none.
    """

    status: Array
    iterations: Array
    cost: Array
    damping: Array
    step: Array
    constraint_residual: Array
    history: Record | None = None
    excess: Array | None = None
    starts: Starts | None = None

    @property
    def converged(self) -> Array:
        """Whether the iteration converged, for each sequence of a batch."""
        return self.status == int(Status.CONVERGED)

    def __str__(self) -> str:
        """Say how the iteration ended and what to try; of a batch, how many ended how."""
        if isinstance(self.status, jax.core.Tracer):
            return repr(self)
        status = np.asarray(self.status)
        if status.ndim:
            counts = [(Status(code), np.sum(status == code)) for code in np.unique(status)]
            return "; ".join(
                f"{count} of {status.size} {_with_advice(word)}" for word, count in counts
            )
        text = (
            f"{_with_advice(Status(int(status)))} (iterations: {int(self.iterations)}, "
            f"MAP cost: {float(self.cost):.6g}, last step: {float(self.step):.2g} posterior "
            "standard deviations"
        )
        if self.excess is not None:
            text += f", cost {float(self.excess):.2g} standard deviations above its expectation"
        return text + ")"


def _with_advice(status: Status) -> str:
    advice = ADVICE[status]
    return f"{status}: {advice}" if advice else str(status)
