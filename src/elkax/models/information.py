"""Errors of estimates from the curvature of the log-likelihood."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree


class Information(NamedTuple):
    r"""Observed information $I = B^{-\top}\mathrm{diag}(\lambda)B^{-1}$, split by what it knows.

    Attributes:
        basis: $B$ (p, p), whose columns are the eigenvectors of the information in units in which
            its diagonal is one.
        values: $\lambda$ (p,).
        known: (p,), whether the data determine the direction of a column.
    """

    basis: Float[Array, "p p"]
    values: Float[Array, " p"]
    known: Bool[Array, " p"]

    def propagate(self, jacobian: Float[Array, "m p"]) -> tuple[Array, Array]:
        r"""Carry errors over to functions of the parameters (delta method).

        Args:
            jacobian: $G$, derivatives of m functions.

        Returns:
            A root $A$ (m, p) of their covariance, $AA^\top = GI^{-1}G^\top$, and which of the m
            functions depend on no unknown direction; for the others A means nothing.
        """
        parts = jnp.matmul(jacobian, self.basis, precision="highest")
        root = jnp.where(self.known, parts / jnp.sqrt(jnp.where(self.known, self.values, 1.0)), 0.0)
        unknown = jnp.linalg.norm(jnp.where(self.known, 0.0, parts), axis=-1)
        tolerance = jnp.finfo(parts.dtype).eps ** (1 / 3) * jnp.linalg.norm(parts, axis=-1)
        # Written so that NaN counts as unknown.
        return root, unknown <= tolerance


def decompose(hessian: Float[Array, "p p"], gradient: Float[Array, " p"]) -> Information:
    r"""Decompose the observed information and find the directions that it does not determine.

    A direction is unknown if its curvature is not positive, or below the noise: p square roots of
    the rounding unit, or the gradient that is left, both measured in units in which the diagonal of
    the information is one. (Off the maximum, the curvature along a direction in which the
    log-likelihood is constant is not zero but of the order of the gradient.)

    Args:
        hessian: second derivatives of the negative log-likelihood.
        gradient: its first derivatives.

    Returns:
        The decomposition; every direction is unknown if a number is not finite.
    """
    size = hessian.shape[0]
    diagonal = jnp.diagonal(hessian)
    scale = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))
    values, vectors = jnp.linalg.eigh(hessian / (scale[:, None] * scale))
    noise = size * jnp.sqrt(jnp.finfo(hessian.dtype).eps)
    known = values > jnp.maximum(noise, jnp.linalg.norm(gradient / scale))
    return Information(vectors / scale[:, None], values, known)


def covariance_of(information: Information) -> Float[Array, "p p"]:
    """Invert an information matrix; rows and columns of what it does not determine are NaN."""
    size = information.values.shape[0]
    root, known = information.propagate(jnp.eye(size, dtype=information.values.dtype))
    covariance = jnp.matmul(root, root.T, precision="highest")
    return jnp.where(known[:, None] & known[None], covariance, jnp.nan)


def parameter_errors(
    log_likelihood: Callable[[Array], Array], constrain: Callable[[Array], Array], theta: Array
) -> Float[Array, " m"]:
    """Compute standard errors of functions of the parameters that maximise a log-likelihood.

    Args:
        log_likelihood: (p,) to a scalar.
        constrain: (p,) to the m quantities of interest.
        theta: (p,), the maximum.

    Returns:
        Standard errors, NaN where a quantity depends on a direction that the data do not determine.
    """
    gradient = jax.grad(log_likelihood)(theta)
    information = decompose(-jax.hessian(log_likelihood)(theta), gradient)
    root, known = information.propagate(jax.jacobian(constrain)(theta))
    return jnp.where(known, jnp.linalg.norm(root, axis=-1), jnp.nan)


def transform_errors(
    function: Callable[[Any], PyTree], theta: PyTree, covariance: Float[Array, "p p"]
) -> PyTree:
    r"""Compute standard errors of functions of an estimate by the delta method.

    $$\mathrm{se}[g_i(\hat\theta)] = \sqrt{G_i \Sigma G_i^\top},\qquad
      G_i = \partial g_i / \partial\theta^\top \text{ at } \hat\theta$$

    Args:
        function: $g$, from a pytree like `theta` to a pytree of real arrays.
        theta: $\hat\theta$, such as `MaximumLikelihoodFit.estimate`.
        covariance: $\Sigma$ of the flattened estimate, such as `MaximumLikelihoodFit.covariance`.
            NaN on its diagonal marks what the data do not determine.

    Returns:
        Standard errors in the structure of what `function` returns; NaN where it depends on a
        parameter that the data do not determine.

    Raises:
        ValueError: if the shape of `covariance` is not that of the flattened estimate.
    """
    flat, unravel = ravel_pytree(theta)
    if covariance.shape != (flat.size, flat.size):
        raise ValueError(
            f"covariance must be of shape {(flat.size, flat.size)} for the {flat.size} numbers in "
            f"theta, got {covariance.shape}"
        )
    _, restore = ravel_pytree(function(theta))
    jacobian = jax.jacobian(lambda x: ravel_pytree(function(unravel(x)))[0])(flat)
    unknown = jnp.isnan(jnp.diagonal(covariance))
    finite = jnp.where(unknown[:, None] | unknown[None], 0.0, covariance)
    variance = jnp.einsum("ip,pq,iq->i", jacobian, finite, jacobian, precision="highest")
    affected = jnp.any((jacobian != 0) & unknown, axis=1)
    return restore(jnp.where(affected, jnp.nan, jnp.sqrt(variance)))
