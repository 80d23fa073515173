"""Gradient descent on nonlinear models, where one series may fail and the others go on."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.parameters import from_unconstrained, to_unconstrained
from jaxtyping import Array

from elkax.models.fitting import all_finite, over_series
from elkax.models.learnable import as_learnable
from elkax.models.sgd import Part, Scale, Schedule, descend, refused_words
from elkax.smoothers import Status

# How many of the series that failed are named.
NAMED = 5


def fit_each(
    model: Any,
    params: Any,
    props: Any,
    emissions: Array,
    inputs: Array | None,
    schedule: Schedule,
) -> tuple[Any, Array]:
    """Fit a model by `descend`, leaving out what fails where it fails.

    Args:
        model: a `NonlinearSSM`.
        params: start.
        props: which arrays are trainable, and how each is constrained.
        emissions: (T, N) or (B, T, N), NaN where missing.
        inputs: (T, U) or (B, T, U), or None.
        schedule: how to descend.

    Returns:
        The parameters, and the loss of each epoch.
    """
    learnable, props, restore = as_learnable(params, props)
    if emissions.ndim == 2:
        emissions, inputs = emissions[None], None if inputs is None else inputs[None]

    def parameters(theta: Any) -> Any:
        return from_unconstrained(theta, props)

    @jax.jit
    def evaluate(theta: Any, emissions: Array, inputs: Array | None, scale: Scale) -> Part:
        # Each series has a gradient of its own: in that of a sum, one that is not finite spoils it.
        likelihood = jax.value_and_grad(
            lambda theta, y, u: model.marginal_log_prob(parameters(theta), y, u)
        )
        each = over_series(functools.partial(likelihood, theta), emissions, inputs)
        finite = jax.vmap(all_finite)(each)
        prior, of_prior = jax.value_and_grad(
            lambda theta: jnp.asarray(model.log_prior(parameters(theta)))
        )(theta)

        def total(of_prior: Array, leaf: Array) -> Array:
            kept = finite.reshape(-1, *[1] * (leaf.ndim - 1))
            likelihood = jnp.sum(jnp.where(kept, leaf, 0.0), axis=0)
            gradient = scale.minus_log_posterior(of_prior, likelihood)
            return jnp.where(jnp.any(finite), gradient, jnp.nan)

        return Part(prior, each[0], ~finite, jax.tree.map(total, of_prior, each[1]))

    end = descend(evaluate, to_unconstrained(learnable, props), emissions, inputs, schedule)
    if np.any(end.failures):

        def reason(series: int) -> str:
            batch = emissions[series], None if inputs is None else inputs[series]
            return _reason(model, explain(end.at[series], *batch))

        explain = jax.jit(lambda theta, y, u: _state(model, parameters(theta), y, u))
        warnings.warn(_words(end.failures, schedule.num_epochs, reason), stacklevel=3)
    elif end.refused:
        warnings.warn(refused_words(end), stacklevel=3)
    return restore(parameters(end.theta)), end.losses


class _State(NamedTuple):
    """What tells why a series has failed: its value, and how its smoother ended."""

    value: Array
    status: Array
    iterations: Array


def _state(model: Any, params: Any, emissions: Array, inputs: Array | None) -> _State:
    info = model.solve(params, emissions, inputs).info
    value = model.marginal_log_prob(params, emissions, inputs)
    return _State(value, info.status, info.iterations)


def _reason(model: Any, state: _State) -> str:
    if np.isfinite(state.value):
        return "the log-likelihood is finite, and its gradient is not"
    if model.linearizer.uses_covariance:
        return "the log-likelihood of the filter is not finite"
    status = Status(int(state.status))
    if status != Status.CONVERGED:
        return f"the smoother ended as {status.name} after {state.iterations} iterations"
    return (
        "the smoother converged, where the Hessian of the MAP cost is not positive definite or the "
        "log-likelihood not finite"
    )


def _words(failures: np.ndarray, epochs: int, reason: Callable[[int], str]) -> str:
    """Say which series were left out, how often and why; the first few by name."""
    failed = np.flatnonzero(failures)
    named = [f"series {i} in {failures[i]} of {epochs} epochs: {reason(i)}" for i in failed[:NAMED]]
    if len(failed) > NAMED:
        named.append(f"and {len(failed) - NAMED} more")
    return (
        f"fit_sgd: {len(failed)} of {len(failures)} series had no finite log-likelihood or "
        f"gradient in some epochs, and were left out there: {'; '.join(named)}. Losses are those "
        "of the others. What to do: raise max_iters, start elsewhere, take smaller steps, or, in "
        "float32, use float64 (jax.config.update('jax_enable_x64', True)); model.solve(params, "
        "emissions, inputs).info says how the smoother of one series ends."
    )
