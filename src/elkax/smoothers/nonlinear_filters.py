"""Extended, sigma-point and conditional-moments filters and smoothers, under dynamax's names."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from dynamax.generalized_gaussian_ssm.inference import EKFIntegrals, GHKFIntegrals, UKFIntegrals
from dynamax.generalized_gaussian_ssm.models import ParamsGGSSM
from dynamax.linear_gaussian_ssm import PosteriorGSSMFiltered, PosteriorGSSMSmoothed
from dynamax.nonlinear_gaussian_ssm.inference_ukf import UKFHyperParams
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM
from jaxtyping import ArrayLike, PyTree

from elkax.gaussian import Form
from elkax.linearize import Cubature, GaussHermite, Linearizer, SigmaPoints, Taylor, Unscented
from elkax.linearize.emissions import Residual
from elkax.scan import Backend
from elkax.smoothers.linear import assemble_posterior
from elkax.smoothers.nonlinear import decode, filter_system, smooth_filtered, smooth_moments
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


@partial(jax.jit, static_argnames=("system", "backend"))
def _smoother_of_filtered(
    system: System,
    data: Data,
    posterior: PosteriorGSSMFiltered,
    *,
    backend: Backend | None,
) -> PosteriorGSSMSmoothed:
    moments = posterior.filtered_means, posterior.filtered_covariances
    smoothed = smooth_moments(system, data, *moments, backend)
    return assemble_posterior(posterior.marginal_loglik, *moments, smoothed)


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


def extended_kalman_filter(
    params: ParamsNLGSSM,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    num_iter: int = 1,
    output_fields: Sequence[str] | None = FIELDS,
    *,
    residual: Residual | None = None,
    form: str = "covariance",
) -> PosteriorGSSMFiltered:
    """Run the extended Kalman filter; arguments as `gaussian_filter`, in dynamax's order."""
    return gaussian_filter(
        params,
        emissions,
        inputs,
        num_iter=num_iter,
        output_fields=output_fields,
        residual=residual,
        form=form,
    )


def extended_kalman_smoother(
    params: ParamsNLGSSM,
    emissions: ArrayLike,
    filtered_posterior: PosteriorGSSMFiltered | None = None,
    inputs: PyTree | None = None,
    *,
    residual: Residual | None = None,
    backend: Backend | None = None,
    form: str = "covariance",
) -> PosteriorGSSMSmoothed:
    """Run the extended Kalman smoother; arguments as `gaussian_smoother`, in dynamax's order.

    `filtered_posterior` spares the filter; the steps are then linearized about its filtered means.
    """
    if filtered_posterior is None:
        return gaussian_smoother(
            params, emissions, inputs, residual=residual, backend=backend, form=form
        )
    check_backend(backend)
    find_form(form, float)
    system, data = prepare_system(params, emissions, inputs, residual=residual)
    return _smoother_of_filtered(system, data, filtered_posterior, backend=backend)


def _unscented(hyperparams: Any) -> SigmaPoints:
    """Take over dynamax's hyperparameters, which must be known before running."""
    if hyperparams is None:
        return SigmaPoints(Unscented())
    alpha, beta, kappa = (
        float(value) for value in (hyperparams.alpha, hyperparams.beta, hyperparams.kappa)
    )
    return SigmaPoints(Unscented(alpha, beta, kappa))


def unscented_kalman_filter(
    params: ParamsNLGSSM,
    emissions: ArrayLike,
    hyperparams: UKFHyperParams | None = None,
    inputs: PyTree | None = None,
    output_fields: Sequence[str] | None = FIELDS,
    *,
    residual: Residual | None = None,
    form: str = "covariance",
) -> PosteriorGSSMFiltered:
    """Run the unscented Kalman filter; arguments as `gaussian_filter`, in dynamax's order.

    `hyperparams` are dynamax's alpha, beta and kappa, its default ones if None; see `Unscented`.
    """
    return gaussian_filter(
        params,
        emissions,
        inputs,
        linearizer=_unscented(hyperparams),
        output_fields=output_fields,
        residual=residual,
        form=form,
    )


def unscented_kalman_smoother(
    params: ParamsNLGSSM,
    emissions: ArrayLike,
    hyperparams: UKFHyperParams | None = None,
    inputs: PyTree | None = None,
    *,
    residual: Residual | None = None,
    backend: Backend | None = None,
    form: str = "covariance",
) -> PosteriorGSSMSmoothed:
    """Run the unscented Kalman smoother; arguments as `unscented_kalman_filter`."""
    return gaussian_smoother(
        params,
        emissions,
        inputs,
        linearizer=_unscented(hyperparams),
        residual=residual,
        backend=backend,
        form=form,
    )


