"""The iteration of EM: from parameters to parameters, never to such as are not finite."""

from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jax.typing import ArrayLike
from jaxtyping import Array

from elkax.models.em_maximisation import trainable
from elkax.models.em_progress import show_progress
from elkax.models.fitting import Fit, StaticModel, all_finite, over_series
from elkax.smoothers.prepare import is_concrete


class Ending(IntEnum):
    """Why EM went no further."""

    NONE = 0
    LOG_POSTERIOR = 1  # not finite at the parameters of the last step
    NOT_FINITE = 2  # the parameters that a step gave
    VARIANCE = 3  # the variance of an emission fell to zero
    SINGULAR = 4  # the emission covariance became singular


class Limits(NamedTuple):
    """Where emission variances end.

    Attributes:
        collapse: (N,), what counts as zero.
        floor: (N,), what they must not fall below; None if there is no such thing.
    """

    collapse: Array
    floor: Array | None


class Progress(NamedTuple):
    """Where EM stands.

    Attributes:
        params: where the next E-step is; where the last one was, once it has ended.
        best: the parameters with the highest log posterior so far.
        value: this log posterior.
        state: of the M-step.
        ending: an `Ending`.
        refused: the parameters that it ended at, and did not take.
    """

    params: ParamsLGSSM
    best: ParamsLGSSM
    value: Array
    state: Any
    ending: Array
    refused: ParamsLGSSM


class Outcome(NamedTuple):
    """How EM went.

    Attributes:
        progress: where it stands.
        log_probs: (num_iters,), NaN after the end.
        ending: an `Ending`, traced under `jit`.
        collapse: (N,), what counted as an emission variance of zero.
    """

    progress: Progress
    log_probs: Array
    ending: Array
    collapse: Array


def run_em(
    fit: Fit,
    props: ParamsLGSSM,
    floor: Array | None,
    num_iters: int,
    print_every: int | None,
) -> Outcome:
    """Take EM steps, at most `num_iters`, and evaluate the log posterior after the last one, too.

    Args:
        fit: model and data.
        props: which parameters are trainable.
        floor: (N,), smallest emission variances.
        num_iters: most steps.
        print_every: steps between two looks at how far it is; none if None.
    """
    batch = fit.emissions, fit.inputs
    params = fit.params if floor is None else _lift(fit.params, floor)
    progress = Progress(
        params=params,
        best=params,
        value=jnp.full((), -jnp.inf, fit.emissions.dtype),
        state=fit.model.initialize_m_step_state(params, props),
        ending=jnp.zeros((), jnp.int32),
        refused=params,
    )
    limits = _limits(fit.emissions, params.emissions.cov, floor)
    # One step more than asked for, which evaluates what the last one led to.
    total = num_iters + 1
    options = {"props": props, "batch": batch, "limits": limits, "total": total}
    run = partial(_run, **options, model=StaticModel(fit.model))
    if print_every is None or not is_concrete(*jax.tree.leaves((batch, params))):
        progress, (values, endings) = run(progress, 0, num_steps=total)
    else:
        num_steps = min(print_every, total)
        history = []
        with show_progress(num_iters) as show:
            for start in range(0, total, print_every):
                progress, rows = run(progress, start, num_steps=num_steps)
                history.append(rows)
                show(min(start + print_every, num_iters), float(progress.value))
                if progress.ending != Ending.NONE:
                    break
        values, endings = (jnp.concatenate(each) for each in zip(*history, strict=True))
        missing = max(0, total - len(values))
        values = jnp.pad(values, (0, missing), constant_values=jnp.nan)[:total]
        endings = jnp.pad(endings, (0, missing), mode="edge")[:total]
    # The step from the last parameters is not taken, so that it cannot fail.
    last = jnp.where(endings[-1] == Ending.LOG_POSTERIOR, endings[-1], Ending.NONE)
    before = endings[num_iters - 1]
    ending = jnp.where(before == Ending.NONE, last, before)
    return Outcome(progress, values[:num_iters], ending, limits.collapse)


@partial(jax.jit, static_argnames=("model", "num_steps"))
def _run(
    progress: Progress,
    start: ArrayLike,
    props: ParamsLGSSM,
    batch: tuple[Array, Array | None],
    limits: Limits,
    total: ArrayLike,
    *,
    model: StaticModel,
    num_steps: int,
) -> tuple[Progress, tuple[Array, Array]]:
    """Take steps until one is refused, or `total` are done; also give what each one came to.

    Those are log posterior and `Ending`. The number of steps is that of the program, so that the
    last of several runs, which has fewer left, is the same program.
    """
    step = partial(_step, props=props, batch=batch, limits=limits, model=model.model)

    def rest(progress: Progress) -> tuple[Progress, Array]:
        return progress, jnp.full_like(progress.value, jnp.nan)

    def advance(progress: Progress, index: Array) -> tuple[Progress, tuple[Array, Array]]:
        goes_on = (progress.ending == Ending.NONE) & (index < total)
        progress, value = jax.lax.cond(goes_on, step, rest, progress)
        return progress, (value, progress.ending)

    return jax.lax.scan(advance, progress, start + jnp.arange(num_steps))


