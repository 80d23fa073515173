"""Gradient descent that never ends at parameters without a finite objective."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

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
from elkax.smoothers.prepare import check_count

ADAM = optax.adam(1e-3)
FOREVER = int(np.iinfo(np.int32).max)


# One object for one optimizer, so that its step is compiled once.
@functools.lru_cache(maxsize=32)
def only_if_finite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let an optimizer pass over gradients that are not finite."""
    careful = optax.apply_if_finite(optimizer, FOREVER)
    # Compiled once; the branches of optax would be compiled anew in every step.
    return optax.GradientTransformation(careful.init, jax.jit(careful.update))


class Part(NamedTuple):
    """What a minibatch of b series says.

    Attributes:
        prior: log prior.
        values: log-likelihoods (b,).
        failed: series left out (b,), those that have no value here.
        gradient: of `minus_log_posterior` in the parameters, not finite where no step is to be
            taken.
    """

    prior: Array
    values: Array
    failed: Array
    gradient: Any


class Scale(NamedTuple):
    """What makes the sum over a minibatch an estimate of the whole, per observed entry.

    Attributes:
        weight: number of series over that of the minibatch.
        observed: number of entries that are not missing, of all series.
    """

    weight: ArrayLike
    observed: ArrayLike

    def minus_log_posterior(self, prior: ArrayLike, value: ArrayLike) -> Array:
        """Return the negative log posterior per observed entry, of a sum over the minibatch."""
        return -(jnp.asarray(prior) + self.weight * value) / self.observed


class Schedule(NamedTuple):
    """How to descend.

    Attributes:
        optimizer: from optax.
        batch_size: number of series per minibatch.
        num_epochs: passes through all series.
        shuffle: whether to draw the minibatches at random.
        key: random key for that; dynamax's constant one if None.
    """

    optimizer: optax.GradientTransformation
    batch_size: int
    num_epochs: int
    shuffle: bool
    key: Array | None


class Descent(NamedTuple):
    """How a descent ended.

    Attributes:
        theta: the last parameters, or those at which the best epoch began if these are better.
        losses: (num_epochs,), of the series that have a value.
        failures: in how many epochs each series was left out (B,).
        at: where each series failed last.
        refused: number of steps not taken.
        steps: number of minibatches.
    """

    theta: Any
    losses: Array
    failures: np.ndarray
    at: dict[int, Any]
    refused: int
    steps: int


def descend(
    evaluate: Callable[[Any, Array, Array | None, Scale], Part],
    theta: Any,
    emissions: Array,
    inputs: Array | None,
    schedule: Schedule,
) -> Descent:
    """Minimise the negative log posterior by stochastic gradient descent.

    Epochs with fewer failures are better, then those with a smaller loss.

    Args:
        evaluate: (parameters, emissions (b, T, N), inputs, scale) of a minibatch.
        theta: start.
        emissions: (B, T, N), NaN where missing.
        inputs: (B, T, U) or None.
        schedule: how to descend.
    """
    optimizer, batch_size, num_epochs, shuffle, key = schedule
    check_count("batch_size", batch_size)
    count = len(emissions)
    observed = np.sum(~np.isnan(np.asarray(emissions)), axis=(1, 2))
    size = max(int(np.sum(observed)), 1)
    careful = only_if_finite(optimizer)
    state = careful.init(theta)

    def split(order: np.ndarray) -> list[np.ndarray]:
        return np.split(order, range(batch_size, count, batch_size))

    def part_of(theta: Any, rows: np.ndarray) -> Part:
        batch = emissions[rows], None if inputs is None else inputs[rows]
        return evaluate(theta, *batch, Scale(count / len(rows), size))

    def judge(epoch: list[tuple[np.ndarray, Part]]) -> tuple[int, float]:
        """Return the number of failures of an epoch, and its loss."""
        lost, value, seen = 0, 0.0, 0.0
        for rows, part in epoch:
            kept = ~np.asarray(part.failed)
            weight = count / len(rows)
            lost += int(np.sum(~kept))
            value += weight * float(np.sum(np.asarray(part.values, np.float64)[kept]))
            seen += weight * float(np.sum(observed[rows][kept]))
        prior = float(np.mean([part.prior for _, part in epoch]))
        return lost, -(prior / size + value / seen) if seen else math.nan

    best, least, losses, refused, steps = theta, (count + 1, math.inf), [], 0, 0
    failures, at = np.zeros(count, int), {}
    for epoch_key in jr.split(jr.PRNGKey(0) if key is None else key, num_epochs):
        order = np.asarray(jr.permutation(epoch_key, count)) if shuffle else np.arange(count)
        start, epoch, taken = theta, [], []
        for rows in split(order):
            part = part_of(theta, rows)
            epoch.append((rows, part, theta))
            updates, state = careful.update(part.gradient, state, theta)
            theta = optax.apply_updates(theta, updates)
            taken.append(state.last_finite)
        for rows, part, here in epoch:
            for row in rows[np.asarray(part.failed)]:
                failures[row] += 1
                at[int(row)] = here
        refused, steps = refused + sum(not bool(finite) for finite in taken), steps + len(taken)
        lost, loss = judge([entry[:2] for entry in epoch])
        losses.append(loss)
        if math.isfinite(loss) and (lost, loss) < least:
            best, least = start, (lost, loss)

    def total(theta: Any) -> tuple[int, float]:
        lost, loss = judge([(rows, part_of(theta, rows)) for rows in split(np.arange(count))])
        return lost, loss if math.isfinite(loss) else math.inf

    if num_epochs and not total(theta) <= total(best):
        theta = best
    dtype = jnp.result_type(*jax.tree.leaves(theta))
    return Descent(theta, jnp.asarray(losses, dtype), failures, at, refused, steps)


