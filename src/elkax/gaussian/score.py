"""The log-likelihood and its derivative, the score."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.costates import Costates, continues, find_costates, next_weights, shift
from elkax.gaussian.covariance import Covariance
from elkax.gaussian.decorrelation import uncorrelate, uncorrelate_and_pull_back
from elkax.gaussian.effects import combine_columns, estimate, over_effects, proper_part
from elkax.gaussian.filtering import filter_model
from elkax.gaussian.kalman import fold_rows
from elkax.gaussian.model import RANKS, Model, constant_part, merge, over_time
from elkax.gaussian.output import FilterOutput, find_precision, log_density
from elkax.gaussian.sharing import share_mask
from elkax.scan import Backend, lanes
from elkax.scan.lanes import dot, from_lanes, matmul, matvec, product, to_lanes, transpose
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
    Q = 0 and P0 = 0; it can be differentiated again. With unknown effects it is the diffuse
    likelihood, see `estimate`, whose score is the expectation over the effects given the data.

    Args:
        model: covariances themselves.
        form: how covariances are stored while filtering; its gains make the score.
        backend: how to run the recurrences.

    Returns:
        $\log p(y_{1:T})$ of the observed entries.

    References:
        Koopman & Shephard (1992), Biometrika 79(4); Durbin & Koopman (2012), Sec. 7.3.3.
    """

    def density(model: Model) -> Array:
        plain = uncorrelate(model)
        if model.unknown is None:
            return jnp.sum(log_density(filter_model(plain, form, backend)))
        columns = over_effects(lambda m: filter_model(m, form, backend), plain)
        return estimate(plain, columns)[1]

    def filter_and_return(model: Model) -> tuple[FilterOutput, Costates]:
        filtered = filter_moments(model, form, backend)
        return filtered, find_costates(model, filtered, backend)

    def density_and_score(model: Model) -> tuple[Array, Model]:
        plain, pull_back = uncorrelate_and_pull_back(model)
        if model.unknown is None:
            filtered, costates = filter_and_return(plain)
            value = jnp.sum(log_density(filtered))
            means = (leaf[None] for leaf in _means(filtered, costates))
            columns = _Columns(*means, cov=None)
        else:
            every, both = over_effects(filter_and_return, plain)
            effect, value = estimate(plain, every)
            means = (combine_columns(leaf, effect) for leaf in _means(every, both))
            columns = _Columns(*means, cov=effect.cov)
            filtered, costates = jax.tree.map(lambda leaf: leaf[0], (every, both))
            plain = proper_part(plain)
        # Where the data contradict the model there is no slope.
        gradient = pull_back(_score(plain, filtered, costates, columns))
        gradient = jax.tree.map(lambda g: jnp.where(value == -jnp.inf, 0.0, g), gradient)
        return value, gradient

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


class _Columns(NamedTuple):
    r"""What is affine in unknown effects: at their estimate, and changes with each; leading axis.

    Attributes:
        mean: $m_{t|t}$ (1 + d, T, D).
        residual: $v_i$ (1 + d, T, N).
        vector: $q_t$ (1 + d, T, D).
        cov: of the effects given the data (d, d), None if there are none.
    """

    mean: Array
    residual: Array
    vector: Array
    cov: Array | None


def _means(filtered: FilterOutput, costates: Costates) -> tuple[Array, Array, Array]:
    return filtered.mean + filtered.low, filtered.residual, costates.vector


