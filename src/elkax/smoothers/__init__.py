"""Whole-sequence filters and smoothers under dynamax's names and types."""

from elkax.smoothers.initial import ExactDiffuse, Stationary
from elkax.smoothers.linear import lgssm_filter, lgssm_marginal_log_prob, lgssm_smoother

__all__ = [
    "ExactDiffuse",
    "Stationary",
    "lgssm_filter",
    "lgssm_marginal_log_prob",
    "lgssm_smoother",
]
