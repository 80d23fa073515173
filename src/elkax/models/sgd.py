"""Gradient descent that never ends at parameters without a finite objective."""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tensorflow_probability.substrates.jax.bijectors as tfb
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jax.typing import ArrayLike
from jaxtyping import Array

from elkax.models.em_maximisation import trainable
from elkax.models.fitting import Fit, StaticModel, over_series

ADAM = optax.adam(1e-3)
FOREVER = int(np.iinfo(np.int32).max)


# One object for one optimizer, so that its step is compiled once.
@functools.lru_cache(maxsize=32)
def only_if_finite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let an optimizer pass over gradients that are not finite."""
    careful = optax.apply_if_finite(optimizer, FOREVER)
    # Compiled once; the branches of optax would be compiled anew in every step.
    return optax.GradientTransformation(careful.init, jax.jit(careful.update))


def run_sgd(
    fit: Fit,
    props: ParamsLGSSM,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    num_epochs: int,
    shuffle: bool,
    key: Array,
) -> tuple[ParamsLGSSM, Array]:
    """Maximise the log posterior by stochastic gradient descent.

    Args:
        fit: model and data.
        props: which parameters are trainable, and how each is constrained.
        optimizer: from optax.
        batch_size: number of series per minibatch.
        num_epochs: passes through all series.
        shuffle: whether to draw the minibatches at random.
        key: random key for that.

    Returns:
        The last parameters, or those at which the epoch with the least loss began, whichever have
        the higher log posterior; and the mean loss of each epoch.

    Raises:
        ValueError: if a trainable parameter has no finite unconstrained form.
    """
    props = _fitting_constrainers(fit.params, props)
    free = trainable(fit.params, props)
    theta = _unconstrain(fit.params, props, free)
    model, count = StaticModel(fit.model), len(fit.emissions)
    careful = only_if_finite(optimizer)
    state = careful.init(theta)

    def evaluate(theta: ParamsLGSSM, rows: Array) -> tuple[Array, ParamsLGSSM]:
        batch = fit.emissions[rows], None if fit.inputs is None else fit.inputs[rows]
        return _loss(theta, fit.params, props, batch, count / len(rows), model=model)

    def total(theta: ParamsLGSSM) -> float:
        parts = np.split(np.arange(count), range(batch_size, count, batch_size))
        loss = sum(len(rows) / count * float(evaluate(theta, rows)[0]) for rows in parts)
        return loss if math.isfinite(loss) else math.inf

    best, least, losses, refused = theta, math.inf, [], 0
    for epoch in jr.split(key, num_epochs):
        order = np.asarray(jr.permutation(epoch, count)) if shuffle else np.arange(count)
        start, parts = theta, []
        for rows in np.split(order, range(batch_size, count, batch_size)):
            loss, gradient = evaluate(theta, rows)
            updates, state = careful.update(gradient, state, theta)
            theta = optax.apply_updates(theta, updates)
            parts.append(loss)
        losses.append(np.mean([float(loss) for loss in parts]))
        refused += sum(not math.isfinite(loss) for loss in parts)
        if losses[-1] < least:
            best, least = start, losses[-1]
    if refused:
        warnings.warn(_words(refused, num_epochs * len(parts)), stacklevel=3)
    if num_epochs and not total(theta) <= total(best):
        theta = best
    return _constrain(theta, fit.params, props, free), jnp.asarray(losses, fit.emissions.dtype)


def _words(refused: int, steps: int) -> str:
    return (
        f"fit_sgd: {refused} of {steps} steps were not taken, because the log posterior or its "
        "gradient was not finite there. What is returned are the best parameters seen. Take "
        "smaller steps, start elsewhere, or, in float32, use float64 "
        "(jax.config.update('jax_enable_x64', True))."
    )


@functools.partial(jax.jit, static_argnames=("model",))
def _loss(
    theta: ParamsLGSSM,
    params: ParamsLGSSM,
    props: ParamsLGSSM,
    batch: tuple[Array, Array | None],
    scale: ArrayLike,
    *,
    model: StaticModel,
) -> tuple[Array, ParamsLGSSM]:
    """Compute the negative log posterior per emission, and its gradient."""
    free = trainable(params, props)

    def objective(theta: ParamsLGSSM) -> Array:
        here = _constrain(theta, params, props, free)
        each = over_series(lambda y, u: model.model.marginal_log_prob(here, y, u), *batch)
        value = model.model.log_prior(here) + jnp.sum(each) * scale
        return -value / (batch[0].size * scale)

    loss, gradient = jax.value_and_grad(objective)(theta)
    # A point without a finite value is refused, even if its derivative is finite.
    gradient = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(loss), leaf, jnp.nan), gradient)
    return loss, gradient


def _fitting_constrainers(params: ParamsLGSSM, props: ParamsLGSSM) -> ParamsLGSSM:
    """Keep variances positive where the properties have a constraint for a matrix."""
    value, prop = params.emissions.cov, props.emissions.cov
    size = value.shape[-1]
    variances = value.ndim == 1 or (value.ndim == 2 and value.shape != (size, size))
    bijector: Any = prop.constrainer
    if not variances or bijector is None or bijector.inverse_min_event_ndims < 2:
        return props
    prop = type(prop)(prop.trainable, tfb.Exp())
    return props._replace(emissions=props.emissions._replace(cov=prop))


def _unconstrain(params: ParamsLGSSM, props: ParamsLGSSM, free: frozenset) -> ParamsLGSSM:
    """Map trainable parameters to where every number is allowed; the others stay as they are."""
    for group, name in sorted(free):
        value = getattr(getattr(params, group), name)
        bijector = getattr(getattr(props, group), name).constrainer
        if bijector is None:
            continue
        value = bijector.inverse(value)
        if not np.all(np.isfinite(value)):
            raise ValueError(
                f"params.{group}.{name} is trainable and lies on the edge of what is allowed, as a "
                "singular covariance does, where fit_sgd cannot start: start from a positive "
                f"definite one, or freeze it with props.{group}.{name}.trainable = False"
            )
        params = _replace(params, group, name, value)
    return params


def _constrain(
    theta: ParamsLGSSM, params: ParamsLGSSM, props: ParamsLGSSM, free: frozenset
) -> ParamsLGSSM:
    """Give the parameters: trainable ones by theta, the others as they are."""
    for group, name in free:
        value = getattr(getattr(theta, group), name)
        bijector = getattr(getattr(props, group), name).constrainer
        params = _replace(params, group, name, value if bijector is None else bijector(value))
    return params


def _replace(params: ParamsLGSSM, group: str, name: str, value: Array) -> ParamsLGSSM:
    return params._replace(**{group: getattr(params, group)._replace(**{name: value})})
