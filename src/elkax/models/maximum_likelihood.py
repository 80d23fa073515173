"""Maximum likelihood of any parametrisation of a linear-Gaussian model."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num, PyTree

from elkax.models.information import covariance_of, decompose
from elkax.models.search import Curvature, Point, Problem, Search
from elkax.models.verdict import (
    describe_end,
    describe_missing_errors,
    describe_start,
    find_boundary,
)
from elkax.scan import Backend
from elkax.smoothers import (
    ExactDiffuse,
    Stationary,
    lgssm_innovations,
    lgssm_marginal_log_prob,
)

# Predicted variances and their derivatives for all parameters, at most this many numbers. Beyond,
# the search measures parameters by their observed information.
MOST_NUMBERS = 2**26


class MaximumLikelihoodFit(NamedTuple):
    r"""A maximum of the log-likelihood, or where the search for it ended.

    Attributes:
        estimate: $\hat\theta$, like the start.
        params: `build(estimate)`.
        log_likelihood: at the estimate, in nats.
        standard_errors: of $\hat\theta$, like the start, from the observed information; NaN for
            what ran to a boundary, such as the logarithm of a variance that is zero, and for what
            the data do not determine (information not positive definite in a direction that
            the number depends on, or curved less than the gradient that is left).
        covariance: of the flattened estimate (p, p), in the order of `jax.flatten_util.
            ravel_pytree`; NaN in the rows and columns of numbers without standard error. Numbers
            at a boundary count as known for the others.
        gradient_norm: $\sqrt{g^\top I^{-1}g}$ with g the gradient and I the observed information
            at the estimate: how far off the maximum is, in standard errors. It does not depend on
            the units of the data or of $\theta$.
        iterations: of the search.
        converged: whether `expected_gain` is at most the tolerance. False also for what is not
            finite and for a saddle.
        message: the verdict in words: how the search ended, what to do if it did not converge, and
            which numbers have no standard error and why.
        expected_gain: $\tfrac12 g^\top I^{-1}g$, what one more Newton step is expected to add to
            the log-likelihood, in nats.
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
    expected_gain: float


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

    Trust-region Newton search with exact derivatives in the dtype of the start. Steps are measured
    in units of the information on each parameter, so neither the units of the data nor those of the
    parameters matter. Points where the log-likelihood is NaN or infinite are stepped back from; the
    best point seen is returned. Not for use inside `jit`, `vmap` or `grad`.

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
        tolerance: on `expected_gain`, in nats; the search ends there. If None the square root of
            the rounding unit of the dtype counts as converged (3.5e-4 in float32, 1.5e-8 in
            float64), and the search goes on for as long as a step lowers the gain by a power of
            ten.
        verbose: print a line per iteration.

    Returns:
        The estimate, its errors, and how the search ended. An iteration costs one Hessian, about as
        much as a gradient for each of the p numbers in theta.

    Raises:
        ValueError: if the start holds no number, the emissions no observed one, or the
            log-likelihood or its gradient is not finite at the start; it says why.
        TypeError: if the start holds something other than real numbers, or the call is traced.

    References:
        Durbin & Koopman (2012), "Time Series Analysis by State Space Methods", Sec. 7.3; Nocedal &
        Wright (2006), "Numerical Optimization", Ch. 4.
    """
    _refuse_tracers(start, emissions, inputs)
    start = jax.tree.map(_real_array, start)
    flat, unravel = ravel_pytree(start)
    data = (jnp.asarray(emissions), None if inputs is None else jnp.asarray(inputs))
    _refuse_tracers(flat, data)
    count = int(np.sum(np.isfinite(np.asarray(emissions, float))))
    for name, size in (("start", flat.size), ("emissions", count)):
        if size == 0:
            raise ValueError(f"{name} must hold at least one number, got none")
    options = {"build": build, "initial": initial, "backend": backend, "form": form}

    def evaluate(theta: np.ndarray) -> Point:
        here = jnp.asarray(theta, flat.dtype)
        value, gradient = _value_and_gradient(unravel(here), *data, **options)
        return Point(*(np.asarray(x, float) for x in (here, value, ravel_pytree(gradient)[0])))

    def curvature(theta: np.ndarray) -> Curvature:
        here = unravel(jnp.asarray(theta, flat.dtype))
        return Curvature(*(np.asarray(x, float) for x in _curvature(here, *data, **options)))

    first = evaluate(np.asarray(flat, float))
    if not first.is_finite():
        raise ValueError(describe_start(build, start, initial, first))
    eps = float(jnp.finfo(flat.dtype).eps)
    limit = float(np.sqrt(eps)) if tolerance is None else tolerance
    target = eps if tolerance is None else tolerance
    problem = Problem(evaluate, curvature, count, eps, limit, target)
    search = Search(problem, first, _print_progress if verbose else None)
    ending = search.run(max_iters)

    estimate = unravel(jnp.asarray(search.point.theta, flat.dtype))
    hessian = search.curvature.hessian
    boundary = find_boundary(evaluate, search.point, hessian)
    covariance = _covariance(hessian, search.point.gradient, ~boundary, flat.dtype)
    errors = jnp.sqrt(jnp.diagonal(covariance))
    converged = ending == "converged"
    unknown = np.isnan(np.asarray(errors)) & ~boundary
    notes = describe_missing_errors(estimate, boundary, unknown) if converged else []
    return MaximumLikelihoodFit(
        estimate=estimate,
        params=build(estimate),
        log_likelihood=-float(search.point.value),
        standard_errors=unravel(errors),
        covariance=covariance,
        gradient_norm=float(np.sqrt(2 * search.gain)),
        iterations=search.iterations,
        converged=converged,
        message=describe_end(search, ending, limit, flat.dtype, form, notes),
        expected_gain=search.gain,
    )


def _refuse_tracers(*arguments: PyTree) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments)):
        raise TypeError(
            "maximum_likelihood decides from numbers when to stop, so it cannot run inside jit, "
            "vmap or grad, got a traced value: call it outside, and for many series in a loop, "
            "which compiles once for one build and one shape"
        )


def _real_array(leaf: Any) -> Array:
    dtype = np.asarray(leaf).dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"start must hold real numbers, got {leaf!r}")
    return jnp.asarray(leaf, jnp.result_type(float, leaf))


def _print_progress(search: Search) -> None:
    print(
        f"iteration {search.iterations:4d}  log-likelihood {-search.point.value:.6f}  "
        f"expected gain {search.gain:.2e}"
    )


def _covariance(hessian: np.ndarray, gradient: np.ndarray, inside: np.ndarray, dtype: Any) -> Array:
    """Invert the information on the numbers that are not at a boundary."""
    kept = np.flatnonzero(inside)
    information = decompose(
        jnp.asarray(hessian[np.ix_(kept, kept)], dtype), jnp.asarray(gradient[kept], dtype)
    )
    covariance = jnp.full(hessian.shape, jnp.nan, dtype)
    return covariance.at[np.ix_(kept, kept)].set(covariance_of(information))


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
def _curvature(
    theta: PyTree, emissions: Array, inputs: Array | None, *, build: Callable, **options: Any
) -> tuple[Array, Array, Array, Array, Array]:
    """Give the Hessian, and what `_expected_information` does."""
    flat, unravel = ravel_pytree(theta)

    def value(x: Array) -> Array:
        return _negative_log_likelihood(unravel(x), emissions, inputs, build, options)

    def predict(x: Array) -> tuple[Array, Array]:
        found = lgssm_innovations(build(unravel(x)), emissions, inputs, **options)
        return found.innovations, jnp.diagonal(found.covariances, axis1=-2, axis2=-1)

    hessian = jax.hessian(value)(flat)
    if emissions.size * emissions.shape[-1] * flat.size > MOST_NUMBERS:
        return hessian, *jax.tree.map(jnp.zeros_like, (hessian, hessian, flat, flat[0]))
    return hessian, *_expected_information(predict, flat)


def _expected_information(predict: Callable, theta: Array) -> tuple[Array, Array, Array, Array]:
    r"""Sum $\dot v\dot v^\top/(s\bar e)$, $\tfrac12\dot s\dot s^\top/s^2$ and $\tfrac12\dot s/s$.

    v are the errors of predictions, s their variances, and $\bar e$ is the mean of $v^2/s$. With it
    at its expected value of one, the first two add up to the expectation of the squared score where
    the entries of an emission are independent, which will do to measure steps. Far from the maximum
    $\bar e$ makes them what they would be if all variances had the size of the data: a mean then
    moves by as much as the data are off, not by as much as they should be.

    Returns:
        The three sums, (p, p), (p, p) and (p,), and the mean.
    """
    errors, variances = predict(theta)
    by_error, by_variance = jax.jacfwd(predict)(theta)
    known = jnp.isfinite(errors) & (variances > 0)
    safe = jnp.where(known, variances, 1.0)
    excess = jnp.sum(jnp.where(known, errors**2 / safe, 0.0)) / jnp.sum(known)
    by_error = jnp.where(known[..., None], by_error / jnp.sqrt(safe * excess)[..., None], 0.0)
    by_variance = jnp.where(known[..., None], by_variance / safe[..., None], 0.0)
    of_errors, of_variances = (
        jnp.einsum("tni,tnj->ij", x, x, precision="highest") for x in (by_error, by_variance)
    )
    return of_errors, 0.5 * of_variances, 0.5 * jnp.sum(by_variance, axis=(0, 1)), excess
