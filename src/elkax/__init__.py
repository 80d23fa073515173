"""Probabilistic state-space models on Kalman machinery, parallel in time."""

import jax

# dynamax sets a global flag when it is imported; importing elkax must not.
_precision = jax.config.jax_default_matmul_precision
import dynamax  # noqa: E402, F401

jax.config.update("jax_default_matmul_precision", _precision)
del _precision, dynamax

from elkax.scan import Associative, Blocked, Sequential, affine_scan  # noqa: E402
from elkax.smoothers import (  # noqa: E402
    ExactDiffuse,
    Stationary,
    lgssm_filter,
    lgssm_marginal_log_prob,
    lgssm_smoother,
)

__version__ = "0.1.0"

__all__ = [
    "Associative",
    "Blocked",
    "ExactDiffuse",
    "Sequential",
    "Stationary",
    "affine_scan",
    "lgssm_filter",
    "lgssm_marginal_log_prob",
    "lgssm_smoother",
]
