"""First-order Taylor expansion."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array

from elkax.linearize.affine import Affine, Function
from elkax.scan.lanes import matvec

# What JAX raises when it differentiates a function without a forward rule. An error of the user's
# own rule may be one of these as well; it, too, says that there is no derivative.
NO_DERIVATIVE = (TypeError, ValueError, NotImplementedError)


def hessian(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Return the second derivatives of a function, D^2 tangents of it.

    By forward mode twice, so that loops of unknown length, as of an implicit integrator, have them.
    """
    return jax.jacfwd(jax.jacfwd(function))


@dataclass(frozen=True)
class Taylor:
    r"""Linearize at the mean: $A = f'(m)$, $b = f(m) - Am$, and no residual covariance.

    The extended Kalman filter and, iterated, Gauss-Newton on the MAP cost. Costs D tangents of the
    function.

    Raises:
        TypeError: on a function without a forward rule (`custom_vjp`, `pure_callback`, `odeint`).

    References:
        Särkkä & Svensson (2023), Bayesian Filtering and Smoothing, Sec. 7.2.
    """

    uses_covariance: ClassVar[bool] = False

    def __call__(self, function: Function, mean: Array, cov: Array | None) -> Affine:
        """Expand a function about the mean; see `Linearizer`."""
        del cov
        value = function(mean)
        try:
            weights = jax.jacfwd(function)(mean)
        except NO_DERIVATIVE as error:
            raise TypeError(
                "Taylor() needs functions with a forward derivative, got one without: "
                f"{error} SigmaPoints() needs none"
            ) from error
        return Affine(weights, value - matvec(weights, mean), None)

    def expect(
        self,
        function: Function,
        mean: Array,
        cov: Array | None,
        *,
        semidefinite: bool = False,
    ) -> Array:
        """Evaluate a function at the mean; see `Linearizer`."""
        del cov, semidefinite
        return function(mean)
