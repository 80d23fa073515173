"""Costates of a filtered sequence, by Bryson and Frazier's recurrence."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.covariance import Covariance
from elkax.gaussian.kalman import fold_rows
from elkax.gaussian.markov import GaussMarkov, Transition
from elkax.gaussian.model import Model, constant_part
from elkax.gaussian.output import FilterOutput, find_precision
from elkax.scan import Backend, lanes, run
from elkax.scan.lanes import dot, from_lanes, matmul, matvec, to_lanes, transpose


class Costates(NamedTuple):
    r"""Derivatives of the log-likelihood with respect to the predicted moments.

    $q_t = \partial\ell/\partial m_{t|t-1}$ and
    $\partial\ell/\partial P_{t|t-1} = \tfrac12(q_tq_t^\top - \Lambda_t)$.

    Attributes:
        vector: $q_t$ (T, D).
        matrix: $\Lambda_t$ (T, D, D), positive semi-definite.
    """

    vector: Array
    matrix: Array


def shift(leaf: Array) -> Array:
    """Give what stands at t - 1, zero at t = 0."""
    return jnp.concatenate((jnp.zeros_like(leaf[:1]), leaf[:-1]))


def next_weights(model: Model) -> Array | None:
    """Give $F_{t+1}$ for every t, None if F is constant; the last one meets a zero costate."""
    return jnp.roll(model.weights, -1, axis=0) if model.weights.ndim == 3 else None


def continues(model: Model) -> Array | None:
    """Tell for every t whether time t + 1 exists, None if there is no padding."""
    return None if model.valid is None else jnp.append(model.valid[1:], False)


class Entries(NamedTuple):
    r"""The scalar updates of one time step.

    Attributes:
        rows: $h_i$ (N, D).
        gains: $k_i$ (N, D).
        residuals: $v_i$ (N,).
        precisions: $1/s_i$ (N,), 0 where nothing was learned.
    """

    rows: Array
    gains: Array
    residuals: Array
    precisions: Array


class Reverse(NamedTuple):
    """What a step back from t + 1 to t takes; see `BrysonFrazier`.

    Attributes:
        rows: of the model at t, None if they are constant.
        update: gains, residuals and precisions at t.
        weights: $F_{t+1}$, None if it is constant.
        noise: $Q_{t+1}$, None if it is constant or no moments are wanted.
        goes_on: whether there is a time t + 1, None if there always is, or the costates are zero.
        filtered: mean, what rounding left out of it, and covariance at t; None if no moments are
            wanted.
    """

    rows: Array | None
    update: tuple[Array, Array, Array]
    weights: Array | None
    noise: Array | None
    goes_on: Array | None
    filtered: tuple[Array, Array, Array] | None


def reverse_inputs(model: Model, filtered: FilterOutput, *, moments: bool) -> Reverse:
    """Give what `BrysonFrazier` takes at t = 0, ..., T - 1; covariances themselves."""
    precision = from_lanes(find_precision(to_lanes(filtered.observed), to_lanes(filtered.variance)))
    noise = jnp.roll(model.noise, -1, axis=0) if model.noise.ndim == 3 and moments else None
    return Reverse(
        model.rows if model.rows.ndim == 3 else None,
        (filtered.gain, filtered.residual, precision),
        next_weights(model),
        noise,
        continues(model),
        (filtered.mean, filtered.low, filtered.cov) if moments else None,
    )


def go_back(entries: Entries, q: Array, matrix: Array) -> tuple[Array, Array]:
    r"""Carry costates back through the updates of one time, from the last entry to the first.

    $u = v/s - k^\top q$, $q + uh$ and
    $(I - kh^\top)^\top\Lambda(I - kh^\top) + hh^\top/s$.
    """

    def back(carry: tuple[Array, Array], entry: Entries) -> tuple[tuple[Array, Array], None]:
        q, matrix = carry
        h, k, v, weight = entry
        u = lanes.multiply_numbers(v, weight) - dot(k, q)
        return (lanes.add(q, lanes.scale(h, u)), Covariance().correct(matrix, k, weight, h)), None

    rows, gains, residuals, precisions = entries
    own = ((rows, 2), (gains, 2), (precisions, 1))
    q = lanes.give_lanes(q, 1, (residuals, 1), (matrix, 2), *own)
    matrix = lanes.give_lanes(matrix, 2, *own)
    turned = jax.tree.map(lambda leaf: leaf[::-1], entries)
    return fold_rows(back, (q, matrix), turned)[0]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["fixed"],
    meta_fields=["size", "form"],
)
@dataclass(frozen=True)
class BrysonFrazier(GaussMarkov):
    r"""The recurrence of the costates $(q_t, \Lambda_t)$ back in time, and the smoothed moments.

    With $W_t = I - K_tH_t$, $e_t = H_t^\top S_t^{-1}v_t$ and $B_t = H_t^\top S_t^{-1}H_t$:
    $q_t = e_t + W_t^\top F_{t+1}^\top q_{t+1}$,
    $\Lambda_t = B_t + W_t^\top F_{t+1}^\top\Lambda_{t+1}F_{t+1}W_t$. Only innovation variances
    are divided by, entry by entry, and none is that is zero: right at every rank.

    The output of a step is $(q_t, \Lambda_t)$ or, where filtered moments are given, the smoothed
    ones: with $N = F^\top\Lambda_{t+1}F$, mean $m_{t|t} + P_{t|t}F^\top q_{t+1}$, covariance
    $P_{t|t} - P_{t|t}NP_{t|t}$ and $\mathrm{Cov}[z_t, z_{t+1}] =
    P_{t|t}F^\top(I - \Lambda P_{t+1|t}) = P_{t|t}F^\top - P_{t|t}(NP_{t|t}F^\top +
    F^\top\Lambda Q)$. The form is that of $\Lambda$.

    Args:
        fixed: the constant part of the model.
    """

    fixed: Model

    def step(self, state: tuple[Array, Array], x: Reverse) -> tuple[tuple[Array, Array], tuple]:
        """Step back."""
        q, matrix = state
        weights = self.fixed.weights if x.weights is None else x.weights
        if x.goes_on is not None:
            q, matrix = _only_where(x.goes_on, q, 1), _only_where(x.goes_on, matrix, 2)
        half = lanes.materialize(lanes.product(matrix, weights))
        back = lanes.materialize(lanes.product(transpose(weights), half))
        after = matvec(transpose(weights), q)
        rows = self.fixed.rows if x.rows is None else x.rows
        state = go_back(Entries(rows, *x.update), after, back)
        if x.filtered is None:
            return state, state
        noise = self.fixed.noise if x.noise is None else x.noise
        mean, low, cov = x.filtered
        moved = lanes.materialize(lanes.product(back, cov))
        smoothed = Covariance().settle(lanes.subtract(cov, matmul(cov, moved)))
        cross = matmul(cov, transpose(weights))
        drop = lanes.add(lanes.product(back, cross), lanes.product(transpose(half), noise))
        lagged = lanes.subtract(cross, matmul(cov, lanes.materialize(drop)))
        if x.goes_on is not None:
            lagged, smoothed = lanes.align(lagged, 2, smoothed, 2)
            go, lagged = lanes.align(x.goes_on, 0, lagged, 2)
            lagged = jnp.where(go, lagged, smoothed)
        mean = lanes.add(mean, lanes.add(low, matvec(cov, after)))
        return state, (mean, smoothed, lagged)

    def absorb(self, summary: Transition, x: Reverse) -> Transition:
        """Lengthen a block."""
        return self.combine(summary, self._close(x))

    def _close(self, x: Reverse) -> Transition:
        r"""Compute the step: its weights are $W_t^\top F_{t+1}^\top$."""
        weights = self.fixed.weights if x.weights is None else x.weights
        rows = self.fixed.rows if x.rows is None else x.rows
        size, (gains, residuals, precisions) = self.size, x.update
        own = ((rows, 2), (gains, 2), (precisions, 1))
        kept = lanes.give_lanes(jnp.eye(size, dtype=weights.dtype), 2, *own)
        matrix = jnp.zeros_like(kept)
        vector = lanes.give_lanes(matrix[:, 0], 1, (residuals, 1))

        def update(carry: tuple, entry: Entries) -> tuple[tuple, None]:
            kept, vector, matrix = carry
            h, k, v, weight = entry
            through = lanes.materialize(matvec(transpose(kept), h), 1)
            scaled = lanes.scale(through, weight)
            carry = (
                kept - lanes.outer(k, through),
                lanes.add(vector, lanes.scale(scaled, v)),
                matrix + lanes.outer(scaled, through),
            )
            return carry, None

        entries = Entries(rows, *x.update)
        (kept, vector, matrix), _ = fold_rows(update, (kept, vector, matrix), entries)
        back = transpose(matmul(weights, kept))
        if x.goes_on is not None:
            back = _only_where(x.goes_on, back, 2)
        return Transition(back, vector, matrix)


def _only_where(flag: Array, leaf: Array, rank: int) -> Array:
    """Put zero where a flag (lanes) is False."""
    leaf, flag = lanes.align(leaf, rank, flag, 0)
    return jnp.where(flag, leaf, 0.0)


def _run_back(
    model: Model, filtered: FilterOutput, backend: Backend | None, *, moments: bool
) -> tuple:
    size = filtered.mean.shape[-1]
    start = (jnp.zeros_like(filtered.mean[-1]), jnp.zeros_like(filtered.cov[-1]))
    recurrence = BrysonFrazier(size, Covariance(), constant_part(model))
    xs = reverse_inputs(model, filtered, moments=moments)
    return run(recurrence, start, xs, backend=backend, state_dim=size, reverse=True)[1]


def find_costates(model: Model, filtered: FilterOutput, backend: Backend | None) -> Costates:
    """Run the Bryson-Frazier recurrence; see `BrysonFrazier`.

    Args:
        model: the model, covariances themselves.
        filtered: the filter's output; its gains, residuals and variances count.
        backend: how to run the backward recurrence.

    Returns:
        Costates at t = 0, ..., T - 1.
    """
    return Costates(*_run_back(model, filtered, backend, moments=False))


def smooth_by_costates(
    model: Model, filtered: FilterOutput, backend: Backend | None
) -> tuple[Array, Array, Array]:
    """Compute smoothed means, covariances and, for t = 0, ..., T - 2, lag-one covariances.

    Arguments as `find_costates`, covariances themselves.
    """
    mean, cov, lagged = _run_back(model, filtered, backend, moments=True)
    return mean, cov, lagged[:-1]
