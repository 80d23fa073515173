"""Whole-sequence filters and smoothers under dynamax's names and types."""

from elkax.smoothers.forecasting import Forecast, lgssm_forecast
from elkax.smoothers.initial import ExactDiffuse, Stationary
from elkax.smoothers.linear import lgssm_filter, lgssm_marginal_log_prob, lgssm_smoother
from elkax.smoothers.online import OnlineState, lgssm_online_start, lgssm_online_step
from elkax.smoothers.residuals import (
    Disturbances,
    Innovations,
    lgssm_disturbances,
    lgssm_innovations,
)
from elkax.smoothers.sampling import lgssm_joint_sample, lgssm_posterior_sample

__all__ = [
    "Disturbances",
    "ExactDiffuse",
    "Forecast",
    "Innovations",
    "OnlineState",
    "Stationary",
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
]
