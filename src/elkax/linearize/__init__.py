"""Nonlinear steps and observations turned into affine-Gaussian ones; structures of Jacobians."""

from elkax.linearize.affine import Affine, Linearizer
from elkax.linearize.block_diagonal import BlockDiagonal
from elkax.linearize.curvature import ClippedHessian, Curvature, Fisher
from elkax.linearize.diagonal import Diagonal
from elkax.linearize.emissions import (
    Datum,
    DensityEmission,
    Emission,
    GaussianEmission,
    MomentEmission,
    Observation,
    call,
)
from elkax.linearize.full import Full
from elkax.linearize.no_jacobian import Identity, Zero
from elkax.linearize.rules import Cubature, GaussHermite, Rule, Unscented
from elkax.linearize.sigma_points import SigmaPoints
from elkax.linearize.structure import Dampable, Structure
from elkax.linearize.taylor import Taylor, hessian

__all__ = [
    "Affine",
    "BlockDiagonal",
    "ClippedHessian",
    "Cubature",
    "Curvature",
    "Dampable",
    "Datum",
    "DensityEmission",
    "Diagonal",
    "Emission",
    "Fisher",
    "Full",
    "GaussHermite",
    "GaussianEmission",
    "Identity",
    "Linearizer",
    "MomentEmission",
    "Observation",
    "Rule",
    "SigmaPoints",
    "Structure",
    "Taylor",
    "Unscented",
    "Zero",
    "call",
    "hessian",
]
