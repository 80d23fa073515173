"""Whether what is said to have converged is a minimum: Newton's method on the exact MAP cost.

From every trajectory that is said to have converged it goes on, dense, damped and in float64, until
nothing falls any further. No code of the package but the types of its parameters.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elkax import Status
from random_nonlinear import FAMILIES, batch, cost, smoother

FRACTIONS = 0.5 ** np.arange(0.0, 32.0, 2.0)


class End(NamedTuple):
    """Where Newton's method gets from a trajectory, and what was there at first.

    Attributes:
        fall: by how much the cost falls.
        distance: largest move of a state in its posterior deviations, those at the end.
        least: least eigenvalue of the Hessian at first, its diagonal scaled to one.
        rounding: what rounding the states once does to the cost.
        cost: at the end.
    """

    fall: float
    distance: float
    least: float
    rounding: float
    cost: float


@cache
def derivatives(name):
    """Cost, gradient and Hessian (T D, T D), which is block-tridiagonal: 3 D products give it."""
    value, (D, _, T) = cost(name), FAMILIES[name].shape
    time, entry = np.divmod(np.arange(T * D), D)
    colour = D * (time % 3) + entry
    near = np.abs(time[:, None] - time) <= 1
    probes = jnp.asarray(np.eye(3 * D)[:, colour])

    def flat(p, y, u, x):
        return value(p, y, u, x.reshape(T, D))

    def evaluate(p, y, u, x):
        slope = jax.grad(partial(flat, p, y, u))
        products = jax.vmap(lambda probe: jax.jvp(slope, (x,), (probe,))[1])(probes)
        return flat(p, y, u, x), slope(x), jnp.where(near, products[colour].T, 0.0)

    along = jax.vmap(flat, in_axes=(None, None, None, 0))
    return jax.jit(evaluate), jax.jit(along)


def newton(name, model, means, eps, steps=300):
    """Go on from a trajectory, along the eigenvectors of the Hessian, down where it curves down."""
    evaluate, along = derivatives(name)
    x = start = np.asarray(means, np.float64).ravel()
    first = None
    for _ in range(steps):
        J, g, H = (np.asarray(part) for part in evaluate(*model, x))
        values, vectors = np.linalg.eigh(H)
        size = np.maximum(np.abs(values), 1e-12 * np.max(np.abs(values)))
        step = -vectors @ (vectors.T @ g / size)
        expected = -0.5 * g @ step
        if first is None:
            first = J, H
        if expected <= 1e-15 * (1 + abs(J)):
            break
        falls = J - np.asarray(along(*model, x + FRACTIONS[:, None] * step))
        best = np.argmax(np.where(np.isfinite(falls), falls, -np.inf))
        if not falls[best] > 0:
            break
        x = x + FRACTIONS[best] * step
    J0, H0 = first
    scale = 1 / np.sqrt(np.abs(np.diagonal(H0)))
    ulp = eps * np.abs(start)
    return End(
        J0 - J,
        np.max(np.abs(x - start) / np.sqrt(vectors**2 @ (1 / size))),
        np.linalg.eigvalsh(H0 * scale[:, None] * scale)[0],
        0.5 * ulp @ np.abs(H0) @ ulp,
        J,
    )


def run(name, dtype, numbers):
    """Smooth models of a family in a dtype; the end of Newton's method for each that converged."""
    models = jax.tree.map(lambda leaf: leaf.astype(dtype), batch(name, numbers))
    means, info = smoother(name)(*models)
    assert means.dtype == dtype
    p, y, u = jax.tree.map(lambda leaf: leaf.astype(np.float64), models)
    ends = {}
    for i in np.flatnonzero(info.status == Status.CONVERGED):
        model = {key: leaf[i] for key, leaf in p.items()}, y[i], u
        ends[numbers[i]] = newton(name, model, means[i], np.finfo(dtype).eps)
    return means, info, ends


def wrong(end, size, eps):
    """Say what is wrong with a trajectory that is said to have converged, None if nothing is.

    A step of ten tolerances in every state, 16 roundings of every state, and what rounds in the
    sum of the cost, are allowed.
    """
    allowed = 0.5 * size * (10 * np.sqrt(eps)) ** 2 + 16**2 * end.rounding
    allowed += 1e-11 * (1 + abs(end.cost))
    if not end.fall <= allowed:
        return f"cost falls by {end.fall:.1e} to {end.cost:.6g}, allowed {allowed:.1e}"
    # Beyond what rounding makes of a singular Hessian.
    if not end.least > -max(1e-9, 16 * eps):
        return f"Hessian indefinite, least eigenvalue {end.least:.1e} of a unit diagonal"
    return None
