"""Statistical linear regression on sigma points."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elkax.gaussian.factor import psd_cholesky, solve_lower
from elkax.linearize.affine import Affine, Function
from elkax.linearize.rules import Cubature, Rule
from elkax.scan.lanes import matmul, matvec, outer


@dataclass(frozen=True)
class SigmaPoints:
    r"""Regress a function on the state over $N(m, P)$, by sigma points $m + L\xi_i$, $P = LL^\top$.

    With the Jacobian $J$ at m and what it leaves out, $g_i = f(m + L\xi_i) - f(m) - JL\xi_i$:
    $K = \sum_i w_ig_i\xi_i^\top$, $A = J + KL^{-1}$, and with the residuals
    $r_i = g_i - K\xi_i$ and $\delta = \sum_i w_ir_i$, $W = \sum_i w_i$:
    $b = f(m) + \delta - Am$,
    $\Omega = \sum_i w_i(r_i - \delta/W)(r_i - \delta/W)^\top + \gamma\,\delta\delta^\top$.
    These are the usual moments, $A = C^\top P^{-1}$ and $\Omega = \Phi - APA^\top$, without a
    difference of covariances. Where P is singular the slope is that of the regression on the
    range of P and the Jacobian elsewhere, the limit of P going to zero. A Jacobian that is not
    finite (a kink at m) is only used where P is singular.

    Args:
        rule: `Cubature()`, `Unscented(...)` or `GaussHermite(...)`.

    References:
        García-Fernández, Svensson, Morelande & Särkkä (2015), IEEE TSP 63(20), for the regression.
    """

    rule: Rule = Cubature()
    uses_covariance: ClassVar[bool] = True

    def __call__(self, function: Function, mean: Array, cov: Array | None) -> Affine:
        """Regress a function; see `Linearizer`."""
        dim, dtype = mean.shape[0], mean.dtype
        rule = self.rule(dim)
        points, weights = jnp.asarray(rule.points, dtype), jnp.asarray(rule.weights, dtype)
        factor = psd_cholesky(cov)
        regular = jnp.diagonal(factor) != 0
        jacobian = jax.jacfwd(function)(mean)
        unused = jnp.all(regular) & ~jnp.isfinite(jacobian)
        jacobian = jnp.where(unused, 0.0, jacobian)
        centre = function(mean)
        shifts = matmul(points, factor.T)
        values = jax.vmap(function)(mean + shifts)
        rest = values - centre - matmul(shifts, jacobian.T)
        slope = jnp.where(regular, matmul((weights[:, None] * rest).T, points), 0.0)
        safe = factor + jnp.diag(jnp.where(regular, 0.0, 1.0))
        gain = jacobian + solve_lower(safe, slope.T, transposed=True).T
        residuals = rest - matmul(points, slope.T)
        total = jnp.sum(weights)
        shift = matvec(residuals.T, weights)
        columns = jnp.sqrt(weights)[:, None] * (residuals - shift / total)
        omega = matmul(columns.T, columns) + rule.spread * outer(shift, shift)
        return Affine(gain, centre + shift - matvec(gain, mean), omega)

    def expect(
        self,
        function: Function,
        mean: Array,
        cov: Array | None,
        *,
        semidefinite: bool = False,
    ) -> Array:
        """Average a function; see `Linearizer`.

        Raises:
            ValueError: if the average must be semi-definite and the central weight is negative.
        """
        rule = self.rule(mean.shape[0])
        # Equal to one up to rounding for rules without a central point.
        if semidefinite and np.sum(rule.weights) > 1 + 1e-6:
            raise ValueError(
                "an average of covariances needs a rule whose central weight is not negative, "
                f"such as Cubature(), got {self.rule} with D = {mean.shape[0]}"
            )
        points = jnp.asarray(rule.points, mean.dtype)
        weights = jnp.asarray(rule.weights, mean.dtype)
        centre = function(mean)
        values = jax.vmap(function)(mean + matmul(points, psd_cholesky(cov).T))
        return centre + jnp.tensordot(weights, values - centre, axes=1, precision="highest")
