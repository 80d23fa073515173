"""Whole-sequence filters and smoothers under dynamax's names and types."""

from elkax.smoothers.damping import Damping, GaussNewton, LevenbergMarquardt, LineSearch
from elkax.smoothers.descent import Record
from elkax.smoothers.diffuse_initial import DiffuseInitial
from elkax.smoothers.forecasting import Forecast, lgssm_forecast
from elkax.smoothers.info import Info, Starts
from elkax.smoothers.initial import ExactDiffuse, Stationary
from elkax.smoothers.iterated import Solution, iterated_smoother
from elkax.smoothers.iteration import Status
from elkax.smoothers.linear import lgssm_filter, lgssm_marginal_log_prob, lgssm_smoother
from elkax.smoothers.named_filters import (
    conditional_moments_gaussian_filter,
    conditional_moments_gaussian_smoother,
    cubature_kalman_filter,
    cubature_kalman_smoother,
    extended_kalman_filter,
    extended_kalman_smoother,
    gauss_hermite_kalman_filter,
    gauss_hermite_kalman_smoother,
    unscented_kalman_filter,
    unscented_kalman_smoother,
)
from elkax.smoothers.nonlinear_filters import gaussian_filter, gaussian_smoother
from elkax.smoothers.nonlinear_sampling import (
    extended_kalman_posterior_sample,
    iterated_posterior_sample,
)
from elkax.smoothers.online import OnlineState, lgssm_online_start, lgssm_online_step
from elkax.smoothers.residuals import (
    Disturbances,
    Innovations,
    lgssm_disturbances,
    lgssm_innovations,
)
from elkax.smoothers.sampling import lgssm_joint_sample, lgssm_posterior_sample
from elkax.smoothers.stationarity import laplace_log_prob
from elkax.smoothers.system import ParamsDistributionSSM
from elkax.smoothers.trust_region import TrustRegion

__all__ = [
    "Damping",
    "DiffuseInitial",
    "Disturbances",
    "ExactDiffuse",
    "Forecast",
    "GaussNewton",
    "Info",
    "Innovations",
    "LevenbergMarquardt",
    "LineSearch",
    "OnlineState",
    "ParamsDistributionSSM",
    "Record",
    "Solution",
    "Starts",
    "Stationary",
    "Status",
    "TrustRegion",
    "conditional_moments_gaussian_filter",
    "conditional_moments_gaussian_smoother",
    "cubature_kalman_filter",
    "cubature_kalman_smoother",
    "extended_kalman_filter",
    "extended_kalman_posterior_sample",
    "extended_kalman_smoother",
    "gauss_hermite_kalman_filter",
    "gauss_hermite_kalman_smoother",
    "gaussian_filter",
    "gaussian_smoother",
    "iterated_posterior_sample",
    "iterated_smoother",
    "laplace_log_prob",
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
    "unscented_kalman_filter",
    "unscented_kalman_smoother",
]