def run_sgd(fit: Fit, props: ParamsLGSSM, schedule: Schedule) -> tuple[ParamsLGSSM, Array]:
    """Maximise the log posterior of a linear-Gaussian model; see `descend`.

    A minibatch without a finite log posterior or gradient changes nothing.

    Args:
        fit: model and data.
        props: which parameters are trainable, and how each is constrained.
        schedule: how to descend.

    Returns:
        The parameters, and the loss of each epoch.

    Raises:
        ValueError: if a trainable parameter has no finite unconstrained form.
    """
    props = _fitting_constrainers(fit.params, props)
    free = trainable(fit.params, props)
    model = StaticModel(fit.model)

    def evaluate(theta: ParamsLGSSM, emissions: Array, inputs: Array | None, scale: Scale) -> Part:
        return _evaluate(theta, fit.params, props, (emissions, inputs), scale, model=model)

    theta = _unconstrain(fit.params, props, free)
    end = descend(evaluate, theta, fit.emissions, fit.inputs, schedule)
    if end.refused:
        warnings.warn(refused_words(end), stacklevel=3)
    return _constrain(end.theta, fit.params, props, free), end.losses


def refused_words(end: Descent) -> str:
    """Say that steps were not taken."""
    return (
        f"fit_sgd: {end.refused} of {end.steps} steps were not taken, because the log posterior or "
        "its gradient was not finite there. What is returned are the best parameters seen. Take "
        "smaller steps, start elsewhere, or, in float32, use float64 "
        "(jax.config.update('jax_enable_x64', True))."
    )


@functools.partial(jax.jit, static_argnames=("model",))
def _evaluate(
    theta: ParamsLGSSM,
    params: ParamsLGSSM,
    props: ParamsLGSSM,
    batch: tuple[Array, Array | None],
    scale: Scale,
    *,
    model: StaticModel,
) -> Part:
    """Evaluate a minibatch; series are not told from each other, so that they share covariances."""
    free = trainable(params, props)

    def objective(theta: ParamsLGSSM) -> tuple[Array, tuple[Array, Array]]:
        here = _constrain(theta, params, props, free)
        each = over_series(lambda y, u: model.model.marginal_log_prob(here, y, u), *batch)
        prior = jnp.asarray(model.model.log_prior(here))
        return scale.minus_log_posterior(prior, jnp.sum(each)), (prior, each)

    (loss, (prior, each)), gradient = jax.value_and_grad(objective, has_aux=True)(theta)
    # A point without a finite value is refused, even if its derivative is finite.
    gradient = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(loss), leaf, jnp.nan), gradient)
    return Part(prior, each, jnp.zeros(each.shape, bool), gradient)


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