def _score(model: Model, filtered: FilterOutput, costates: Costates, columns: _Columns) -> Model:
    r"""Differentiate the log-likelihood; None for fields that are not real numbers.

    With the costates $q_t, \Lambda_t$ and the smoothed means $\hat z_t$,
    $\partial\ell/\partial c_t = q_t$, $\partial\ell/\partial Q_t = (q_tq_t^\top - \Lambda_t)/2$ and
    $\partial\ell/\partial F_t = q_t\hat z_{t-1}^\top - \Lambda_tF_tP_{t-1|t-1}$. Entry by entry,
    from the last to the first, with P before the entry, its gain k, innovation v of variance s,
    and the costates q, $\Lambda$ after it: $u = v/s - k^\top q$, $d = 1/s + k^\top\Lambda k$,
    $\partial\ell/\partial y = -u$, $\partial\ell/\partial r = (u^2 - d)/2$,
    $\partial\ell/\partial h = u\hat z_t - P(dh - \Lambda k)$.

    Where effects are unknown, q, u and $\hat z$ are affine in them, and products of two such are
    expectations: those of the estimates, and of the changes with the covariance of the effects.

    What depends on covariances alone is kept apart until it has been summed over time: series that
    differ in their data alone have it in common.
    """
    fixed, varying = constant_part(model), over_time(lambda field, rank: field, model)
    count = len(columns.mean)
    weighting = jnp.eye(count, dtype=columns.mean.dtype)
    if columns.cov is not None:
        weighting = weighting.at[1:, 1:].set(columns.cov)

    def derivatives(same: tuple[Model, Array], x: tuple) -> tuple[dict, dict]:
        fixed, weighting = same
        own, before, now, following, goes_on, (q, matrix), later = x
        own = merge(fixed, own)
        earlier, earlier_cov = before
        mean, cov, gains, residual, variance = now
        back = transpose(fixed.weights if following is None else following)
        after = (product(back, later[0]), matmul(matmul(back, later[1]), transpose(back)))
        if goes_on is not None:
            after = tuple(
                jnp.where(lanes.align(goes_on, 0, leaf, 2)[0], leaf, 0.0) for leaf in after
            )

        def expect(left: Array, right: Array) -> Array:
            """Add up products over the columns."""
            if count > 1:
                left = product(left, weighting)
            return product(left, transpose(right))

        smoothed = lanes.add_matrix(mean, product(cov, after[0]))
        drawn = product(earlier_cov, product(transpose(own.weights), q))
        smoothed_earlier = lanes.add_matrix(earlier, drawn)
        noise = lanes.blend(own.first, own.initial_cov, own.noise, 2)
        predicted = Covariance().predict(own.weights, earlier_cov, noise)
        precision = find_precision(own.observed, variance)
        entries = (own.rows, own.variances, residual, precision, gains)
        u, d, covariate = _entries(predicted, after, entries)
        square, half = 0.5 * expect(q, q), 0.5 * matrix
        start, step = own.first, 1.0 - own.first
        # Field: its derivative, and what is to be subtracted from it.
        parts = {
            "initial_mean": (start * q[:, 0], None),
            "initial_cov": (start * square, start * half),
            "weights": (
                expect(q, smoothed_earlier),
                matmul(matrix, matmul(own.weights, earlier_cov)),
            ),
            "offset": (step * q[:, 0], None),
            "noise": (step * square, step * half),
            "rows": (expect(u, smoothed), covariate),
            "variances": (0.5 * lanes.diagonal_of(expect(u, u)), 0.5 * d),
            "values": (-u[:, 0], None),
        }
        outputs = {
            name: part if rest is None else jnp.subtract(*lanes.align(part, rank, rest, rank))
            for name, rank, (part, rest) in zip(parts, RANKS, parts.values(), strict=False)
            if getattr(varying, name) is not None
        }
        return outputs, {name: parts[name] for name in parts if name not in outputs}

    def shifted(leaf: Array) -> Array:
        return jnp.concatenate((leaf[1:], jnp.zeros_like(leaf[:1])))

    mean, residual, q = (jnp.moveaxis(leaf, 0, -1) for leaf in columns[:3])
    own = varying._replace(values=None)
    now = (mean, filtered.cov, filtered.gain, residual, filtered.variance)
    before = (shift(mean), shift(filtered.cov))
    both = (q, costates.matrix)
    later = jax.tree.map(shifted, both)
    xs = (own, before, now, next_weights(model), continues(model), both, later)
    size = filtered.mean.shape[-1]
    outputs, totals = in_blocks(derivatives, (fixed, weighting), xs, size)
    sums = {name: a if b is None else a - b for name, (a, b) in totals.items()}
    return Model(*[None] * len(model))._replace(**outputs, **sums)


def _entries(
    predicted: Array, after: tuple[Array, Array], entries: tuple
) -> tuple[Array, Array, Array]:
    r"""Compute u, d and $P(dh - \Lambda k)$ of every entry; see `_score`."""
    rows, variances, residual, precision, gains = entries

    def forward(cov: Array, entry: tuple) -> tuple[Array, Array]:
        h, variance, gain = entry
        return Covariance().correct(cov, h, variance, gain), cov

    def backward(carry: tuple, entry: tuple) -> tuple[tuple, tuple[Array, Array, Array]]:
        q, matrix = carry
        h, v, weight, gain, cov = entry
        along = lanes.materialize(matvec(matrix, gain), 1)
        u = lanes.add(lanes.scale(v, weight), -matvec(transpose(q), gain))
        d = weight + dot(gain, along)
        rest = lanes.scale(h, d) - along
        carry = (
            lanes.add_matrix(q, lanes.outer(h, u)),
            Covariance().correct(matrix, gain, weight, h),
        )
        return carry, (u, d, matvec(cov, rest))

    predicted = lanes.give_lanes(predicted, 2, (rows, 2), (variances, 1), (gains, 2))
    _, covs = fold_rows(forward, predicted, (rows, variances, gains))
    found = (rows, residual, precision, gains, covs)
    q, matrix = after
    own = ((rows, 2), (gains, 2), (precision, 1))
    q = lanes.give_lanes(q, 2, (residual, 2), (matrix, 2), *own)
    after = (q, lanes.give_lanes(matrix, 2, *own))
    turned = jax.tree.map(lambda leaf: leaf[::-1], found)
    _, outputs = fold_rows(backward, after, turned)
    return jax.tree.map(lambda leaf: leaf[::-1], outputs)
