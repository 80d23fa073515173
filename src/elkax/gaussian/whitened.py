"""Smoothing from factor to factor, by rotations alone."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.costates import continues, encode_model, next_weights
from elkax.gaussian.factor import gram, tria_change
from elkax.gaussian.kalman import FilterOutput, find_precision, fold_rows
from elkax.gaussian.markov import GaussMarkov, Transition
from elkax.gaussian.model import Model, constant_part
from elkax.gaussian.square_root import beside, shrink_columns
from elkax.scan import Backend, lanes, run
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes, transpose


class After(NamedTuple):
    """What a step back to t takes: the model at t + 1, and what the filter found.

    Attributes:
        weights: $F_{t+1}$, None if it is constant.
        noise: factor of $Q_{t+1}$, None if it is constant.
        rows: $H_{t+1}$, None if they are constant.
        variances: $r_{t+1}$, None if they are constant.
        update: residuals and precisions at t + 1.
        goes_on: whether there is a time t + 1, None if there always is.
        filtered: mean, what rounding left out of it, and factor at t.
    """

    weights: Array | None
    noise: Array | None
    rows: Array | None
    variances: Array | None
    update: tuple[Array, Array]
    goes_on: Array | None
    filtered: tuple[Array, Array, Array]


@partial(jax.tree_util.register_dataclass, data_fields=["fixed"], meta_fields=["size", "form"])
@dataclass(frozen=True)
class Whitened(GaussMarkov):
    r"""The smoother in the coordinates $z_t = m_{t|t} + L_{t|t}x_t$, $x_t \sim N(0, I)$.

    A prediction turns the noise of both, $[F L_{t|t}, L_Q]\Theta = [L_+, 0]$ with an orthogonal
    $\Theta$, so that $x_t = \Theta_{11}w + \Theta_{12}v$ where $z_{t+1} = m_+ + L_+w$ and v is
    independent of all that comes later. A measurement gives $w = a + \Gamma x_{t+1}$, see
    `shrink_columns`. So $x_t = \Theta_{11}(a + \Gamma x_{t+1}) + \Theta_{12}v$: no weight is
    larger than one, nothing is solved with, and $L_+$ may be singular.

    The output is the smoothed mean and covariance, and $\mathrm{Cov}[z_t, z_{t+1}]$.

    Args:
        fixed: the constant part of the model, its covariances as factors.
    """

    fixed: Model

    def step(self, state: tuple[Array, Array], x: After) -> tuple[tuple[Array, Array], tuple]:
        """Step back."""
        transition, later = self._turn(x)
        after = state[1]
        state = self.apply(transition, state)
        mean, low, factor = x.filtered
        weights, coordinates = lanes.halves(transition.weights)[0], lanes.halves(state[1])[0]
        spread = matmul(factor, coordinates)
        moved = matmul(factor, matmul(weights, lanes.halves(after)[0]))
        lagged = matmul(moved, transpose(matmul(later, lanes.halves(after)[0])))
        mean = lanes.add(mean, lanes.add(low, matvec(factor, state[0])))
        return state, (mean, gram(spread), lagged)

    def absorb(self, summary: Transition, x: After) -> Transition:
        """Lengthen a block."""
        return self.combine(summary, self._turn(x)[0])

    def _turn(self, x: After) -> tuple[Transition, Array]:
        r"""Compute the step of the coordinates, and $L_{t+1|t+1}$."""
        fixed, (residuals, precisions) = self.fixed, x.update
        weights = fixed.weights if x.weights is None else x.weights
        noise = fixed.noise if x.noise is None else x.noise
        rows = fixed.rows if x.rows is None else x.rows
        variances = fixed.variances if x.variances is None else x.variances
        factor, size = x.filtered[2], self.size
        kept, moved = lanes.advance_apart(weights, factor)
        change, turned = tria_change(kept, beside(lanes.materialize(moved), noise), turned=True)
        kept, change = lanes.align(kept, 2, change, 2)
        predicted = lanes.materialize(kept + change)
        eye = lanes.identity(size, predicted.shape[2:], factor.dtype)

        # All that is near the identity is found as what differs from it, in its own digits.
        def update(carry: tuple, entry: tuple) -> tuple[tuple, None]:
            later, gamma, shift = carry
            h, variance, v, weight = entry
            f = lanes.materialize(matvec(transpose(later), h), 1)
            f = lanes.scale(f, weight != 0)
            told = lanes.scale(lanes.add(f, matvec(gamma, f)), weight)
            keep, kept, change = shrink_columns(
                jnp.concatenate((later, eye + gamma)), f, variance
            )
            gamma = keep[None] * gamma + change[size:] + (keep - 1.0)[None] * eye
            later = kept[:size] + change[:size]
            return (later, gamma, lanes.add(shift, lanes.scale(told, v))), None

        own = ((rows, 2), (variances, 1), (precisions, 1))
        predicted = lanes.give_lanes(predicted, 2, *own)
        eye = lanes.give_lanes(eye, 2, (predicted, 2))
        shift = lanes.give_lanes(jnp.zeros_like(predicted[:, 0]), 1, (residuals, 1))
        start = (predicted, jnp.zeros_like(predicted), shift)
        entries = (rows, variances, residuals, precisions)
        (later, gamma, shift), _ = fold_rows(update, start, entries)
        turn, rest = turned[:, :size], turned[:, size:]
        both = lanes.add_matrix(turn, lanes.add_matrix(gamma, lanes.product(turn, gamma)))
        shift = lanes.add(shift, matvec(turn, shift))
        if x.goes_on is not None:
            go, both = lanes.align(x.goes_on, 0, both, 2)
            both, rest = jnp.where(go, both, 0.0), jnp.where(go, rest, 0.0)
            later = jnp.where(go, later, factor)
            go, shift = lanes.align(x.goes_on, 0, shift, 1)
            shift = jnp.where(go, shift, 0.0)
        both = lanes.materialize(both)
        weights = lanes.add_identity(jnp.ones((size, *both.shape[2:]), both.dtype), both)
        if not lanes.is_short(both.dtype):
            weights, _ = lanes.halves(weights)
        return Transition(weights, shift, rest), later


def smooth_by_factors(
    model: Model, filtered: FilterOutput, form: Any, backend: Backend | None
) -> tuple[Array, Array, Array]:
    """Compute smoothed means, covariances and, for t = 0, ..., T - 2, lag-one covariances.

    Args:
        model: the model, covariances themselves.
        filtered: the filter's output, with factors of the covariances.
        form: `SquareRoot`.
        backend: how to run the backward recurrence.
    """
    stored, size = encode_model(model, form), filtered.mean.shape[-1]
    precision = from_lanes(
        find_precision(to_lanes(filtered.observed), to_lanes(filtered.variance))
    )

    def later(leaf: Array) -> Array:
        return jnp.roll(leaf, -1, axis=0)

    def varying(field: Array, rank: int) -> Array | None:
        return later(field) if field.ndim > rank else None

    # The last entry is the end: it goes nowhere, which keeps the lengths of all inputs the same.
    end = jnp.arange(len(precision)) < len(precision) - 1
    on = continues(model)
    xs = After(
        next_weights(stored),
        varying(stored.noise, 2),
        varying(stored.rows, 2),
        varying(jnp.asarray(stored.variances), 1),
        (later(filtered.residual), later(precision)),
        end if on is None else end & on,
        (filtered.mean, filtered.low, filtered.cov),
    )
    eye = jnp.eye(size, dtype=filtered.mean.dtype)
    start = (jnp.zeros_like(filtered.mean[-1]), form.exact(eye))
    recurrence = Whitened(size, form, constant_part(stored))
    _, (mean, cov, lagged) = run(
        recurrence, start, xs, backend=backend, state_dim=size, reverse=True
    )
    return mean, cov, lagged[:-1]
