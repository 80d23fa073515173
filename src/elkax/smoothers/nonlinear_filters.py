"""Filters and smoothers of nonlinear models, linearized once, where the filter is."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import PosteriorGSSMFiltered, PosteriorGSSMSmoothed
from jaxtyping import ArrayLike, PyTree

from elkax.gaussian import Form
from elkax.linearize import Linearizer, Taylor
from elkax.linearize.emissions import Residual
from elkax.scan import Backend
from elkax.smoothers.linear import assemble_posterior
from elkax.smoothers.nonlinear import decode, filter_system, smooth_filtered
from elkax.smoothers.prepare import check_backend, check_count, find_form
from elkax.smoothers.system import (
    Data,
    NonlinearParams,
    System,
    check_linearizer,
    for_emissions,
    prepare_system,
)

FIELDS = ("filtered_means", "filtered_covariances", "predicted_means", "predicted_covariances")


@partial(jax.jit, static_argnames=("system", "linearizer", "form", "num_iter"))
def _filter(
    system: System, data: Data, *, linearizer: Linearizer, form: Form, num_iter: int
) -> PosteriorGSSMFiltered:
    filtered = filter_system(system, data, linearizer, form, num_iter)
    return PosteriorGSSMFiltered(
        jnp.sum(filtered.log_density),
        filtered.output.mean,
        decode(filtered.output.cov, form),
        filtered.predicted_mean,
        filtered.predicted_cov,
    )


@partial(jax.jit, static_argnames=("system", "linearizer", "form", "backend", "num_iter"))
def _smoother(
    system: System,
    data: Data,
    *,
    linearizer: Linearizer,
    form: Form,
    backend: Backend | None,
    num_iter: int,
) -> PosteriorGSSMSmoothed:
    filtered = filter_system(system, data, linearizer, form, num_iter)
    return assemble_posterior(
        jnp.sum(filtered.log_density),
        filtered.output.mean,
        decode(filtered.output.cov, form),
        smooth_filtered(filtered, form, backend),
    )


def gaussian_filter(
    params: NonlinearParams,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    *,
    linearizer: Linearizer = Taylor(),
    num_iter: int = 1,
    output_fields: Sequence[str] | None = FIELDS,
    residual: Residual | None = None,
    form: str = "covariance",
) -> PosteriorGSSMFiltered:
    r"""Filter a nonlinear model, linearizing where the filter is; sequential in time.

    The step f is linearized about the filtered moments and the emission about the predicted ones.

    Args:
        params: dynamax's `ParamsNLGSSM` or `ParamsGGSSM`, or `ParamsDistributionSSM`. Functions of
            (z), or of (z, u) if there are inputs; covariances may vary in time, R may be (N,).
        emissions: $y$ (T, N), NaN where missing; integers and bools are taken as numbers.
        inputs: $u$ (T, U), or a pytree of arrays with leading axis T; entry t enters the step into
            $z_t$ and the emission at t.
        linearizer: `Taylor()` or `SigmaPoints(rule)`.
        num_iter: linearizations of each emission. Later ones are about the moments that came of
            it, and every update starts from the prediction: a linear model is not changed by it.
        output_fields: which of the moments to return, all if None.
        residual: $(y, \hat y)$ to their difference, for emissions on a circle.
        form: "covariance" or "square_root".

    Returns:
        Log-likelihood (at the first linearization of each emission), filtered and predicted
        moments. As in dynamax the predicted ones at index t belong to t + 1; there are T of them,
        T - 1 if there are inputs or the dynamics covariance varies in time.

    Raises:
        ValueError: on shapes that do not fit, an unknown form or output field.
        TypeError: on functions of another signature.

    References:
        Särkkä & Svensson (2023), Bayesian Filtering and Smoothing, Ch. 7 to 9.
    """
    stored = find_form(form, float)
    check_count("num_iter", num_iter)
    wanted = FIELDS if output_fields is None else tuple(output_fields)
    unknown = set(wanted) - {*FIELDS, "marginal_loglik"}
    if unknown:
        raise ValueError(f"output_fields must be among {FIELDS}, got {sorted(unknown)}")
    system, data = prepare_system(params, emissions, inputs, residual=residual)
    check_linearizer(linearizer, data)
    stored = for_emissions(stored, system, data)
    posterior = _filter(system, data, linearizer=linearizer, form=stored, num_iter=num_iter)
    if data.inputs is not None or data.noise.ndim == 3:
        posterior = posterior._replace(
            predicted_means=posterior.predicted_means[:-1],
            predicted_covariances=posterior.predicted_covariances[:-1],
        )
    return posterior._replace(**{name: None for name in FIELDS if name not in wanted})


def gaussian_smoother(
    params: NonlinearParams,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    *,
    linearizer: Linearizer = Taylor(),
    num_iter: int = 1,
    residual: Residual | None = None,
    backend: Backend | None = None,
    form: str = "covariance",
) -> PosteriorGSSMSmoothed:
    r"""Smooth a nonlinear model, linearized once, where the filter was.

    The filter is sequential; the smoother of the linear-Gaussian model that it leaves runs in
    parallel over time. `iterated_smoother` linearizes where the smoother is.

    Args:
        params: as `gaussian_filter`.
        emissions: as `gaussian_filter`.
        inputs: as `gaussian_filter`.
        linearizer: as `gaussian_filter`.
        num_iter: as `gaussian_filter`.
        residual: as `gaussian_filter`.
        backend: how the smoother runs over time; chosen by `elkax.scan.choose` if None.
        form: "covariance" or "square_root".

    Returns:
        Log-likelihood, filtered and smoothed moments, and the second moments
        $E[z_tz_{t+1}^\top \mid y_{1:T}]$.

    Raises:
        ValueError: as `gaussian_filter`.
        TypeError: as `gaussian_filter`.
    """
    check_backend(backend)
    stored = find_form(form, float)
    check_count("num_iter", num_iter)
    system, data = prepare_system(params, emissions, inputs, residual=residual)
    check_linearizer(linearizer, data)
    stored = for_emissions(stored, system, data)
    return _smoother(
        system, data, linearizer=linearizer, form=stored, backend=backend, num_iter=num_iter
    )
