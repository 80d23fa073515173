"""The log-likelihood and its derivative, the score."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.costates import before, continues, filter_model, find_costates, next_weights
from elkax.gaussian.covariance import Covariance
from elkax.gaussian.decorrelation import uncorrelate
from elkax.gaussian.kalman import FilterOutput, KalmanFilter, log_density
from elkax.gaussian.model import Model, constant_part, merge, over_time
from elkax.gaussian.sharing import share_mask
from elkax.scan import Backend
from elkax.scan.choice import steps_fill_machine
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes, transpose
from elkax.scan.layout import in_blocks


def with_derivative_of(
    plain: Callable[[Model], Any], function: Callable[[Model], Any], model: Model
) -> Any:
    """Evaluate `function(model)`, to be differentiated as `plain(model)`.

    Both are equal up to rounding, but the derivative of a QR or Cholesky factor, or of a solve
    with a covariance, does not exist where that covariance is singular; that of the moments does.
    """

    @jax.custom_jvp
    def value(model: Model) -> Any:
        return function(model)

    @value.defjvp
    def _jvp(primals: tuple[Model], tangents: tuple[Model]) -> tuple[Any, Any]:
        return value(*primals), jax.jvp(plain, primals, tangents)[1]

    return value(model)


def filter_moments(model: Model, form: Any, backend: Backend | None) -> FilterOutput:
    """Run the Kalman filter and decode its covariances; arguments as `filter_model`."""
    model = uncorrelate(model)

    def in_covariances(model: Model) -> FilterOutput:
        return filter_model(model, Covariance(), backend)

    def in_form(model: Model) -> FilterOutput:
        filtered = filter_model(model, form, backend)
        return filtered._replace(cov=from_lanes(form.decode(to_lanes(filtered.cov))))

    if isinstance(form, Covariance):
        return in_covariances(model)
    return with_derivative_of(in_covariances, in_form, model)


def log_likelihood(model: Model, form: Any, backend: Backend | None) -> Array:
    r"""Sum the innovation log-densities, with the score as derivative.

    The score needs one filter, one backward pass for the costates $(q_t, \Lambda_t)$, and the
    derivative of each step by itself, for all t at once:
    $\partial\ell/\partial\theta = \sum_t \partial(m_{t|t}, P_{t|t}, \ell_t)/\partial\theta \cdot
    (F^\top q_{t+1}, \tfrac12 F^\top(q_{t+1}q_{t+1}^\top - \Lambda_{t+1})F, 1)$. No factorisation
    is differentiated, so it is finite at Q = 0 and P0 = 0; it can be differentiated again. Where
    single steps keep the machine busy, the filter in covariance form is differentiated step by step
    instead, which is the same recursion in one pass.

    Args:
        model: covariances themselves.
        form: how covariances are stored while filtering.
        backend: how to run the recurrences.

    Returns:
        $\log p(y_{1:T})$ of the observed entries.

    References:
        Koopman & Shephard (1992), Biometrika 79(4); Durbin & Koopman (2012), Sec. 7.3.3.
    """

    def density(model: Model) -> Array:
        return jnp.sum(log_density(filter_model(uncorrelate(model), form, backend)))

    if steps_fill_machine(backend, len(model.values), len(model.initial_mean)):
        # Its derivative is that of the covariance form.
        return share_mask(lambda m: jnp.sum(log_density(filter_moments(m, form, backend))), model)

    def density_and_score(model: Model) -> tuple[Array, Model]:
        model = uncorrelate(model)
        filtered = filter_moments(model, form, backend)
        return jnp.sum(log_density(filtered)), _score(model, filtered, backend)

    @jax.custom_jvp
    def value(model: Model) -> Array:
        return share_mask(density, model)

    @value.defjvp
    def _jvp(primals: tuple[Model], tangents: tuple[Model]) -> tuple[Array, Array]:
        value, gradient = share_mask(density_and_score, *primals)
        _, change = jax.jvp(uncorrelate, primals, tangents)
        terms = [
            jnp.sum(g * d)
            for g, d in zip(gradient, change, strict=True)
            if g is not None and d is not None and d.dtype == g.dtype
        ]
        return value, jnp.sum(jnp.stack(terms))

    return value(model)


def _score(model: Model, filtered: FilterOutput, backend: Backend | None) -> Model:
    """Differentiate the log-likelihood; None for fields that are not real numbers."""
    costates = find_costates(model, filtered, backend)
    fixed = constant_part(model)

    def pull(fixed: Model, x: tuple) -> tuple[list[Array], list[Array]]:
        own, state, following, goes_on, q, matrix = x
        constants, restore = _real_fields(fixed)
        varying, restore_varying = _real_fields(own)

        def one_step(constants: list[Array], varying: list[Array]) -> tuple[Array, Array, Array]:
            kalman = KalmanFilter(restore(constants), Covariance())
            _, output = kalman.step(state, restore_varying(varying))
            return output.mean, output.cov, log_density(output, axis=0)

        back = transpose(fixed.weights if following is None else following)
        curvature = matmul(matmul(back, 0.5 * (q[:, None] * q[None] - matrix)), transpose(back))
        costate = (matvec(back, q), curvature)
        if goes_on is not None:
            costate = jax.tree.map(lambda leaf: jnp.where(goes_on, leaf, 0.0), costate)
        values, transposed = jax.vjp(one_step, constants, varying)
        totals, outputs = transposed((*costate, jnp.ones_like(values[-1])))
        return outputs, totals

    def shifted(leaf: Array) -> Array:
        return jnp.concatenate((leaf[1:], jnp.zeros_like(leaf[:1])))

    varying = over_time(lambda field, rank: field, model)
    later = jax.tree.map(shifted, costates)
    xs = (varying, before(filtered), next_weights(model), continues(model), *later)
    outputs, totals = in_blocks(pull, fixed, xs, filtered.mean.shape[-1])
    _, restore = _real_fields(fixed)
    _, restore_varying = _real_fields(varying)
    nothing = Model(*([None] * len(model)))
    return merge(restore(totals, nothing), restore_varying(outputs, nothing))


def _real_fields(model: Model) -> tuple[list[Array], Callable[..., Model]]:
    """Take out the fields of real numbers, and give what puts others in their place."""
    real = [f is not None and jnp.issubdtype(f.dtype, jnp.floating) for f in model]

    def restore(fields: list[Array], rest: Model = model) -> Model:
        given = iter(fields)
        return Model(*(next(given) if r else f for r, f in zip(real, rest, strict=True)))

    fields: list[Any] = [f for f, r in zip(model, real, strict=True) if r]
    return fields, restore