def _step(
    progress: Progress,
    *,
    props: ParamsLGSSM,
    batch: tuple[Array, Array | None],
    limits: Limits,
    model: Any,
) -> tuple[Progress, Array]:
    """Evaluate the parameters and move on, unless they or the next ones are no good."""
    params = progress.params
    stats, values = over_series(partial(model.e_step, params), *batch)
    value = jnp.asarray(model.log_prior(params) + jnp.sum(values), progress.value.dtype)
    finite = jnp.isfinite(value)
    new, state = model.m_step(params, props, stats, progress.state)
    new = jax.tree.map(lambda after, before: jnp.asarray(after, before.dtype), new, params)
    if limits.floor is not None:
        new = _lift(new, limits.floor)
    verdict = _judge(params, new, props, limits)
    ending = jnp.where(finite, verdict, Ending.LOG_POSTERIOR).astype(progress.ending.dtype)
    better = finite & (value >= progress.value)
    goes_on = ending == Ending.NONE
    return Progress(
        params=_choose(goes_on, new, params),
        best=_choose(better, params, progress.best),
        value=jnp.where(better, value, progress.value),
        state=_choose(goes_on, state, progress.state),
        ending=ending,
        refused=_choose(finite, new, params),
    ), jnp.where(finite, value, jnp.nan)


def _choose(condition: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _judge(old: ParamsLGSSM, new: ParamsLGSSM, props: ParamsLGSSM, limits: Limits) -> Array:
    """Say what is wrong with the parameters that a step leads to."""
    free = trainable(old, props)
    leaves = [getattr(getattr(new, group), name) for group, name in free]
    finite = all_finite(leaves)
    verdict = jnp.where(finite, Ending.NONE, Ending.NOT_FINITE)
    if ("emissions", "cov") not in free:
        return verdict
    before, after = jnp.asarray(old.emissions.cov), jnp.asarray(new.emissions.cov)
    if after.ndim == 2:
        singular = ~_is_regular(after) & _is_regular(before)
        verdict = jnp.where(finite & singular, Ending.SINGULAR, verdict)
        before, after = jnp.diagonal(before), jnp.diagonal(after)
    # One that was zero before is as the user wants it.
    fell = (after <= limits.collapse) & (before > limits.collapse)
    return jnp.where(finite & jnp.any(fell), Ending.VARIANCE, verdict)


def _is_regular(cov: Array) -> Array:
    """Tell whether the correlations are regular, to rounding."""
    scale = jnp.sqrt(jnp.diagonal(cov))
    factor = jnp.linalg.cholesky(cov / (scale[:, None] * scale))
    level = 4 * len(cov) * jnp.finfo(cov.dtype).eps
    # False for NaN, which is what a matrix that is not positive definite gives.
    return jnp.all(jnp.square(jnp.diagonal(factor)) > level)


@jax.jit
def _limits(emissions: Array, cov: Array, floor: Array | None) -> Limits:
    """Say when the variance of an emission counts as zero.

    When it comes from the rounding of the observations. Of a channel that holds one value it goes
    to zero in any case, which is seen when it is small beside the one it began with.
    """
    if floor is not None:
        return Limits(jnp.zeros_like(floor), floor)
    eps = jnp.finfo(emissions.dtype).eps
    largest = jnp.max(jnp.where(jnp.isnan(emissions), 0.0, jnp.abs(emissions)), axis=(0, 1))
    rounding = jnp.square(8 * eps * largest)
    start = jnp.max(jnp.abs(cov).reshape((-1, cov.shape[-1])), axis=0)
    small = jnp.maximum(rounding, np.sqrt(eps) * start)
    return Limits(jnp.where(holds_one_value(emissions), small, rounding), None)


def holds_one_value(emissions: Array) -> Array:
    """Tell which channels are the same number wherever they are observed."""
    missing = jnp.isnan(emissions)
    highest = jnp.max(jnp.where(missing, -jnp.inf, emissions), axis=(0, 1))
    return highest == jnp.min(jnp.where(missing, jnp.inf, emissions), axis=(0, 1))


def _lift(params: ParamsLGSSM, floor: Array) -> ParamsLGSSM:
    r"""Give the emission covariance $R \succeq \mathrm{diag}(f)$ that fits best.

    The minimum of $\log|R| + \mathrm{tr}(R^{-1}S)$ under this constraint: with
    $\mathrm{diag}(f)^{-1/2} S\, \mathrm{diag}(f)^{-1/2} = V\Lambda V^\top$ it is
    $V\max(\Lambda, 1)V^\top$, scaled back.
    """
    cov = jnp.asarray(params.emissions.cov)
    if cov.ndim == 1:
        lifted = jnp.maximum(cov, floor)
    else:
        scale = jnp.sqrt(floor)
        values, vectors = jnp.linalg.eigh(cov / (scale[:, None] * scale))
        # What is missing is added, so that a covariance above the floor stays as it is.
        missing = jnp.maximum(1.0 - values, 0.0)
        added = jnp.matmul(vectors * missing, vectors.T, precision="highest")
        lifted = cov + 0.5 * (added + added.T) * (scale[:, None] * scale)
    return params._replace(emissions=params.emissions._replace(cov=lifted))
