"""Why EM went no further, in words."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jaxtyping import Array

from elkax.models.em_fit import Ending, Outcome, holds_one_value
from elkax.models.em_maximisation import trainable
from elkax.models.fitting import Fit, over_series

GROUPS = {
    "initial": ("initial covariance", "state"),
    "dynamics": ("dynamics covariance", "state"),
    "emissions": ("emission covariance", "channel"),
}
REMEDY = (
    "Give variance_floor= a variance that the measurements cannot be better than, leave out what "
    "carries no information, freeze the parameter, or, in float32, use float64 "
    "(jax.config.update('jax_enable_x64', True))."
)


def say_how_it_ended(fit: Fit, props: ParamsLGSSM, outcome: Outcome) -> None:
    """Warn if EM was stopped, and raise if it could not even begin.

    Raises:
        ValueError: if the log posterior is not finite at the start, or the data do not determine a
            state.
    """
    ending = Ending(int(outcome.ending))
    if ending == Ending.NONE:
        return
    taken = int(np.sum(np.isfinite(outcome.log_probs)))
    progress = outcome.progress
    if ending in (Ending.LOG_POSTERIOR, Ending.NOT_FINITE):
        states = _undetermined(fit, progress.params)
        if states:
            _end(
                taken <= 1,
                f"fit_em: the data do not determine {_list('state', states)}, which start"
                f"{'s' if len(states) == 1 else ''} exactly diffuse or without a finite prior: "
                "there are no expectations to learn from. Give a proper start, or leave the state "
                "out.",
            )
            return
    if taken == 0:
        raise ValueError(
            "fit_em: the log posterior is not finite at the parameters to start from. Start from "
            "finite parameters with positive definite covariances, in float64 if this is float32; "
            "an emission covariance that is singular needs states that explain the observations."
        )
    cause = "; ".join(_causes(fit, props, outcome, ending))
    _end(
        False,
        f"fit_em stopped at iteration {taken} of {len(outcome.log_probs)}: {cause}. What is "
        f"returned are the best parameters before that, log posterior "
        f"{float(progress.value):.6g}. {REMEDY}",
    )


def _end(failed: bool, message: str) -> None:
    if failed:
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)


def _causes(fit: Fit, props: ParamsLGSSM, outcome: Outcome, ending: Ending) -> list[str]:
    """Name what collapsed."""
    refused = outcome.progress.refused
    if ending == Ending.SINGULAR:
        return [_singular(np.asarray(refused.emissions.cov))]
    variances = _fallen(fit, props, outcome)
    if ending == Ending.VARIANCE:
        collapse = np.asarray(outcome.collapse)
        return [
            str(each)
            for each in variances
            if each.group == "emissions" and each.reached <= collapse[each.index]
        ]
    small = np.sqrt(np.finfo(fit.emissions.dtype).eps)
    collapsed = [str(each) for each in variances if each.reached <= small * each.start]
    if collapsed:
        return collapsed
    what = (
        "the log posterior is not finite at the next parameters"
        if ending == Ending.LOG_POSTERIOR
        else f"the next {_not_finite(refused, props)} are not finite"
    )
    if not variances:
        return [what]
    least = min(variances, key=lambda each: each.reached / each.start)
    return [f"{what}, and of the variances none fell further than this: {least}"]


class _Fall(NamedTuple):
    """A variance that is smaller than it was."""

    group: str
    index: int
    start: float
    reached: float
    note: str

    def __str__(self) -> str:
        """Say it."""
        cov, what = GROUPS[self.group]
        return (
            f"{cov}: variance of {what} {self.index}{self.note} fell from {self.start:.3g} to "
            f"{self.reached:.3g}"
        )


def _fallen(fit: Fit, props: ParamsLGSSM, outcome: Outcome) -> list[_Fall]:
    """List the variances that are smaller than at the start."""
    constant = np.asarray(holds_one_value(fit.emissions))
    falls = []
    for group, name in sorted(trainable(fit.params, props)):
        if name != "cov":
            continue
        start, last, now = (
            _variances(getattr(params, group).cov)
            for params in (fit.params, outcome.progress.best, outcome.progress.refused)
        )
        reached = np.where(np.isfinite(now), now, last)
        for i in np.flatnonzero((start > 0) & (reached < start)):
            note = ""
            if group == "emissions" and constant[i]:
                value = np.asarray(fit.emissions)[..., i]
                note = f" (it holds one value, {value[np.isfinite(value)][0] + 0.0:.6g})"
            falls.append(_Fall(group, int(i), float(start[i]), float(reached[i]), note))
    return falls


def _singular(cov: np.ndarray) -> str:
    scale = np.sqrt(np.diagonal(cov))
    values, vectors = np.linalg.eigh((cov / scale[:, None] / scale).astype(float))
    weights = vectors[:, 0]
    channels = np.flatnonzero(np.abs(weights) > 0.1 * np.max(np.abs(weights)))
    return (
        f"emission covariance: became singular, {_list('channel', channels)} determine each other "
        f"(smallest eigenvalue of the correlations {values[0]:.3g})"
    )


def _not_finite(params: ParamsLGSSM, props: ParamsLGSSM) -> str:
    names = [
        f"params.{group}.{name}"
        for group, name in sorted(trainable(params, props))
        if not np.all(np.isfinite(getattr(getattr(params, group), name)))
    ]
    return ", ".join(names)


def _undetermined(fit: Fit, params: ParamsLGSSM) -> list[int]:
    """Name the states that have no finite smoothed variance at some time."""
    smooth = jax.jit(
        lambda params, *batch: over_series(
            lambda y, u: fit.model.smoother(params, y, u).smoothed_covariances, *batch
        )
    )
    variances = np.diagonal(smooth(params, fit.emissions, fit.inputs), axis1=-2, axis2=-1)
    lost = ~np.all(np.isfinite(variances), axis=(0, 1))
    # Where nothing is finite, it is the model that fails and not the data, unless it is diffuse.
    return [int(i) for i in np.flatnonzero(lost)] if any(fit.diffuse) or not np.all(lost) else []


def _variances(cov: Array) -> np.ndarray:
    return np.asarray(cov if cov.ndim == 1 else jnp.diagonal(cov))


def _list(what: str, indices: list[int] | np.ndarray) -> str:
    names = ", ".join(str(int(i)) for i in indices)
    return f"{what}{'s' if len(indices) > 1 else ''} {names}"