def cubature_kalman_filter(
    params: ParamsNLGSSM, emissions: ArrayLike, inputs: PyTree | None = None, **options: Any
) -> PosteriorGSSMFiltered:
    """Run the cubature Kalman filter; arguments and options as `gaussian_filter`."""
    return gaussian_filter(params, emissions, inputs, linearizer=SigmaPoints(Cubature()), **options)


def cubature_kalman_smoother(
    params: ParamsNLGSSM, emissions: ArrayLike, inputs: PyTree | None = None, **options: Any
) -> PosteriorGSSMSmoothed:
    """Run the cubature Kalman smoother; arguments and options as `gaussian_smoother`."""
    return gaussian_smoother(
        params, emissions, inputs, linearizer=SigmaPoints(Cubature()), **options
    )


def gauss_hermite_kalman_filter(
    params: ParamsNLGSSM,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    *,
    order: int = 3,
    **options: Any,
) -> PosteriorGSSMFiltered:
    """Run the Gauss-Hermite Kalman filter with `order` points in each dimension of the state.

    Other arguments and options as `gaussian_filter`.
    """
    linearizer = SigmaPoints(GaussHermite(order))
    return gaussian_filter(params, emissions, inputs, linearizer=linearizer, **options)


def gauss_hermite_kalman_smoother(
    params: ParamsNLGSSM,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    *,
    order: int = 3,
    **options: Any,
) -> PosteriorGSSMSmoothed:
    """Run the Gauss-Hermite Kalman smoother; `order` as the filter, others `gaussian_smoother`."""
    linearizer = SigmaPoints(GaussHermite(order))
    return gaussian_smoother(params, emissions, inputs, linearizer=linearizer, **options)


def _integrals(inf_params: Any) -> Linearizer:
    """Take over dynamax's Gaussian integrals, or a linearizer as it is."""
    if isinstance(inf_params, EKFIntegrals):
        return Taylor()
    if isinstance(inf_params, UKFIntegrals):
        return _unscented(inf_params)
    if isinstance(inf_params, GHKFIntegrals):
        return SigmaPoints(GaussHermite(int(inf_params.order)))
    if isinstance(inf_params, Linearizer) and not isinstance(inf_params, type):
        return inf_params
    raise TypeError(
        "inf_params must be dynamax's EKFIntegrals(), UKFIntegrals() or GHKFIntegrals(), or a "
        f"linearizer such as elkax.Taylor(), got {inf_params!r}"
    )


def conditional_moments_gaussian_filter(
    model_params: ParamsGGSSM,
    inf_params: Any,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    num_iter: int = 1,
    *,
    residual: Residual | None = None,
    form: str = "covariance",
) -> PosteriorGSSMFiltered:
    """Filter a model whose emissions have a mean and a covariance function of the state.

    Args:
        model_params: dynamax's `ParamsGGSSM`; its `emission_dist` is not read.
        inf_params: dynamax's `EKFIntegrals()`, `UKFIntegrals(...)` or `GHKFIntegrals(order)`, or a
            linearizer.
        emissions: as `gaussian_filter`.
        inputs: as `gaussian_filter`.
        num_iter: as `gaussian_filter`.
        residual: as `gaussian_filter`.
        form: as `gaussian_filter`.

    Returns:
        As `gaussian_filter`.

    Raises:
        ValueError: as `gaussian_filter`.
        TypeError: as `gaussian_filter`, or on other `inf_params`.
    """
    return gaussian_filter(
        model_params,
        emissions,
        inputs,
        linearizer=_integrals(inf_params),
        num_iter=num_iter,
        residual=residual,
        form=form,
    )


def conditional_moments_gaussian_smoother(
    model_params: ParamsGGSSM,
    inf_params: Any,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    *,
    residual: Residual | None = None,
    backend: Backend | None = None,
    form: str = "covariance",
) -> PosteriorGSSMSmoothed:
    """Smooth a model whose emissions have a mean and a covariance function of the state.

    Arguments as `conditional_moments_gaussian_filter`, result as `gaussian_smoother`.
    """
    return gaussian_smoother(
        model_params,
        emissions,
        inputs,
        linearizer=_integrals(inf_params),
        residual=residual,
        backend=backend,
        form=form,
    )
