"""Smoothing of a filtered sequence: Rauch-Tung-Striebel and Bryson-Frazier."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.costates import close_loop, encode_model, find_costates, loop_inputs
from elkax.gaussian.covariance import Covariance
from elkax.gaussian.factor import gram, psd_cholesky, symmetrize
from elkax.gaussian.kalman import FilterOutput
from elkax.gaussian.markov import GaussMarkov, Transition
from elkax.gaussian.model import Model, constant_part, dynamics_over_time, merge
from elkax.scan import Backend, Sequential, lanes, run
from elkax.scan.choice import runs_in_sequence, steps_fill_machine
from elkax.scan.fallback import where_sound
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes, transpose
from elkax.scan.layout import in_blocks


class Smoothed(NamedTuple):
    r"""Moments given all observations.

    Attributes:
        mean: $E[z_t \mid y]$ (T, D).
        cov: $\mathrm{Cov}[z_t \mid y]$ (T, D, D).
        lagged: $\mathrm{Cov}[z_t, z_{t+1} \mid y]$ (T - 1, D, D).
    """

    mean: Array
    cov: Array
    lagged: Array


def smooth(model: Model, filtered: FilterOutput, form: Any, backend: Backend | None) -> Smoothed:
    """Smooth a filtered sequence.

    By Rauch-Tung-Striebel where every predicted covariance is regular, otherwise (exact Q = 0 or
    P0 = 0, covariances of low rank) by Bryson-Frazier, which inverts no state covariance.

    Args:
        model: the model, covariances themselves, leading time axes.
        filtered: what the filter gave for it, covariances stored in `form`.
        form: how covariances are stored.
        backend: how to run the backward recurrence.

    Returns:
        Smoothed moments, covariances themselves.
    """
    if filtered.mean.shape[0] == 1:
        return bryson_frazier(model, filtered, form, backend)
    stored = encode_model(model, form)
    length, size = filtered.mean.shape
    by_costates = partial(bryson_frazier, model, filtered, form, backend)
    if steps_fill_machine(backend, length, size):
        found, regular = _in_one_pass(stored, filtered, form)
        return where_sound(regular, partial(_join, filtered, *found, form), by_costates)
    steps, regular = _gains(stored, filtered, form)
    by_gains = partial(_rauch_tung_striebel, steps, filtered, form, backend)
    return where_sound(regular, by_gains, by_costates)


def _decode(stored: Array, form: Any) -> Array:
    """Decode covariances with a leading time axis."""
    return stored if isinstance(form, Covariance) else from_lanes(form.decode(to_lanes(stored)))


def _turn_around(fixed: Model, x: tuple, form: Any) -> tuple[Transition, Array]:
    r"""Compute a backward transition.

    $G_t = P_{t|t}F_{t+1}^\top P_{t+1|t}^{-1}$, offset $G_t(m_{t+1|t+1} - m_{t+1|t})$ and
    $U_t = \mathrm{Cov}[z_t \mid z_{t+1}, y_{1:t}]$; see `Covariance.reverse`.

    Args:
        fixed: the constant part of the model.
        x: the model at t + 1, the covariance at t, the correction at t + 1.
        form: how covariances are stored.

    Returns:
        The transition, and whether the predicted covariance is regular.
    """
    after, cov, correction = x
    after = merge(fixed, after)
    gain, noise, regular = form.reverse(after.weights, cov, after.noise)
    shift = matvec(lanes.halves(gain)[0], correction)
    if after.valid is not None:
        eye = lanes.identity(gain.shape[0], gain.shape[2:], gain.dtype)
        gain = jnp.where(after.valid, gain, form.exact(eye))
        shift = jnp.where(after.valid, shift, 0.0)
        noise = jnp.where(after.valid, noise, 0.0)
        regular = regular | ~after.valid
    return Transition(gain, shift, noise), regular


def _steps_back(model: Model, filtered: FilterOutput) -> tuple:
    """Give what `_turn_around` takes for t = 0, ..., T - 2."""
    return _later_dynamics(model), filtered.cov[:-1], filtered.correction[1:]


def _later_dynamics(model: Model) -> Model:
    return jax.tree.map(lambda field: field[1:], dynamics_over_time(model))


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["size", "form"])
@dataclass(frozen=True)
class Backward(GaussMarkov):
    r"""The backward recurrence; the output also has $\mathrm{Cov}[z_t, z_{t+1}]$."""

    def step(
        self, state: tuple[Array, Array], x: Transition
    ) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        """Step back."""
        mean, cov = state
        mean = self.move(x, mean)
        lagged, cov = self.form.carry(x.weights, cov, x.cov)
        return (mean, cov), (mean, lanes.halves(cov)[0], transpose(lagged))


@partial(jax.tree_util.register_dataclass, data_fields=["fixed"], meta_fields=["size", "form"])
@dataclass(frozen=True)
class RauchTungStriebel(GaussMarkov):
    r"""The backward recurrence with transitions that are found in the step that uses them.

    One pass in place of three, where single steps keep the machine busy. The output of a step
    also has $\mathrm{Cov}[z_t, z_{t+1}]$, and whether the predicted covariance is regular.

    Args:
        fixed: the constant part of the model.
    """

    fixed: Model

    def step(self, state: tuple[Array, Array], x: tuple) -> tuple[tuple[Array, Array], tuple]:
        """Step back."""
        mean, stored = state
        after, cov, correction = x
        after = merge(self.fixed, after)
        gain, back, regular = self.form.smooth(after.weights, cov, after.noise, stored)
        gain, _ = lanes.halves(gain)
        lagged = lanes.inner(transpose(gain), self.form.decode(stored))
        moved = matvec(gain, lanes.add(mean, correction))
        if after.valid is not None:
            mean, moved = lanes.align(mean, 1, moved, 1)
            moved = jnp.where(after.valid, moved, mean)
            back = jnp.where(after.valid, back, stored)
            lagged = jnp.where(after.valid, lagged, self.form.decode(stored))
            regular = regular | ~after.valid
        return (moved, back), (moved, lanes.halves(back)[0], lagged, regular)

    def absorb(self, summary: Transition, x: tuple) -> Transition:
        """Lengthen a block."""
        return self.combine(summary, _turn_around(self.fixed, x, self.form)[0])


def _in_one_pass(
    model: Model, filtered: FilterOutput, form: Any
) -> tuple[tuple[Array, Array, Array], Array]:
    """Smooth step by step; returns what `_join` takes, and whether every step is regular."""
    recurrence = RauchTungStriebel(filtered.mean.shape[-1], form, constant_part(model))
    last = (jnp.zeros_like(filtered.mean[-1]), form.exact(filtered.cov[-1]))
    _, (delta, covs, lagged, regular) = run(
        recurrence, last, _steps_back(model, filtered), backend=Sequential(), reverse=True
    )
    return (delta, covs, lagged), regular


def _rauch_tung_striebel(
    steps: Transition, filtered: FilterOutput, form: Any, backend: Backend | None
) -> Smoothed:
    r"""Run the RTS recurrence on the deviations from the filtered means.

    With $\delta_t = E[z_t \mid y] - m_{t|t}$:
    $\delta_t = G_t(\delta_{t+1} + m_{t+1|t+1} - m_{t+1|t})$ and
    $P_t = G_tP_{t+1}G_t^\top + U_t$: no difference of covariances, and none of large means.
    """
    size = filtered.mean.shape[-1]
    last = (jnp.zeros_like(filtered.mean[-1]), form.exact(filtered.cov[-1]))
    _, (delta, covs, lagged) = run(
        Backward(size, form), last, steps, backend=backend, state_dim=size, reverse=True
    )
    return _join(filtered, delta, covs, lagged, form)


def _join(
    filtered: FilterOutput, deviations: Array, covs: Array, lagged: Array, form: Any
) -> Smoothed:
    """Add the last time, and the filtered means to the deviations from them."""
    delta = jnp.concatenate((deviations, jnp.zeros_like(deviations[:1])))
    covs = _decode(jnp.concatenate((covs, filtered.cov[-1:])), form)
    return Smoothed(filtered.mean + (filtered.low + delta), covs, lagged)


def _gains(model: Model, filtered: FilterOutput, form: Any) -> tuple[Transition, Array]:
    """Compute the backward transitions of all times at once, and where they are regular."""

    def gain(fixed: Model, x: tuple) -> tuple[tuple[Transition, Array], None]:
        return _turn_around(fixed, x, form), None

    xs = _steps_back(model, filtered)
    return in_blocks(gain, constant_part(model), xs, filtered.mean.shape[-1])[0]


@jax.custom_jvp
def downdate(factor: Array, cov: Array, matrix: Array) -> Array:
    r"""Compute $P - PMP = L(I - L^\top ML)L^\top$ for $P = LL^\top$, $0 \le L^\top ML \le I$.

    Values come from the factor, so that no variance is negative; the derivative,
    $dP - dP\,MP - PM\,dP - P\,dM\,P$, needs none of a factor, which has none where P is singular.

    Args:
        factor: $L$ (D, D, lanes).
        cov: $P$ (D, D, lanes).
        matrix: $M$ (D, D, lanes).
    """
    del cov
    inner = symmetrize(matmul(matmul(transpose(factor), matrix), factor))
    eye = lanes.identity(inner.shape[0], inner.shape[2:], inner.dtype)
    return gram(matmul(factor, psd_cholesky(eye - inner)))


@downdate.defjvp
def _downdate_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    _, cov, matrix = primals
    _, d_cov, d_matrix = tangents
    one_side = matmul(matmul(d_cov, matrix), cov)
    both_sides = matmul(matmul(cov, d_matrix), cov)
    change = d_cov - one_side - transpose(one_side) - both_sides
    return downdate(*primals), change


def bryson_frazier(
    model: Model, filtered: FilterOutput, form: Any, backend: Backend | None
) -> Smoothed:
    r"""Smooth from the costates.

    With $\Lambda = \Lambda_{t+1}$, $q = q_{t+1}$ and $N = F^\top\Lambda F$: mean
    $m_{t|t} + P_{t|t}F^\top q$, covariance $L(I - L^\top NL)L^\top$ with $P_{t|t} = LL^\top$, and
    $\mathrm{Cov}[z_t, z_{t+1}] = P_{t|t}F^\top(I - \Lambda P_{t+1|t})
    = P_{t|t}F^\top - P_{t|t}(NP_{t|t}F^\top + F^\top\Lambda Q)$.
    """
    length, size = filtered.mean.shape
    covs = _decode(filtered.cov, form)
    if length == 1:
        return Smoothed(filtered.mean, covs, jnp.zeros((0, size, size), covs.dtype))
    decoded = filtered._replace(cov=covs)
    if runs_in_sequence(backend, length, size):
        mean, cov, lagged = _back_in_one_pass(model, decoded, filtered.cov, form)
    else:
        mean, cov, lagged = _back_by_costates(model, decoded, filtered.cov, form, backend)
    mean = jnp.concatenate((mean, filtered.mean[-1:]))
    return Smoothed(mean, jnp.concatenate((cov, covs[-1:])), lagged)


def _back_in_one_pass(
    model: Model, filtered: FilterOutput, stored: Array, form: Any
) -> tuple[Array, Array, Array]:
    """Smooth step by step: means and covariances at t = 0, ..., T - 2, and lagged ones."""
    size = filtered.mean.shape[-1]
    recurrence = BrysonFrazier(size, Covariance(), form, constant_part(model))
    start = (jnp.zeros_like(filtered.mean[-1]), jnp.zeros_like(filtered.cov[-1]))
    noise = jnp.roll(model.noise, -1, axis=0) if model.noise.ndim == 3 else None
    own = (filtered.mean, filtered.low, stored, filtered.cov)
    xs = (loop_inputs(model, filtered), noise, own)
    _, moments = run(recurrence, start, xs, backend=Sequential(), reverse=True)
    return jax.tree.map(lambda leaf: leaf[:-1], moments)


def _back_by_costates(
    model: Model, filtered: FilterOutput, stored: Array, form: Any, backend: Backend | None
) -> tuple[Array, Array, Array]:
    """Find all costates, then smooth all times at once; returns as `_back_in_one_pass`."""
    costates = find_costates(model, filtered, backend)

    def moments(fixed: Model, x: tuple) -> tuple[tuple[Array, Array, Array], None]:
        after, own, costates = x
        after = merge(fixed, after)
        return _moments((after.weights, after.noise, after.valid), own, costates, form), None

    own = [part[:-1] for part in (filtered.mean, filtered.low, stored, filtered.cov)]
    xs = (_later_dynamics(model), own, (costates.vector[1:], costates.matrix[1:]))
    return in_blocks(moments, constant_part(model), xs, filtered.mean.shape[-1])[0]


def _only_where(flag: Array, leaf: Array, rank: int) -> Array:
    """Put zero where a flag (lanes) is False."""
    leaf, flag = lanes.align(leaf, rank, flag, 0)
    return jnp.where(flag, leaf, 0.0)


def _moments(
    after: tuple[Array, Array, Array | None],
    own: Sequence[Array],
    costates: tuple[Array, Array],
    form: Any,
) -> tuple[Array, Array, Array]:
    r"""Smooth one time; see `bryson_frazier`.

    Args:
        after: F, Q and whether there is a next time.
        own: filtered mean, what rounding left out of it, covariance as stored, and itself.
        costates: of the next time.
        form: how covariances are stored.

    Returns:
        Smoothed mean and covariance, $\mathrm{Cov}[z_t, z_{t+1}]$.
    """
    weights, noise, goes_on = after
    mean, low, stored, cov = own
    q, matrix = costates
    if goes_on is not None:
        q, matrix = _only_where(goes_on, q, 1), _only_where(goes_on, matrix, 2)
    factor = lanes.materialize(form.cholesky(stored))
    half = matmul(matrix, weights)
    back = matmul(transpose(weights), half)
    smoothed = downdate(factor, cov, back)
    cross = matmul(cov, transpose(weights))
    drop = lanes.add(lanes.product(back, cross), lanes.product(transpose(half), noise))
    lagged = lanes.subtract(cross, matmul(cov, lanes.materialize(drop)))
    if goes_on is not None:
        lagged = jnp.where(goes_on, lagged, smoothed)
    return lanes.add(mean, lanes.add(low, matvec(cross, q))), smoothed, lagged


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["fixed"],
    meta_fields=["size", "form", "filter_form"],
)
@dataclass(frozen=True)
class BrysonFrazier(GaussMarkov):
    r"""The costates, with steps that are found where they are used.

    One pass in place of three, where single steps run in sequence. The output of a step to t is
    what `_moments` gives for t, from the costates at t + 1. The form is that of $\Lambda$.

    Args:
        filter_form: how the filter stored covariances.
        fixed: the constant part of the model.
    """

    filter_form: Any
    fixed: Model

    def step(self, state: tuple[Array, Array], x: tuple) -> tuple[tuple[Array, Array], tuple]:
        """Step back."""
        loop, noise, own = x
        *_, weights, goes_on = loop
        weights = self.fixed.weights if weights is None else weights
        noise = self.fixed.noise if noise is None else noise
        moments = _moments((weights, noise, goes_on), own, state, self.filter_form)
        state, _ = super().step(state, close_loop(self.fixed, loop))
        return state, moments

    def absorb(self, summary: Transition, x: tuple) -> Transition:
        """Lengthen a block."""
        return self.combine(summary, close_loop(self.fixed, x[0]))
