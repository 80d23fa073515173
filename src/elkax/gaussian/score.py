"""The log-likelihood and its derivative, the score."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.costates import before, continues, filter_model, find_costates, next_weights
from elkax.gaussian.covariance import Covariance
from elkax.gaussian.decorrelation import uncorrelate, uncorrelate_and_pull_back
from elkax.gaussian.kalman import (
    FilterOutput,
    KalmanFilter,
    find_precision,
    fold_rows,
    log_density,
)
from elkax.gaussian.model import RANKS, Model, constant_part, merge, over_time
from elkax.gaussian.sharing import share_mask
from elkax.scan import Backend, lanes
from elkax.scan.choice import steps_fill_machine
from elkax.scan.lanes import dot, from_lanes, matmul, matvec, to_lanes, transpose
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

    The score needs one filter, one backward pass for the costates $(q_t, \Lambda_t)$, and products
    of both, for all t at once; see `_score`. No factorisation is differentiated, so it is finite at
    Q = 0 and P0 = 0; it can be differentiated again. Where single steps keep the machine busy, the
    filter in covariance form is differentiated step by step instead, which is the same recursion in
    one pass.

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
        plain, pull_back = uncorrelate_and_pull_back(model)
        filtered = filter_moments(plain, form, backend)
        return jnp.sum(log_density(filtered)), pull_back(_score(plain, filtered, backend))

    @jax.custom_jvp
    def value(model: Model) -> Array:
        return share_mask(density, model)

    @value.defjvp
    def _jvp(primals: tuple[Model], tangents: tuple[Model]) -> tuple[Array, Array]:
        value, gradient = share_mask(density_and_score, *primals)
        terms = [
            jnp.sum(g * d)
            for g, d in zip(gradient, *tangents, strict=True)
            if g is not None and d is not None and d.dtype == g.dtype
        ]
        return value, jnp.sum(jnp.stack(terms))

    return value(model)


def _score(model: Model, filtered: FilterOutput, backend: Backend | None) -> Model:
    r"""Differentiate the log-likelihood; None for fields that are not real numbers.

    With the costates $q_t, \Lambda_t$ and the smoothed means $\hat z_t$,
    $\partial\ell/\partial c_t = q_t$, $\partial\ell/\partial Q_t = (q_tq_t^\top - \Lambda_t)/2$ and
    $\partial\ell/\partial F_t = q_t\hat z_{t-1}^\top - \Lambda_tF_tP_{t-1|t-1}$. Entry by entry,
    from the last to the first, with P before the entry, its gain k, innovation v of variance s,
    and the costates q, $\Lambda$ after it: $u = v/s - k^\top q$, $d = 1/s + k^\top\Lambda k$,
    $\partial\ell/\partial y = -u$, $\partial\ell/\partial r = (u^2 - d)/2$,
    $\partial\ell/\partial h = u\hat z_t - P(dh - \Lambda k)$; before the entry the costates are
    $q + uh$ and $(I - kh^\top)^\top\Lambda(I - kh^\top) + hh^\top/s$.

    What depends on covariances alone is kept apart until it has been summed over time: series that
    differ in their data alone have it in common.
    """
    costates = find_costates(model, filtered, backend)
    fixed, varying = constant_part(model), over_time(lambda field, rank: field, model)

    def derivatives(fixed: Model, x: tuple) -> tuple[dict, dict]:
        own, state, now, following, goes_on, (q, matrix), later = x
        own = merge(fixed, own)
        earlier, earlier_low, earlier_cov = state
        mean, low, cov, residual, variance = now
        back = transpose(fixed.weights if following is None else following)
        after = (matvec(back, later[0]), matmul(matmul(back, later[1]), transpose(back)))
        if goes_on is not None:
            after = jax.tree.map(lambda leaf: jnp.where(goes_on, leaf, 0.0), after)
        smoothed = lanes.add(mean, lanes.add(low, matvec(cov, after[0])))
        drawn = matvec(earlier_cov, matvec(transpose(own.weights), q))
        smoothed_earlier = lanes.add(earlier, lanes.add(earlier_low, drawn))
        predicted = KalmanFilter(fixed, Covariance()).predict_cov(own, earlier_cov)
        entries = (own.rows, residual, variance, own.observed)
        u, d, covariate = _entries(predicted, after, entries)
        square, half = 0.5 * q[:, None] * q[None], 0.5 * matrix
        start, step = own.first, 1.0 - own.first
        # Field: its derivative, and what is to be subtracted from it.
        parts = {
            "initial_mean": (start * q, None),
            "initial_cov": (start * square, start * half),
            "weights": (
                lanes.outer(q, smoothed_earlier),
                matmul(matrix, matmul(own.weights, earlier_cov)),
            ),
            "offset": (step * q, None),
            "noise": (step * square, step * half),
            "rows": (lanes.outer(u, smoothed), covariate),
            "variances": (0.5 * u * u, 0.5 * d),
            "values": (-u, None),
        }
        outputs = {
            name: part if rest is None else jnp.subtract(*lanes.align(part, rank, rest, rank))
            for name, rank, (part, rest) in zip(parts, RANKS, parts.values(), strict=False)
            if getattr(varying, name) is not None
        }
        return outputs, {name: parts[name] for name in parts if name not in outputs}

    def shifted(leaf: Array) -> Array:
        return jnp.concatenate((leaf[1:], jnp.zeros_like(leaf[:1])))

    now = (filtered.mean, filtered.low, filtered.cov, filtered.residual, filtered.variance)
    later = jax.tree.map(shifted, costates)
    own = varying._replace(variances=None, values=None)
    xs = (own, before(filtered), now, next_weights(model), continues(model), costates, later)
    outputs, totals = in_blocks(derivatives, fixed, xs, filtered.mean.shape[-1])
    sums = {name: a if b is None else a - b for name, (a, b) in totals.items()}
    return Model(*[None] * len(model))._replace(**outputs, **sums)


def _entries(
    predicted: Array, after: tuple[Array, Array], entries: tuple
) -> tuple[Array, Array, Array]:
    r"""Compute u, d and $P(dh - \Lambda k)$ of every entry; see `_score`."""
    rows, residual, variance, observed = entries
    precision = find_precision(observed, variance)

    def forward(cov: Array, entry: tuple) -> tuple[Array, tuple[Array, Array]]:
        h, weight = entry
        projection = matvec(cov, h)
        gain = lanes.scale(projection, weight)
        return lanes.subtract(cov, lanes.outer(gain, projection)), (gain, cov)

    def backward(carry: tuple, entry: tuple) -> tuple[tuple, tuple[Array, Array, Array]]:
        q, matrix = carry
        h, v, weight, gain, cov = entry
        along = lanes.materialize(matvec(matrix, gain), 1)
        v, weight = lanes.align(v, 0, weight, 0)
        u = v * weight - dot(gain, q)
        d = weight + dot(gain, along)
        rest = lanes.scale(h, d) - along
        moved = lanes.outer(h, rest) - lanes.outer(along, h)
        carry = lanes.add(q, lanes.scale(h, u)), matrix + moved
        return carry, (u, d, matvec(cov, rest))

    _, (gains, covs) = fold_rows(forward, predicted, (rows, precision))
    found = (rows, residual, precision, gains, covs)
    turned = jax.tree.map(lambda leaf: leaf[::-1], found)
    _, outputs = fold_rows(backward, after, turned)
    return jax.tree.map(lambda leaf: leaf[::-1], outputs)
