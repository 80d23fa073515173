"""Draws from the posterior of a nonlinear model, linearized once or where an iteration ended."""

from functools import partial

import jax
from jaxtyping import Array, ArrayLike, PyTree

from elkax.gaussian import Form, Model
from elkax.linearize import Linearizer, Taylor
from elkax.linearize.emissions import Residual
from elkax.scan import Backend
from elkax.smoothers.iterated import Solution
from elkax.smoothers.linearization import linearize
from elkax.smoothers.nonlinear import filter_system
from elkax.smoothers.prepare import check_backend, check_count, find_form
from elkax.smoothers.sampling import Key, draw_posterior
from elkax.smoothers.system import (
    Data,
    NonlinearParams,
    System,
    check_linearizer,
    for_emissions,
    prepare_system,
)


@partial(jax.jit, static_argnames=("system", "linearizer", "form"))
def _along_filter(system: System, data: Data, *, linearizer: Linearizer, form: Form) -> Model:
    return filter_system(system, data, linearizer, form).linearized.model


@partial(jax.jit, static_argnames=("system", "linearizer"))
def _along_trajectory(
    system: System, data: Data, means: Array, covs: Array | None, *, linearizer: Linearizer
) -> Model:
    return linearize(system, data, linearizer, means, covs).model


def extended_kalman_posterior_sample(
    key: Key,
    params: NonlinearParams,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    *,
    linearizer: Linearizer = Taylor(),
    num_samples: int | None = None,
    residual: Residual | None = None,
    backend: Backend | None = None,
    form: str = "covariance",
) -> Array:
    """Draw states from the posterior of the model linearized where the filter was.

    Args:
        key: random key.
        params: as `gaussian_filter`.
        emissions: as `gaussian_filter`.
        inputs: as `gaussian_filter`.
        linearizer: as `gaussian_filter`.
        num_samples: how many draws; None for one without a leading axis.
        residual: as `gaussian_filter`.
        backend: as `gaussian_smoother`.
        form: as `gaussian_smoother`.

    Returns:
        (T, D), or (num_samples, T, D).

    Raises:
        ValueError: as `gaussian_filter`, or if num_samples < 1.
        TypeError: as `gaussian_filter`.
    """
    check_backend(backend)
    if num_samples is not None:
        check_count("num_samples", num_samples)
    stored = find_form(form, float)
    system, data = prepare_system(params, emissions, inputs, residual=residual)
    check_linearizer(linearizer, data)
    stored = for_emissions(stored, system, data)
    model = _along_filter(system, data, linearizer=linearizer, form=stored)
    return draw_posterior(key, model, num_samples=num_samples, form=stored, backend=backend)


def iterated_posterior_sample(
    key: Key,
    params: NonlinearParams,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    *,
    solution: Solution,
    linearizer: Linearizer = Taylor(),
    num_samples: int | None = None,
    residual: Residual | None = None,
    backend: Backend | None = None,
    form: str = "covariance",
) -> Array:
    """Draw states from the posterior of the model linearized where the iterated smoother ended.

    With `Taylor()` they are draws from the Gaussian whose moments `solution.posterior` holds. A
    linearizer that uses covariances is given those of `solution.posterior`, so that the Gaussian is
    the one of the next iteration, the same at convergence.

    Args:
        key: random key.
        params: as given to `iterated_smoother`.
        emissions: as given to `iterated_smoother`.
        inputs: as given to `iterated_smoother`.
        solution: what `iterated_smoother` gave; see its `info` for whether it converged.
        linearizer: as given to `iterated_smoother`.
        num_samples: how many draws; None for one without a leading axis.
        residual: as given to `iterated_smoother`.
        backend: how to run over time; chosen by `elkax.scan.choose` if None.
        form: "covariance" or "square_root".

    Returns:
        (T, D), or (num_samples, T, D).

    Raises:
        ValueError: as `iterated_smoother`, or if num_samples < 1.
        TypeError: as `iterated_smoother`.
    """
    check_backend(backend)
    if num_samples is not None:
        check_count("num_samples", num_samples)
    stored = find_form(form, float)
    system, data = prepare_system(params, emissions, inputs, residual=residual)
    check_linearizer(linearizer, data)
    stored = for_emissions(stored, system, data)
    covs = solution.posterior.smoothed_covariances if linearizer.uses_covariance else None
    model = _along_trajectory(system, data, solution.trajectory, covs, linearizer=linearizer)
    return draw_posterior(key, model, num_samples=num_samples, form=stored, backend=backend)
