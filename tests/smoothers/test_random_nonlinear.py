"""Random nonlinear models by the plain call: nothing is called converged that is not a minimum.

From every trajectory that is said to have converged, Newton's method on the exact MAP cost, dense,
damped and in float64, goes on until nothing falls any further.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax import Status
from random_nonlinear import FAMILIES, batch, cost, smoother

# How many of fifty arrived where they say, in float32 and in float64, when this was written.
ARRIVE = {
    "counts": (32, 49),
    "tanh network": (32, 38),
    "kink": (30, 28),
    "relu network": (17, 13),
    "turn": (49, 50),
    "classes": (45, 42),
    "pendulum": (46, 41),
    "bearings": (34, 36),
    "growth": (45, 39),
    "oscillator": (49, 48),
}
DTYPES = {"float32": np.float32, "float64": np.float64}
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
    # Far above what rounding makes of a singular Hessian.
    if not end.least > -1e-9:
        return f"Hessian indefinite, least eigenvalue {end.least:.1e} of a unit diagonal"
    return None


def check(name, dtype, numbers, least=0):
    """No wrong CONVERGED, and at least so many that are right."""
    means, info, ends = run(name, DTYPES[dtype], numbers)
    eps = np.finfo(DTYPES[dtype]).eps
    found = {number: wrong(end, means[0].size, eps) for number, end in ends.items()}
    found = {number: word for number, word in found.items() if word is not None}
    iterations = np.asarray(info.iterations)
    print(f"{name}, {dtype}: {len(ends)} of {len(numbers)} in {np.median(iterations)} iterations")
    if found:
        lines = [
            f"{number}: {word}; {iterations[numbers.index(number)]} iterations"
            for number, word in found.items()
        ]
        pytest.fail("\n  ".join([f"{name}, {dtype}: wrong CONVERGED", *lines]), pytrace=False)
    assert len(ends) >= least, f"{name}, {dtype}: {len(ends)} arrive, {least} did"


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("counts", "float32"),
        ("kink", "float32"),
        ("bearings", "float32"),
        ("growth", "float64"),
        ("oscillator", "float64"),
    ],
)
def test_nothing_is_wrongly_called_converged(name, dtype):
    check(name, dtype, tuple(range(12)))


def test_what_is_not_a_minimum_is_found():
    """Beside a minimum, and at a saddle: a state seen by its square, and the mirror of that."""
    models = batch("oscillator", (0,))
    model = (
        {key: leaf[0] for key, leaf in models.numbers.items()},
        models.emissions[0],
        models.inputs,
    )
    eps, zero = np.finfo(np.float64).eps, np.zeros((60, 2))
    minimum = newton("oscillator", model, zero + 0.1, eps)
    assert "falls" in wrong(minimum, 120, eps)
    model[0]["m0"] = np.zeros(2)
    saddle = newton("oscillator", model, zero, eps)
    assert "indefinite" in wrong(saddle, 120, eps)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_wrongly_called_converged_in_a_thousand(name, dtype):
    check(name, dtype, tuple(range(50)), ARRIVE[name][list(DTYPES).index(dtype)])
