"""Maximum likelihood of any parametrisation of a linear-Gaussian model."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num, PyTree
from scipy.optimize import OptimizeResult, minimize

from elkax.models.information import covariance_of, decompose
from elkax.scan import Backend
from elkax.smoothers import ExactDiffuse, Stationary, lgssm_marginal_log_prob

# By how much, in nats per observed number, a point where the log-likelihood is not finite counts as
# worse than the last one accepted. The line search interpolates, so more would make it crawl.
REFUSAL = 10.0


class MaximumLikelihoodFit(NamedTuple):
    r"""A maximum of the log-likelihood, or where the search for it ended.

    Attributes:
        estimate: $\hat\theta$, like the start.
        params: `build(estimate)`.
        log_likelihood: at the estimate, in nats.
        standard_errors: of $\hat\theta$, like the start, from the observed information; NaN for
            what the data do not determine (information not positive definite in a direction that
            the number depends on, or curved less than the gradient that is left).
        covariance: of the flattened estimate (p, p), in the order of `jax.flatten_util.
            ravel_pytree`; NaN in the rows and columns of what the data do not determine.
        gradient_norm: $\max_i |\partial\ell/\partial\theta_i| \max(|\theta_i|, 1) / \max(|\ell|,
            n)$ at the estimate, n observed numbers.
        iterations: of the search.
        converged: whether value and gradient are finite and `gradient_norm` is at most the
            tolerance. A statement about the gradient: whether the point is a maximum is seen in
            the standard errors.
        message: how the search ended, in words.
    """

    estimate: Any
    params: ParamsLGSSM
    log_likelihood: float
    standard_errors: Any
    covariance: Float[Array, "p p"]
    gradient_norm: float
    iterations: int
    converged: bool
    message: str


def maximum_likelihood(
    build: Callable[[Any], ParamsLGSSM],
    start: PyTree,
    emissions: Num[ArrayLike, "T N"],
    inputs: Num[ArrayLike, "T U"] | None = None,
    *,
    initial: Stationary | ExactDiffuse | None = None,
    backend: Backend | None = None,
    form: str | None = None,
    max_iters: int = 200,
    tolerance: float | None = None,
    verbose: bool = False,
) -> MaximumLikelihoodFit:
    r"""Maximise the log-likelihood $\ell(\theta) = \log p(y_{1:T} \mid \mathrm{build}(\theta))$.

    Quasi-Newton search (L-BFGS-B) with exact gradients, in the dtype of the start. Points at which
    the log-likelihood is not finite are stepped back from. Not for use inside `jit`.

    Args:
        build: from $\theta$ to parameters, pure, traceable and differentiable. Every real $\theta$
            should be allowed: build variances as `exp`. Calls with the same function and shapes
            compile once.
        start: where to start, any pytree of real numbers and arrays.
        emissions: $y$ (T, N), NaN where missing.
        inputs: $u$ (T, U).
        initial: `Stationary()` or `ExactDiffuse()` in place of the initial distribution built.
        backend: how to run over time; chosen from T and D if None.
        form: "covariance" or "square_root".
        max_iters: most iterations of the search.
        tolerance: on `gradient_norm`; square root of the rounding unit of the dtype if None.
        verbose: print a line per iteration.

    Returns:
        The estimate, its errors, and how the search ended.

    Raises:
        ValueError: if the start holds no number, the emissions no observed one, or the
            log-likelihood or its gradient is not finite at the start.
        TypeError: if the start holds something other than real numbers.

    References:
        Durbin & Koopman (2012), "Time Series Analysis by State Space Methods", Sec. 7.3.
    """
    start = jax.tree.map(_real_array, start)
    flat, unravel = ravel_pytree(start)
    count = int(np.sum(np.isfinite(np.asarray(emissions, float))))
    for name, size in (("start", flat.size), ("emissions", count)):
        if size == 0:
            raise ValueError(f"{name} must hold at least one number, got none")
    data = (jnp.asarray(emissions), None if inputs is None else jnp.asarray(inputs))
    options = {"build": build, "initial": initial, "backend": backend, "form": form}

    def function(theta: Array) -> tuple[Array, Array]:
        value, gradient = _value_and_gradient(unravel(theta), *data, **options)
        return value, ravel_pytree(gradient)[0]

    if tolerance is None:
        tolerance = float(np.sqrt(jnp.finfo(flat.dtype).eps))
    search = _Search(function, flat, count, tolerance, verbose)
    message = search.run(max_iters)
    end = search.accepted
    theta, gradient = (jnp.asarray(x, flat.dtype) for x in (end.theta, end.gradient))
    estimate = unravel(theta)
    covariance = covariance_of(decompose(_hessian(estimate, *data, **options), gradient))
    return MaximumLikelihoodFit(
        estimate=estimate,
        params=build(estimate),
        log_likelihood=-end.value,
        standard_errors=unravel(jnp.sqrt(jnp.diagonal(covariance))),
        covariance=covariance,
        gradient_norm=search.gradient_norm(),
        iterations=search.iterations,
        converged=search.is_converged(),
        message=message,
    )


def _real_array(leaf: Any) -> Array:
    dtype = np.asarray(leaf).dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"start must hold real numbers, got {leaf!r}")
    return jnp.asarray(leaf, jnp.result_type(float, leaf))


def _negative_log_likelihood(
    theta: PyTree, emissions: Array, inputs: Array | None, build: Callable, options: dict[str, Any]
) -> Array:
    return -lgssm_marginal_log_prob(build(theta), emissions, inputs, **options)


# Compiled once for one `build` and one shape of the data, so that refits cost no compilation.
@partial(jax.jit, static_argnames=("build", "initial", "backend", "form"))
def _value_and_gradient(
    theta: PyTree, emissions: Array, inputs: Array | None, *, build: Callable, **options: Any
) -> tuple[Array, PyTree]:
    return jax.value_and_grad(_negative_log_likelihood)(theta, emissions, inputs, build, options)


@partial(jax.jit, static_argnames=("build", "initial", "backend", "form"))
def _hessian(
    theta: PyTree, emissions: Array, inputs: Array | None, *, build: Callable, **options: Any
) -> Array:
    flat, unravel = ravel_pytree(theta)

    def value(x: Array) -> Array:
        return _negative_log_likelihood(unravel(x), emissions, inputs, build, options)

    return jax.hessian(value)(flat)


class _Point(NamedTuple):
    """The negative log-likelihood and its gradient at a point."""

    theta: np.ndarray
    value: float
    gradient: np.ndarray

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.value) and np.all(np.isfinite(self.gradient)))


class _Search:
    """A search for a minimum, and the last point that it accepted.

    The minimiser works per observed number in float64, the function in the dtype of the start.
    """

    def __init__(
        self, function: Callable, start: Array, count: int, tolerance: float, verbose: bool
    ) -> None:
        self._function, self._dtype = function, start.dtype
        self._count, self._tolerance, self._verbose = count, tolerance, verbose
        self.iterations = 0
        self._last = self.accepted = self._evaluate(np.asarray(start, float))
        if not self.accepted.is_finite():
            raise ValueError(
                "the log-likelihood and its gradient must be finite at the start, got "
                f"{-self.accepted.value} and {-self.accepted.gradient} at {self.accepted.theta}"
            )

    def run(self, max_iters: int) -> str:
        """Search until converged, and say in words how it ended."""
        ending = ""
        if not self.is_converged():
            ending = minimize(
                self._objective,
                self.accepted.theta,
                jac=True,
                method="L-BFGS-B",
                callback=self._step,
                options={"maxiter": max_iters, "ftol": 0.0, "gtol": 0.0},
            ).message
        if self.is_converged():
            return f"gradient norm {self.gradient_norm():.2e} within {self._tolerance:.2e}"
        return f"gradient norm {self.gradient_norm():.2e} above {self._tolerance:.2e}: {ending}"

    def gradient_norm(self) -> float:
        """Give the largest relative derivative at the accepted point."""
        point = self.accepted
        scale = np.maximum(np.abs(point.theta), 1.0) / max(abs(point.value), self._count)
        return float(np.max(np.abs(point.gradient) * scale))

    def is_converged(self) -> bool:
        """Tell whether the accepted point is finite and its gradient small."""
        return self.accepted.is_finite() and self.gradient_norm() <= self._tolerance

    def _evaluate(self, theta: np.ndarray) -> _Point:
        value, gradient = self._function(jnp.asarray(theta, self._dtype))
        return _Point(theta.copy(), float(value), np.asarray(gradient, float))

    def _objective(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        self._last = self._evaluate(theta)
        if self._last.is_finite():
            return self._last.value / self._count, self._last.gradient / self._count
        return self.accepted.value / self._count + REFUSAL, np.zeros_like(theta)

    def _step(self, intermediate_result: OptimizeResult) -> None:
        theta = intermediate_result.x
        same = np.array_equal(self._last.theta, theta)
        self.accepted = self._last if same else self._evaluate(theta)
        self.iterations += 1
        if self._verbose:
            print(
                f"iteration {self.iterations:4d}  log-likelihood {-self.accepted.value:.6f}  "
                f"gradient norm {self.gradient_norm():.2e}"
            )
        if self.is_converged():
            raise StopIteration
