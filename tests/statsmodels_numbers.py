"""elkax's numbers for a model of statsmodels, in statsmodels' order, names and conventions.

Index t of statsmodels' transition belongs to the step out of the state at t, of elkax's to the step
into it. Time leads here; statsmodels has it last.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from scipy.linalg import solve_triangular

import elkax
from problems import make_params

MATRICES = (
    "design",
    "obs_intercept",
    "obs_cov",
    "transition",
    "state_intercept",
    "selection",
    "state_cov",
)


class NotRepresentable(Exception):
    """A model that elkax does not have; the message says why."""


@dataclass
class Model:
    """One model for elkax, and the same matrices for what statsmodels stores beyond its posterior.

    Attributes:
        params: dynamax parameters.
        emissions: (T, N), NaN where missing.
        initial: `ExactDiffuse` or None.
        transition, intercept, noise: of the steps out of every state, each (T, ...).
        selection: (T, D, r).
        state_cov: (T, r, r).
        obs_cov: (T, N, N).
        filtered_timing: whether statsmodels' start is the state before the first step.
    """

    params: Any
    emissions: np.ndarray
    initial: Any
    transition: np.ndarray
    intercept: np.ndarray
    noise: np.ndarray
    selection: np.ndarray
    state_cov: np.ndarray
    obs_cov: np.ndarray
    filtered_timing: bool

    def call(self, function, **options):
        """Run a function of elkax; numbers come back as NumPy's.

        Raises:
            NotRepresentable: if elkax says that there is no such model.
        """
        try:
            found = function(self.params, self.emissions, initial=self.initial, **options)
        except ValueError as error:
            reason = re.sub(r"[-+]?\d[\d.e+-]*", "#", str(error))
            raise NotRepresentable(f"elkax says: {reason[:100]}") from error
        return jax.tree.map(np.asarray, found)


def translate(ssm, run, scale=1.0):
    """Read the model that a filter of statsmodels has just run on.

    Args:
        ssm: `KalmanFilter`.
        run: its Cython filter, after it ran.
        scale: what all covariances are multiplied by.

    Raises:
        NotRepresentable: if it is none of real numbers in double precision.
    """
    dtype = np.asarray(run.model.initial_state).dtype
    if dtype != np.float64:
        raise NotRepresentable(f"{dtype.name} numbers")
    given = [np.moveaxis(np.asarray(getattr(ssm, name)), -1, 0) for name in MATRICES]
    if any(np.iscomplexobj(array) for array in given):
        raise NotRepresentable("complex numbers")
    design, shift, obs_cov, transition, intercept, selection, state_cov = given
    emissions = np.array(ssm.endog, float).T
    length = len(emissions)
    obs_cov, state_cov = scale * _symmetric(obs_cov), scale * _symmetric(state_cov)
    noise = _symmetric(selection @ state_cov @ selection.swapaxes(1, 2))
    mean, cov, diffuse = (
        np.array(getattr(run.model, name))
        for name in ("initial_state", "initial_state_cov", "initial_diffuse_state_cov")
    )
    cov = scale * _symmetric(cov)
    mask = np.diag(diffuse) > 0
    if not np.array_equal(diffuse, np.diag(mask)):
        raise NotRepresentable("effects that are diffuse in directions of their own")
    filtered_timing = bool(run.filter_timing)
    if filtered_timing:
        mean = transition[0] @ mean + intercept[0]
        cov = _symmetric(transition[0] @ cov @ transition[0].T + noise[0])

    def into(array):
        """Entries of the steps into the states; one entry stands for all, if there is a step."""
        if len(array) == 1:
            return array if length == 1 else array[0]
        return array if filtered_timing else np.concatenate((array[:1], array[:-1]))

    def now(array):
        return array[0] if len(array) == 1 else array

    params = make_params(
        mean,
        cov,
        into(transition),
        into(noise),
        now(design),
        now(obs_cov),
        b=into(intercept),
        d=now(shift),
    )
    initial = elkax.ExactDiffuse(tuple(mask.tolist())) if mask.any() else None
    steps = (transition, intercept, noise, selection, state_cov, obs_cov)
    steps = (np.broadcast_to(array, (length, *array.shape[1:])) for array in steps)
    return Model(params, emissions, initial, *steps, filtered_timing)


def _symmetric(array):
    return (array + array.swapaxes(-1, -2)) / 2


def predicted(model, mean, cov):
    """Moments of all states given the data before them, T + 1 of them; NaN where undetermined."""
    first = model.params.initial
    diffuse = np.zeros(mean.shape[1:], bool)
    if model.initial is not None:
        diffuse[:] = model.initial.components
    start = np.where(diffuse, np.nan, first.mean), np.array(first.cov)
    start[1][diffuse] = start[1][:, diffuse] = np.nan
    F, c, Q = model.transition, model.intercept, model.noise
    if model.filtered_timing:
        F, c, Q = (np.concatenate((array[1:], array[-1:])) for array in (F, c, Q))
    hidden = np.isnan(mean)
    known = np.where(hidden, 0.0, mean)
    within = np.where(hidden[:, :, None] | hidden[:, None, :], 0.0, cov)
    later = np.einsum("tij,tj->ti", F, known) + c
    spread = F @ within @ F.swapaxes(1, 2) + Q
    unseen = ((F != 0) & hidden[:, None, :]).any(2)
    later[unseen] = np.nan
    spread[unseen[:, :, None] | unseen[:, None, :]] = np.nan
    if model.filtered_timing:  # of which statsmodels stores no last prediction
        later[-1] = spread[-1] = np.nan
    return np.concatenate((start[0][None], later)), np.concatenate((start[1][None], spread))


def unit_ldl(matrix):
    """Unit lower factor and pivots; what rounding leaves of a pivot is zero."""
    size = len(matrix)
    lower, pivots, rest = np.eye(size), np.zeros(size), np.array(matrix)
    for i in range(size):
        if rest[i, i] > 1e-13 * matrix[i, i]:
            pivots[i] = rest[i, i]
            lower[i + 1 :, i] = rest[i + 1 :, i] / pivots[i]
            rest[i + 1 :, i + 1 :] -= pivots[i] * np.outer(lower[i + 1 :, i], lower[i + 1 :, i])
    return lower, pivots


def solve_unit(lower, right):
    """Solve with a unit lower factor, in the order of the entries."""
    return solve_triangular(lower, right, lower=True, unit_diagonal=True, check_finite=False)


def log_densities(model, innovations, total, num_diffuse):
    """Logarithmic density of the observations at every time given those before (T,).

    While effects are diffuse, differences of the likelihood of the first 1, 2, ... times.
    """
    found = np.zeros(len(model.emissions))
    for t in range(num_diffuse, len(found)):
        seen = np.isfinite(innovations.standardized[t])
        _, pivots = unit_ldl(innovations.covariances[t][np.ix_(seen, seen)])
        white = innovations.standardized[t][seen]
        found[t] = -0.5 * (np.log(2 * np.pi * pivots).sum() + white @ white)
    prefix = np.zeros(num_diffuse + 1)
    for t in range(num_diffuse):
        if not np.isnan(model.emissions[: t + 1]).all():
            prefix[t + 1] = model.call(elkax.lgssm_marginal_log_prob, length=t + 1)
    found[:num_diffuse] = np.diff(prefix)
    if np.isfinite(total):
        # Rounding leaves eps times the ratio of the first to the last innovation variances.
        np.testing.assert_allclose(found.sum(), total, rtol=1e-6, atol=1e-6)
    return found


def one_entry_at_a_time(innovations, obs_cov, t):
    """Forecast, its error and variances (N, N) at t, each entry given those before it too.

    Statsmodels makes measurement errors uncorrelated by the unit factor of their covariance.
    """
    lower, pivots = unit_ldl(innovations.covariances[t])
    alone = unit_ldl(obs_cov[t])[0]
    error = solve_unit(lower, innovations.innovations[t])
    told = solve_unit(alone, innovations.innovations[t]) - error
    return solve_unit(alone, innovations.means[t]) + told, error, np.diag(pivots)


def lagged(model, posterior):
    """Cov[z_{t+1}, z_t | y] (T, D, D), the last given all data by a prediction."""
    mean = posterior.smoothed_means
    cross = posterior.smoothed_cross_covariances - mean[:-1, :, None] * mean[1:, None, :]
    last = model.transition[-1] @ posterior.smoothed_covariances[-1]
    return np.concatenate((cross.swapaxes(1, 2), last[None]))


def state_disturbances(model, disturbances):
    """Moments of the disturbances that the selection acts on, of the steps out of every state.

    Raises:
        NotRepresentable: if the selection does not tell them apart.
    """
    G = model.selection
    if (np.linalg.matrix_rank(G) < G.shape[2]).any():
        raise NotRepresentable("disturbances that the selection does not tell apart")
    back = np.linalg.pinv(G)[:-1]
    mean = np.einsum("tij,tj->ti", back, disturbances.dynamics_means[1:])
    cov = back @ disturbances.dynamics_covariances[1:] @ back.swapaxes(1, 2)
    return (
        np.concatenate((mean, np.zeros((1, G.shape[2])))),
        np.concatenate((cov, model.state_cov[-1:])),
    )
