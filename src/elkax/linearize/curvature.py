"""Curvature of a log-density in the state, for a Gaussian stand-in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.linearize.affine import Linearizer
from elkax.linearize.taylor import hessian


@runtime_checkable
class Curvature(Protocol):
    """A symmetric matrix in place of the negative Hessian of a log-density."""

    def __call__(
        self,
        linearizer: Linearizer,
        log_density: Callable[[Array], Array],
        distribution: Callable[[Array], Any],
        observed: Array,
        mean: Array,
        cov: Array | None,
    ) -> Array:
        """Return the curvature about $N(m, P)$; its eigenvalues will be taken by their size."""
        ...


@dataclass(frozen=True)
class ClippedHessian:
    """The negative Hessian, its eigenvalues taken by their size.

    Any distribution will do. For an exponential family whose natural parameter is affine in the
    state (Poisson with a log-rate, Bernoulli and categorical with logits) this is the Fisher
    information. Negative curvature, as far out on a Student t, shortens the step.
    """

    def __call__(
        self,
        linearizer: Linearizer,
        log_density: Callable[[Array], Array],
        distribution: Callable[[Array], Any],
        observed: Array,
        mean: Array,
        cov: Array | None,
    ) -> Array:
        """Average the negative Hessian; see `Curvature`."""
        del distribution, observed
        return -linearizer.expect(hessian(log_density), mean, cov)


@dataclass(frozen=True)
class Fisher:
    r"""$\sum_i \nabla\mu_i\nabla\mu_i^\top/v_i$, $y_i$ having mean $\mu_i(z)$, variance $v_i(z)$.

    The Fisher information wherever one parameter of an exponential family depends on the state
    (Poisson, Bernoulli, negative binomial with a fixed count, Gaussian with a fixed variance): the
    smoother then takes Fisher's scoring steps, which is the conditional-moments form. Never
    negative. Needs independent entries of y with a mean and a variance.
    """

    def __call__(
        self,
        linearizer: Linearizer,
        log_density: Callable[[Array], Array],
        distribution: Callable[[Array], Any],
        observed: Array,
        mean: Array,
        cov: Array | None,
    ) -> Array:
        """Average the Fisher information; see `Curvature`."""
        del log_density

        def information(state: Array) -> Array:
            def average(state: Array) -> Array:
                return jnp.broadcast_to(distribution(state).mean(), observed.shape)

            slope = jnp.where(observed[:, None], jax.jacfwd(average)(state), 0.0)
            variance = jnp.where(observed, distribution(state).variance(), 1.0)
            return jnp.einsum("ni,n,nj->ij", slope, 1.0 / variance, slope, precision="highest")

        return linearizer.expect(information, mean, cov, semidefinite=True)
