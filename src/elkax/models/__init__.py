"""Models: linear and nonlinear Gaussian, any emissions, structural, maximum likelihood."""

from elkax.models.arma import arma
from elkax.models.combination import combine
from elkax.models.conjugate import LinearGaussianConjugateSSM
from elkax.models.distribution import DistributionSSM
from elkax.models.information import transform_errors
from elkax.models.linear_gaussian import LinearGaussianSSM
from elkax.models.maximum_likelihood import MaximumLikelihoodFit, maximum_likelihood
from elkax.models.nonlinear_gaussian import NonlinearGaussianSSM
from elkax.models.regression import regression
from elkax.models.structural import (
    local_level,
    local_linear_trend,
    seasonal,
    trigonometric_seasonal,
)

__all__ = [
    "DistributionSSM",
    "LinearGaussianConjugateSSM",
    "LinearGaussianSSM",
    "MaximumLikelihoodFit",
    "NonlinearGaussianSSM",
    "arma",
    "combine",
    "local_level",
    "local_linear_trend",
    "maximum_likelihood",
    "regression",
    "seasonal",
    "transform_errors",
    "trigonometric_seasonal",
]
