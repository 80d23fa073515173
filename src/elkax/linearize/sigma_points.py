"""Statistical linear regression on sigma points."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from elkax.gaussian.factor import psd_cholesky, solve_lower
from elkax.linearize.affine import Affine, Function
from elkax.linearize.rules import Cubature, Points, Rule
from elkax.linearize.taylor import NO_DERIVATIVE
from elkax.scan.lanes import matmul, matvec, outer

# What rounding may do to an average, relative to the size of the function.
_ROUNDING = 1e-5
# Weights of a rule without a central point add up to one but for rounding.
_WEIGHTLESS = 1e-6


@dataclass(frozen=True)
class SigmaPoints:
    r"""Regress a function on the state over $N(m, P)$, by sigma points $m + L\xi_i$, $P = LL^\top$.

    With a Jacobian $J$ and what it leaves out, $g_i = f(m + L\xi_i) - f(m) - JL\xi_i$:
    $K = \sum_i w_ig_i\xi_i^\top$, $A = J + KL^{-1}$, and with the residuals
    $r_i = g_i - K\xi_i$ and $\delta = \sum_i w_ir_i$, $W = \sum_i w_i$:
    $b = f(m) + \delta - Am$,
    $\Omega = \sum_i w_i(r_i - \delta/W)(r_i - \delta/W)^\top + \gamma\,\delta\delta^\top$.
    These are the usual moments, $A = C^\top P^{-1}$ and $\Omega = \Phi - APA^\top$, without a
    difference of covariances. On the range of P nothing depends on J, which only keeps digits.
    Elsewhere the slope is that of the Jacobian at m, the limit of P going to zero, and zero where
    there is none: where it is not finite, or f has no forward rule (`custom_vjp`,
    `pure_callback`, `odeint`), which is found when f is traced. The moments of f, filters, and
    fixed points of the iterated smoother do not depend on that slope.

    Rounding of f reaches its average times W, which is large where points are close. Points of a
    rule with $\epsilon W > 10^{-5}$, $\epsilon$ the precision of the type, are moved out by a
    common factor s, and their weights divided by $s^2$, until $\epsilon W = 10^{-5}$: values of f
    a thousand deviations away from zero then keep an average to a hundredth of a deviation, and
    second moments are those of the rule. In float64 that leaves $\alpha \ge 10^{-5}$ of the
    unscented rule alone; in float32 the least step is $0.11\sqrt D$ standard deviations.

    Args:
        rule: `Cubature()`, `Unscented(...)` or `GaussHermite(...)`.

    References:
        García-Fernández, Svensson, Morelande & Särkkä (2015), IEEE TSP 63(20), for the regression.
    """

    rule: Rule = Cubature()
    uses_covariance: ClassVar[bool] = True

    def points(self, dim: int, dtype: DTypeLike) -> Points:
        """Return the rule in `dim` dimensions, with steps that the type of numbers carries."""
        points, weights, spread = self.rule(dim)
        total = float(np.sum(weights))
        # Never beyond the points of cubature, whose weights add up to one.
        square = max(1.0, min(total, total * float(jnp.finfo(dtype).eps) / _ROUNDING))
        return Points(points * np.sqrt(square), weights / square, spread)

    def check(self, dim: int, dtype: DTypeLike) -> None:
        """Warn if the steps of the rule are too small for the type of numbers."""
        given, used = self.rule(dim).points, self.points(dim, dtype).points
        step, taken = (np.min(np.linalg.norm(x, axis=1)) for x in (given, used))
        if taken > step:
            warnings.warn(
                f"{self.rule} has steps of {step:.2g} standard deviations with D = {dim}, too "
                f"small for {jnp.dtype(dtype).name}: rounding would replace the second derivatives "
                f"that they measure. Steps of {taken:.2g} standard deviations are used",
                stacklevel=4,
            )

    def __call__(self, function: Function, mean: Array, cov: Array | None) -> Affine:
        """Regress a function; see `Linearizer`."""
        rule = self.points(mean.shape[0], mean.dtype)
        points, weights = (jnp.asarray(x, mean.dtype) for x in rule[:2])
        factor = psd_cholesky(cov)
        regular = jnp.diagonal(factor) != 0
        shifts = matmul(points, factor.T)
        centre = _centre(function, mean, rule)
        rest = jax.vmap(function)(mean + shifts) - centre
        # Any Jacobian will do where P is regular; one beside the mean is not that of a kink there.
        at = jnp.where(jnp.all(regular), mean + shifts[0], mean)
        jacobian = _jacobian(function, at)
        if jacobian is not None:
            jacobian = jnp.where(jnp.isfinite(jacobian), jacobian, 0.0)
            rest = rest - matmul(shifts, jacobian.T)
        slope = jnp.where(regular, matmul((weights[:, None] * rest).T, points), 0.0)
        safe = factor + jnp.diag(jnp.where(regular, 0.0, 1.0))
        gain = solve_lower(safe, slope.T, transposed=True).T
        if jacobian is not None:
            gain = gain + jacobian
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
        rule = self.points(mean.shape[0], mean.dtype)
        if semidefinite and np.sum(rule.weights) > 1 + _WEIGHTLESS:
            raise ValueError(
                "an average of covariances needs a rule whose central weight is not negative, "
                f"such as Cubature(), got {self.rule} with D = {mean.shape[0]}"
            )
        points, weights = (jnp.asarray(x, mean.dtype) for x in rule[:2])
        centre = _centre(function, mean, rule)
        values = jax.vmap(function)(mean + matmul(points, psd_cholesky(cov).T))
        return centre + jnp.tensordot(weights, values - centre, axes=1, precision="highest")


def _centre(function: Function, mean: Array, rule: Points) -> Array:
    """Return f(m), from which values are reckoned.

    Where the central point has no weight any other origin would do: f(m) then need not be finite,
    and what it depends on does not matter.
    """
    centre = function(mean)
    if abs(1.0 - np.sum(rule.weights)) > _WEIGHTLESS:
        return centre
    centre = jax.lax.stop_gradient(centre)
    return jnp.where(jnp.isfinite(centre), centre, 0.0)


def _jacobian(function: Function, mean: Array) -> Array | None:
    """Return the Jacobian of a function that has been evaluated; None if it has no forward rule."""
    try:
        # Traced by itself, so that nothing of a failed attempt stays in the program.
        return jax.jit(jax.jacfwd(function), inline=True)(mean)
    except NO_DERIVATIVE:
        return None
