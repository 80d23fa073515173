"""Where the iterated smoother starts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import PosteriorGSSMSmoothed
from jaxtyping import Array

from elkax.gaussian import Form
from elkax.linearize import Linearizer
from elkax.scan import Backend
from elkax.scan.lanes import matmul, matvec
from elkax.smoothers.cost import measure
from elkax.smoothers.linearization import linearize
from elkax.smoothers.nonlinear import filter_system, smooth_filtered
from elkax.smoothers.prepare import real_array
from elkax.smoothers.system import Data, System

DIVERGED = 100.0


@partial(jax.jit, static_argnames=("system", "linearizer", "form", "backend"))
def _filter_start(
    system: System, data: Data, *, linearizer: Linearizer, form: Form, backend: Backend | None
) -> tuple[Array, Array]:
    """Return the smoothed moments, or the prior's where the filter has diverged.

    That is, where its cost is `DIVERGED` times that of the prior. A factor of one sends the growth
    model to worse minima.
    """
    smoothed = smooth_filtered(filter_system(system, data, linearizer, form), form, backend)
    prior, prior_covs = _prior_start(system, data, linearizer=linearizer)
    means = jnp.stack((smoothed.mean, prior))
    covs = jnp.stack((smoothed.cov, smoothed.cov if prior_covs is None else prior_covs))

    def judge(means: Array, covs: Array) -> tuple[Array, Array]:
        given = covs if linearizer.uses_covariance else None
        linearized = linearize(system, data, linearizer, means, given)
        misfit = measure(system, data, linearizer, linearized, means, given)
        return misfit.cost(), misfit.violation()

    cost, violation = jax.vmap(judge)(means, covs)
    lower = (DIVERGED * cost[1] < cost[0]) & (violation[1] <= violation[0])
    finite = jnp.isfinite(cost) & jnp.all(jnp.isfinite(means), axis=(1, 2))
    choice = jnp.where(finite[1] & (lower | ~finite[0]), 1, 0)
    return means[choice], covs[choice]


@partial(jax.jit, static_argnames=("system", "linearizer"))
def _prior_start(
    system: System, data: Data, *, linearizer: Linearizer
) -> tuple[Array, Array | None]:
    """Return the moments that a filter without data predicts, only means where these suffice."""
    varying = data.noise.ndim == 3

    def one(moments: tuple, x: tuple) -> tuple[tuple, tuple]:
        (mean, cov), (inputs, noise) = moments, x

        def step(state: Array) -> Array:
            return system.advance(state, inputs)

        if cov is None:
            moments = step(mean), None
        else:
            weights, offset, rest = linearizer(step, mean, cov)
            noise = (data.noise if noise is None else noise) + (0.0 if rest is None else rest)
            cov = matmul(matmul(weights, cov), weights.T) + noise
            moments = matvec(weights, mean) + offset, cov
        return moments, moments

    start = (data.initial_mean, data.initial_cov if linearizer.uses_covariance else None)
    xs = (data.later_inputs(), data.noise[1:] if varying else None)
    _, later = jax.lax.scan(one, start, xs, length=data.values.shape[0] - 1)
    return jax.tree.map(lambda first, rest: jnp.concatenate((first[None], rest)), start, later)


def find_start(
    start: Any,
    *,
    system: System,
    data: Data,
    linearizer: Linearizer,
    form: Form,
    backend: Backend | None,
) -> tuple[Array, Array | None]:
    """Return the first trajectory and, if the linearizer uses them, covariances."""
    shape = (data.values.shape[0], *data.initial_mean.shape)
    dtype = data.initial_mean.dtype
    # Without covariances sigma points begin as a Taylor expansion, their limit.
    covs = jnp.zeros((*shape, shape[1]), dtype)
    if start is None:
        means, covs = _filter_start(system, data, linearizer=linearizer, form=form, backend=backend)
    elif isinstance(start, str):
        if start != "prior":
            raise ValueError(
                f'start must be None, "prior", a trajectory, a state or a posterior, got {start!r}'
            )
        means, prior_covs = _prior_start(system, data, linearizer=linearizer)
        covs = covs if prior_covs is None else prior_covs
    else:
        if isinstance(start, PosteriorGSSMSmoothed):
            covs = real_array("start.smoothed_covariances", start.smoothed_covariances)
            start = start.smoothed_means
        means = real_array("start", start).astype(dtype)
        if means.shape not in (shape, shape[1:]) or covs.shape != (*shape, shape[1]):
            raise ValueError(f"start must be of shape {shape} or {shape[1:]}, got {means.shape}")
        means = jnp.broadcast_to(means, shape)
    finite = jnp.all(jnp.isfinite(means)) & jnp.all(jnp.isfinite(covs))
    means = jnp.where(finite, means, data.initial_mean)
    covs = jnp.where(finite, covs, data.initial_cov).astype(dtype)
    return means, covs if linearizer.uses_covariance else None
