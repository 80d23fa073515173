r"""Sigma points of the standard normal distribution.

A rule with points $\xi_i$ and weights $w_i > 0$, besides the point 0 with weight $1 - \sum_i w_i$
(of any sign), has $\sum_i w_i\xi_i = 0$ and $\sum_i w_i\xi_i\xi_i^\top = I$.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class Points(NamedTuple):
    r"""A rule in D dimensions.

    Attributes:
        points: $\xi$ (S, D).
        weights: $w$ (S,), positive.
        spread: $\gamma \ge 0$, see `SigmaPoints`.
    """

    points: np.ndarray
    weights: np.ndarray
    spread: float


@runtime_checkable
class Rule(Protocol):
    """A family of rules, one for each dimension."""

    def __call__(self, dim: int) -> Points:
        """Return the rule in `dim` dimensions."""
        ...


@dataclass(frozen=True)
class Unscented:
    r"""The 2D + 1 points of the scaled unscented transform.

    With $c = \alpha^2(D + \kappa)$: points $\pm\sqrt c\,e_i$ of weight $1/2c$. In the covariance
    the central point weighs $1 - \alpha^2 + \beta$ more than in the mean. Written as a sum of
    squares that is $\gamma = \beta + \alpha^2\kappa/D$, so residual covariances are positive
    semi-definite if and only if $\gamma \ge 0$, also where the central weight is negative.

    Args:
        alpha: spread of the points; the default is that of dynamax.
        beta: 2 is best for a Gaussian.
        kappa: as in the equation.

    References:
        Julier (2002), ACC, 4555-4559; Wan & van der Merwe (2000), ASSPCC.
    """

    alpha: float = 3**0.5
    beta: float = 2.0
    kappa: float = 1.0

    def __call__(self, dim: int) -> Points:
        """Return the rule in `dim` dimensions.

        Raises:
            ValueError: if the points are not real, or residual covariances could be negative.
        """
        square = self.alpha**2 * (dim + self.kappa)
        spread = self.beta + self.alpha**2 * self.kappa / dim
        if not (square > 0 and spread >= 0):
            raise ValueError(
                "the unscented rule needs alpha^2 (D + kappa) > 0 and beta + alpha^2 kappa / D "
                f">= 0, got {self} with D = {dim}"
            )
        points = np.sqrt(square) * np.concatenate((np.eye(dim), -np.eye(dim)))
        return Points(points, np.full(2 * dim, 0.5 / square), spread)


@dataclass(frozen=True)
class Cubature:
    r"""The 2D points $\pm\sqrt D\,e_i$, exact for polynomials of degree three.

    References:
        Arasaratnam & Haykin (2009), IEEE Transactions on Automatic Control 54(6).
    """

    def __call__(self, dim: int) -> Points:
        """Return the rule in `dim` dimensions."""
        return Unscented(alpha=1.0, beta=0.0, kappa=0.0)(dim)


@dataclass(frozen=True)
class GaussHermite:
    """The product of D one-dimensional rules: `order`$^D$ points.

    Exact for polynomials of degree `2 order - 1` in each variable.

    Args:
        order: points in each dimension, at least 2.

    References:
        Ito & Xiong (2000), IEEE Transactions on Automatic Control 45(5).
    """

    order: int = 3

    def __post_init__(self) -> None:
        """Check the order."""
        if isinstance(self.order, bool) or not isinstance(self.order, int) or self.order < 2:
            raise ValueError(f"order must be an integer of at least 2, got {self.order!r}")

    def __call__(self, dim: int) -> Points:
        """Return the rule in `dim` dimensions."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(self.order)
        grid = np.meshgrid(*[nodes] * dim, indexing="ij")
        product = np.meshgrid(*[weights / weights.sum()] * dim, indexing="ij")
        points = np.stack([axis.ravel() for axis in grid], axis=-1)
        return Points(points, np.prod([axis.ravel() for axis in product], axis=0), 0.0)
