"""Nonlinear steps and observations turned into affine-Gaussian ones."""

from elkax.linearize.affine import Affine, Linearizer
from elkax.linearize.curvature import ClippedHessian, Curvature, Fisher
from elkax.linearize.emissions import (
    Datum,
    DensityEmission,
    Emission,
    GaussianEmission,
    MomentEmission,
    Observation,
    call,
)
from elkax.linearize.rules import Cubature, GaussHermite, Rule, Unscented
from elkax.linearize.sigma_points import SigmaPoints
from elkax.linearize.taylor import Taylor

__all__ = [
    "Affine",
    "ClippedHessian",
    "Cubature",
    "Curvature",
    "Datum",
    "DensityEmission",
    "Emission",
    "Fisher",
    "GaussHermite",
    "GaussianEmission",
    "Linearizer",
    "MomentEmission",
    "Observation",
    "Rule",
    "SigmaPoints",
    "Taylor",
    "Unscented",
    "call",
]
