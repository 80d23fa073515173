"""Extended, sigma-point and conditional-moments filters and smoothers, under dynamax's names."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from dynamax.generalized_gaussian_ssm.inference import EKFIntegrals, GHKFIntegrals, UKFIntegrals
from dynamax.generalized_gaussian_ssm.models import ParamsGGSSM
from dynamax.linear_gaussian_ssm import PosteriorGSSMFiltered, PosteriorGSSMSmoothed
from dynamax.nonlinear_gaussian_ssm.inference_ukf import UKFHyperParams
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM
from jaxtyping import ArrayLike, PyTree

from elkax.linearize import Cubature, GaussHermite, Linearizer, SigmaPoints, Taylor, Unscented
from elkax.linearize.emissions import Residual
from elkax.scan import Backend
from elkax.smoothers.linear import assemble_posterior
from elkax.smoothers.nonlinear import smooth_moments
from elkax.smoothers.nonlinear_filters import FIELDS, gaussian_filter, gaussian_smoother
from elkax.smoothers.prepare import check_backend, find_form
from elkax.smoothers.system import Data, System, prepare_system


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
