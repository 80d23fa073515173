"""The expected log-likelihood of EM from one dense Gaussian, to be maximised numerically."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from oracles import Model, dense, model_arrays


class Moments(NamedTuple):
    """Means and covariances of x_t = (z_{t-1}, z_t, y_t), given what was observed; first row: 0."""

    means: np.ndarray
    covariances: np.ndarray


def with_errors_as_states(p):
    """The same emissions without noise, the measurement errors being states: moments of both."""
    T, N, D = p.H.shape

    def diagonal(A, B):
        return np.block([[A, np.zeros((D, N))], [np.zeros((N, D)), B]])

    return Model(
        m0=np.concatenate([p.m0, np.zeros(N)]),
        P0=diagonal(p.P0, p.R[0]),
        F=np.stack([diagonal(F, np.zeros((N, N))) for F in p.F]),
        c=np.concatenate([p.c, np.zeros((T, N))], axis=1),
        Q=np.stack([diagonal(Q, R) for Q, R in zip(p.Q, p.R, strict=True)]),
        H=np.concatenate([p.H, np.broadcast_to(np.eye(N), (T, N, N))], axis=2),
        d=p.d,
        R=np.zeros_like(p.R),
    )


def joint_moments(params, emissions, inputs):
    """Moments of neighbouring states and emissions of one series."""
    T = len(emissions)
    p = model_arrays(params, T, inputs)
    N, D = p.H.shape[1:]
    posterior = dense(with_errors_as_states(p), np.asarray(emissions))
    size = D + N
    cov = posterior.joint_covariance.reshape(T, size, T, size)
    means, covariances = [], []
    for t in range(T):
        # From (z_{t-1}, e_{t-1}, z_t, e_t).
        pick = np.zeros((2 * D + N, 2 * size))
        if t:
            pick[:D, :D] = np.eye(D)
        pick[D : 2 * D, size : size + D] = np.eye(D)
        pick[2 * D :, size:] = np.concatenate([p.H[t], np.eye(N)], axis=1)
        s = max(t - 1, 0)
        both = cov[np.ix_([s, t], range(size), [s, t], range(size))].reshape(2 * size, 2 * size)
        mean = np.concatenate([posterior.smoothed_means[s], posterior.smoothed_means[t]])
        offset = np.concatenate([np.zeros(2 * D), p.d[t]])
        means.append(pick @ mean + offset)
        covariances.append(pick @ both @ pick.T)
    return Moments(np.array(means, float), np.array(covariances, float))


def objective(params, moments, inputs, free):
    """The expected log-likelihood of the free parameters as one vector.

    Covariances are those of a factor with the logarithm of its diagonal, variances logarithms.

    Returns:
        A function of the vector to value and gradient, and one from parameters to their vector.
    """
    names = [tuple(name.split(".")) for name in sorted(free)]
    _, unravel = ravel_pytree(_encode(params, names))

    def place(params):
        return np.asarray(ravel_pytree(_encode(params, names))[0])

    def evaluate(theta):
        here = params
        for (group, name), value in zip(names, unravel(jnp.asarray(theta)), strict=True):
            value = _from_log_factor(value) if name == "cov" else value
            here = here._replace(**{group: getattr(here, group)._replace(**{name: value})})
        value, gradient = VALUE_AND_GRADIENT(here, moments, inputs)
        # To the factors of covariances by the chain rule, outside of what is compiled.
        parts = []
        for (group, name), x in zip(names, unravel(jnp.asarray(theta)), strict=True):
            part = getattr(getattr(gradient, group), name)
            if name == "cov":
                part = jax.vjp(_from_log_factor, x)[1](part)[0]
            parts.append(part)
        return float(value), np.asarray(ravel_pytree(parts)[0])

    return evaluate, place


def _encode(params, names):
    values = [getattr(getattr(params, group), name) for group, name in names]
    pairs = zip(names, values, strict=True)
    return [_log_factor(value) if name == "cov" else value for (_, name), value in pairs]


def _expected(params, moments, inputs):
    """The expected log-likelihood of all series, without its constant."""
    T = inputs.shape[1]
    D = params.initial.mean.shape[0]
    R = params.emissions.cov
    N = R.shape[-1]
    R = jnp.diag(R) if R.ndim == 1 else R

    def over_time(x, rank):
        return x if x.ndim > rank else jnp.broadcast_to(x, (T, *x.shape))

    F, Q = over_time(params.dynamics.weights, 2), over_time(params.dynamics.cov, 2)
    H, R = over_time(params.emissions.weights, 2), over_time(R, 2)
    # A first step from anywhere to the initial state.
    F, Q = F.at[0].set(0.0), Q.at[0].set(params.initial.cov)

    def of_one(moments, u):
        c = (
            (params.dynamics.bias + u @ params.dynamics.input_weights.T)
            .at[0]
            .set(params.initial.mean)
        )
        d = params.emissions.bias + u @ params.emissions.input_weights.T

        def of_one_step(mean, cov, F, c, Q, H, d, R):
            step = jnp.concatenate([-F, jnp.eye(D), jnp.zeros((D, N))], axis=1)
            emission = jnp.concatenate([jnp.zeros((N, D)), -H, jnp.eye(N)], axis=1)
            return _gaussian(step @ mean - c, step @ cov @ step.T, Q) + _gaussian(
                emission @ mean - d, emission @ cov @ emission.T, R
            )

        return jnp.sum(jax.vmap(of_one_step)(*moments, F, c, Q, H, d, R))

    return jnp.sum(jax.vmap(of_one)(moments, inputs))


VALUE_AND_GRADIENT = jax.jit(jax.value_and_grad(_expected))


def _gaussian(mean, cov, noise):
    """E log N(r; 0, noise) without its constant."""
    second = cov + jnp.outer(mean, mean)
    return -0.5 * (jnp.linalg.slogdet(noise)[1] + jnp.trace(jnp.linalg.solve(noise, second)))


def _log_factor(cov):
    if cov.ndim == 1:
        return jnp.log(cov)
    L = jnp.linalg.cholesky(cov)
    return jnp.tril(L, -1) + jnp.diag(jnp.log(jnp.diagonal(L)))


def _from_log_factor(x):
    if x.ndim == 1:
        return jnp.exp(x)
    L = jnp.tril(x, -1) + jnp.diag(jnp.exp(jnp.diagonal(x)))
    return L @ L.T
