"""Smoothing of a filtered sequence: Rauch-Tung-Striebel and Bryson-Frazier."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.covariance import Covariance
from elkax.gaussian.factor import cho_solve, gram, is_regular, psd_cholesky, symmetrize
from elkax.gaussian.kalman import FilterOutput, KalmanFilter, Model, constant_part, over_time
from elkax.gaussian.markov import GaussMarkov, Transition
from elkax.scan import Backend, lanes, run
from elkax.scan.fallback import where_sound
from elkax.scan.lanes import from_lanes, matmul, matvec, to_lanes, transpose


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


def steps_in_lanes(model: Model) -> Model:
    """Lay the time-varying fields of a model out in lanes and keep the others."""
    varying = over_time(lambda field, rank: to_lanes(field), model)
    return Model(*(f if v is None else v for f, v in zip(model, varying, strict=True)))


def _later(model: Model) -> Model:
    """Give the steps into t = 1, ..., T - 1, in lanes."""
    varying = over_time(lambda field, rank: to_lanes(field[1:]), model)
    return Model(*(f if v is None else v for f, v in zip(model, varying, strict=True)))


def _earlier(filtered: FilterOutput) -> tuple[Array, Array]:
    """Give the filtered moments at t = 0, ..., T - 2, in lanes."""
    return to_lanes(filtered.mean[:-1]), to_lanes(filtered.cov[:-1])


def smooth(
    model: Model, filtered: FilterOutput, form: Any, backend: Backend | None
) -> Smoothed:
    """Smooth a filtered sequence.

    By Rauch-Tung-Striebel where every predicted covariance is regular, otherwise (exact Q = 0 or
    P0 = 0, covariances of low rank) by Bryson-Frazier, which inverts no state covariance.

    Args:
        model: the model, covariances stored in `form`, leading time axes.
        filtered: what the filter gave for it.
        form: how covariances are stored.
        backend: how to run the backward recurrence.

    Returns:
        Smoothed moments; covariances decoded.
    """
    size = filtered.mean.shape[-1]
    if filtered.mean.shape[0] == 1:
        empty = jnp.zeros((0, size, size), filtered.mean.dtype)
        cov = jax.vmap(form.decode)(filtered.cov)
        return Smoothed(filtered.mean, cov, empty)
    after = _later(model)
    _, cov = _earlier(filtered)
    noise = jnp.broadcast_to(
        lanes.align(after.noise, 2, cov, 2)[0], cov.shape
    )
    factor = form.cholesky(form.predict(after.weights, cov, noise))
    regular = is_regular(factor)
    if after.valid is not None:
        regular = regular | ~after.valid
    return where_sound(
        regular,
        lambda: _rauch_tung_striebel(after, filtered, factor, form, backend),
        lambda: _bryson_frazier(model, filtered, form, backend),
    )


def _rauch_tung_striebel(
    after: Model, filtered: FilterOutput, factor: Array, form: Any, backend: Backend | None
) -> Smoothed:
    r"""Run the RTS recurrence in Joseph form on the deviations from the filtered means.

    With $G_t = P_{t|t}F_{t+1}^\top P_{t+1|t}^{-1}$ and $\delta_t = E[z_t|y] - m_{t|t}$:
    $\delta_t = G_t(\delta_{t+1} + m_{t+1|t+1} - m_{t+1|t})$, and
    $P_t = G_tP_{t+1}G_t^\top + (I - G_tF_{t+1})P_{t|t}(I - G_tF_{t+1})^\top
    + G_tQ_{t+1}G_t^\top$: no difference of covariances. All gains are found before the scan.
    """
    size = filtered.mean.shape[-1]
    _, cov = _earlier(filtered)
    decoded = form.decode(cov)
    gain = transpose(cho_solve(factor, matmul(after.weights, decoded)))
    eye = jnp.eye(size, dtype=gain.dtype).reshape((size, size, 1))
    rest = eye - matmul(gain, after.weights)
    own = form.predict(rest, cov, jnp.zeros_like(cov))
    noise = form.predict(gain, after.noise, own)
    shift = matvec(gain, to_lanes(filtered.correction[1:]))
    if after.valid is not None:
        gain = jnp.where(after.valid, gain, eye)
        shift = jnp.where(after.valid, shift, 0.0)
        noise = jnp.where(after.valid, noise, 0.0)
    xs = jax.tree.map(from_lanes, Transition(gain, shift, noise))
    last = (jnp.zeros_like(filtered.mean[-1]), filtered.cov[-1])
    _, (delta, covs) = run(
        GaussMarkov(size, form), last, xs, backend=backend, state_dim=size, reverse=True
    )
    mean = filtered.mean + jnp.concatenate((delta, last[0][None]))
    covs = form.decode(to_lanes(jnp.concatenate((covs, filtered.cov[-1:]))))
    lagged = matmul(gain, covs[..., 1:])
    return Smoothed(mean, from_lanes(covs), from_lanes(lagged))


def _bryson_frazier(
    model: Model, filtered: FilterOutput, form: Any, backend: Backend | None
) -> Smoothed:
    r"""Smooth from the costates.

    With $\Lambda = \Lambda_{t+1}$ and $q = q_{t+1}$: mean $m_{t|t} + P_{t|t}F^\top q$, covariance
    $L(I - L^\top F^\top\Lambda FL)L^\top$ with $P_{t|t} = LL^\top$, and
    $\mathrm{Cov}[z_t, z_{t+1}] = P_{t|t}F^\top(I - \Lambda P_{t+1|t})$.
    """
    size = filtered.mean.shape[-1]
    decoded = filtered._replace(cov=from_lanes(form.decode(to_lanes(filtered.cov))))
    plain = _decode_model(model, form)
    costates = find_costates(plain, decoded, backend)
    after = _later(plain)
    mean, cov = _earlier(decoded)
    q, matrix = to_lanes(costates.vector[1:]), to_lanes(costates.matrix[1:])
    weights = after.weights
    if after.valid is not None:
        q = jnp.where(after.valid, q, 0.0)
        matrix = jnp.where(after.valid, matrix, 0.0)
    factor = form.cholesky(_earlier(filtered)[1])
    through = matmul(weights, factor)
    inner = symmetrize(matmul(matmul(transpose(through), matrix), through))
    eye = jnp.eye(size, dtype=inner.dtype).reshape((size, size, 1))
    smoothed_cov = gram(matmul(factor, psd_cholesky(eye - inner)))
    smoothed_mean = mean + matvec(matmul(cov, transpose(weights)), q)
    predicted = Covariance().predict(weights, cov, after.noise)
    lagged = matmul(matmul(cov, transpose(weights)), eye - matmul(matrix, predicted))
    if after.valid is not None:
        lagged = jnp.where(after.valid, lagged, smoothed_cov)
    return Smoothed(
        jnp.concatenate((from_lanes(smoothed_mean), filtered.mean[-1:])),
        jnp.concatenate((from_lanes(smoothed_cov), decoded.cov[-1:])),
        from_lanes(lagged),
    )


def _decode_model(model: Model, form: Any) -> Model:
    """Give the model with its covariances themselves."""
    decode = form.decode
    noise = model.noise
    return model._replace(
        initial_cov=decode(model.initial_cov),
        noise=decode(noise) if noise.ndim == 2 else from_lanes(decode(to_lanes(noise))),
    )


def find_costates(model: Model, filtered: FilterOutput, backend: Backend | None) -> Costates:
    r"""Run the Bryson-Frazier recurrence.

    With $W_t = I - K_tH_t$, $e_t = H_t^\top S_t^{-1}v_t$ and $B_t = H_t^\top S_t^{-1}H_t$:
    $q_t = e_t + W_t^\top F_{t+1}^\top q_{t+1}$,
    $\Lambda_t = B_t + W_t^\top F_{t+1}^\top\Lambda_{t+1}F_{t+1}W_t$. Only innovation covariances
    are inverted, entry by entry. $W, e, B$ are the summary of the update alone, for all t at
    once.

    Args:
        model: the model, covariances themselves.
        filtered: the filter's output, covariances themselves.
        backend: how to run the backward recurrence.

    Returns:
        Costates at t = 0, ..., T - 1.
    """
    length, size = filtered.mean.shape
    form = Covariance()
    kalman = KalmanFilter(constant_part(model), form)
    everything = steps_in_lanes(model)
    mean = to_lanes(filtered.mean - filtered.correction)
    weights = model.weights
    following = (
        jnp.concatenate((weights[1:], jnp.zeros_like(weights[:1])))
        if weights.ndim == 3
        else jnp.broadcast_to(weights, (length, size, size))
    )
    cov = to_lanes(_predicted_covariances(model, filtered))
    empty = kalman.identity((length,), mean.dtype)
    update = kalman.observe(empty._replace(b=mean, c=cov), everything)
    closed = matmul(to_lanes(following), update.a)
    vector, matrix, back = update.eta, update.j, transpose(closed)
    if model.valid is not None:
        keep = model.valid & jnp.append(model.valid[1:], False)
        vector = jnp.where(model.valid, vector, 0.0)
        matrix = jnp.where(model.valid, matrix, 0.0)
        back = jnp.where(keep, back, 0.0)
    xs = jax.tree.map(from_lanes, Transition(back, vector, matrix))
    start = (jnp.zeros(size, mean.dtype), jnp.zeros((size, size), mean.dtype))
    _, (q, information) = run(
        GaussMarkov(size, form), start, xs, backend=backend, state_dim=size, reverse=True
    )
    return Costates(q, information)


def _predicted_covariances(model: Model, filtered: FilterOutput) -> Array:
    r"""Recompute $P_{t|t-1}$ for all t at once, (T, D, D), from covariances themselves."""
    if filtered.mean.shape[0] == 1:
        return model.initial_cov[None]
    after = _later(model)
    _, cov = _earlier(filtered)
    predicted = from_lanes(Covariance().predict(after.weights, cov, after.noise))
    return jnp.concatenate((model.initial_cov[None], predicted))
