"""Nonlinear steps and observations turned into affine-Gaussian ones."""

from elkax.linearize.affine import Affine, Linearizer
from elkax.linearize.rules import Cubature, GaussHermite, Rule, Unscented
from elkax.linearize.sigma_points import SigmaPoints
from elkax.linearize.taylor import Taylor

__all__ = [
    "Affine",
    "Cubature",
    "GaussHermite",
    "Linearizer",
    "Rule",
    "SigmaPoints",
    "Taylor",
    "Unscented",
]
