"""Probabilistic state-space models on Kalman machinery, parallel in time."""

import jax

# dynamax sets a global flag when it is imported; importing elkax must not.
_precision = jax.config.jax_default_matmul_precision
import dynamax  # noqa: E402, F401

jax.config.update("jax_default_matmul_precision", _precision)
del _precision, dynamax, jax

from elkax import datasets, scan  # noqa: E402
from elkax.models import (  # noqa: E402
    LinearGaussianConjugateSSM,
    LinearGaussianSSM,
    MaximumLikelihoodFit,
    arma,
    combine,
    local_level,
    local_linear_trend,
    maximum_likelihood,
    regression,
    seasonal,
    transform_errors,
    trigonometric_seasonal,
)
from elkax.scan import Associative, Blocked, Sequential, affine_scan  # noqa: E402
from elkax.smoothers import (  # noqa: E402
    Disturbances,
    ExactDiffuse,
    Forecast,
    Innovations,
    OnlineState,
    Stationary,
    lgssm_disturbances,
    lgssm_filter,
    lgssm_forecast,
    lgssm_innovations,
    lgssm_joint_sample,
    lgssm_marginal_log_prob,
    lgssm_online_start,
    lgssm_online_step,
    lgssm_posterior_sample,
    lgssm_smoother,
)

__version__ = "0.1.0"

__all__ = [
    "Associative",
    "Blocked",
    "Disturbances",
    "ExactDiffuse",
    "Forecast",
    "Innovations",
    "LinearGaussianConjugateSSM",
    "LinearGaussianSSM",
    "MaximumLikelihoodFit",
    "OnlineState",
    "Sequential",
    "Stationary",
    "affine_scan",
    "arma",
    "combine",
    "datasets",
    "lgssm_disturbances",
    "lgssm_filter",
    "lgssm_forecast",
    "lgssm_innovations",
    "lgssm_joint_sample",
    "lgssm_marginal_log_prob",
    "lgssm_online_start",
    "lgssm_online_step",
    "lgssm_posterior_sample",
    "lgssm_smoother",
    "local_level",
    "local_linear_trend",
    "maximum_likelihood",
    "regression",
    "scan",
    "seasonal",
    "transform_errors",
    "trigonometric_seasonal",
]
