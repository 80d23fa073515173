"""Random nonlinear models: ten functions whose parameters are arguments, smooth and with kinks.

Each function is one compiled program in a dtype, however many models it smooths. A model is its
family and its number: parameters and data come from NumPy with these as the seed, hard corners at
fixed numbers. A quarter of the models have gaps, another quarter of those with continuous
emissions have outliers that the model knows nothing of.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_probability.substrates.jax.distributions as tfd
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM

import elkax
from nonlinear_problems import map_cost, wrap


class Family(NamedTuple):
    """One function; a module of arrays, NumPy or its twin in JAX, comes first in what it calls.

    Attributes:
        shape: (D, N, T).
        emission: distribution of the emissions, by name.
        draw: (rng, number) to the numbers of a model, and emissions if they are not its own.
        dynamics: (module, numbers, z, u) to the mean of the next state.
        predict: (module, numbers, z) to what the distribution of the emissions is made from.
        residual: difference of emissions, None for the plain one.
    """

    shape: tuple[int, int, int]
    emission: str
    draw: Callable
    dynamics: Callable
    predict: Callable
    residual: Callable | None = None


class Batch(NamedTuple):
    """Models of a family, stacked: their numbers, emissions (B, T, N), inputs (T, 1)."""

    numbers: dict[str, Any]
    emissions: Any
    inputs: Any


def between(rng, low, high, size=()):
    """Draw uniformly on a logarithmic scale."""
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def product(xp, matrix, z):
    return xp.einsum("...ij,...j->...i", matrix, z)


def start(D, variance=1.0, mean=0.0):
    return {"m0": np.full(D, mean), "P0": variance * np.eye(D)}


# Counts, log-linear: every fifth has zeros and then counts rising to 8,000 or to 100,000.
def draw_counts(rng, number):
    p = {**start(1), "a": np.ones(1), "b": np.zeros(1), "c": np.zeros(1), "g": np.ones(1)}
    if number % 5 == 0:
        peak = (8e3, 1e5)[number // 5 % 2]
        rates = np.concatenate((np.full(60, 1e-3), np.geomspace(1.0, peak, 60)))
        return p | {"Q": np.full((1, 1), 0.04)}, rng.poisson(rates)[:, None].astype(float)
    p["a"], p["b"] = rng.uniform(0.8, 1.0, 1), rng.normal(0, 0.05, 1)
    p["c"], p["g"] = rng.uniform(-2, 5, 1), between(rng, 0.3, 2.0, 1)
    return p | {"Q": between(rng, 1e-3, 0.5) * np.eye(1)}, None


def line(xp, p, z, u):
    return p["a"] * z + p["b"]


def affine(xp, p, z):
    return p["c"] + p["g"] * z


# A network of four states with counts.
def draw_network(rng, number):
    gain = rng.uniform(0.5, 2.5)
    return start(4) | {
        "W": gain * rng.normal(size=(4, 4)) / 2,
        "k": (np.ones(1), rng.uniform(0.1, 1, 1))[number % 2],
        "b": rng.normal(0, 0.2, 4),
        "Q": between(rng, 1e-2, 1.0) * np.eye(4),
        "C": rng.normal(size=(5, 4)) * between(rng, 0.2, 1.5),
        "c": rng.uniform(-2, 2, 5),
    }, None


def network(xp, p, z, u):
    return (1 - p["k"]) * z + p["k"] * product(xp, p["W"], xp.tanh(z)) + p["b"]


def rows(xp, p, z):
    return p["c"] + product(xp, p["C"], z)


# A decay that ends at zero.
def draw_kink(rng, number):
    p = {"a": rng.uniform(0.5, 1.05, 1), "b": rng.uniform(-0.2, 0.1, 1)}
    if number == 0:
        p = {"a": np.full(1, 0.95), "b": np.full(1, -0.08)}
    noise = {"Q": between(rng, 1e-3, 1.0) * np.eye(1), "R": between(rng, 1e-3, 1.0) * np.eye(1)}
    emission = {"c": np.zeros(1), "g": between(rng, 0.3, 3.0, 1)}
    return start(1, mean=rng.uniform(0, 3)) | p | noise | emission, None


def kinked(xp, p, z, u):
    return xp.maximum(line(xp, p, z, u), 0.0)


# A network of rectified units, seen with outliers.
def draw_rectified(rng, number):
    W = rng.normal(size=(3, 3))
    return start(3) | {
        "W": rng.uniform(0.3, 1.05) * W / np.linalg.norm(W, 2),
        "b": rng.normal(0, 0.3, 3),
        "Q": between(rng, 1e-2, 1.0) * np.eye(3),
        "C": rng.normal(size=(2, 3)),
        "c": np.zeros(2),
        "scale": between(rng, 0.05, 1.0, 2),
        "df": rng.uniform(2, 8, 2),
    }, None


def rectified(xp, p, z, u):
    return product(xp, p["W"], xp.maximum(z, 0.0)) + p["b"]


# Turns in the plane that saturate, seen by what is yes or no.
def draw_turn(rng, number):
    angle, growth = rng.uniform(0, np.pi), rng.uniform(0.8, 1.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return start(2) | {
        "W": growth * turn,
        "s": between(rng, 1.0, 5.0, 1),
        "Q": between(rng, 1e-2, 1.0) * np.eye(2),
        "C": rng.normal(size=(3, 2)) * between(rng, 0.5, 4.0),
        "c": rng.normal(size=3),
    }, None


def saturating(xp, p, z, u):
    size = xp.sum(z * z, -1, keepdims=True) / (p["s"] * p["s"])
    return product(xp, p["W"], z) / xp.sqrt(1 + size)


# Four classes whose preferences oscillate.
def draw_classes(rng, number):
    return start(3) | {
        "W": rng.uniform(0.5, 1.5) * rng.normal(size=(3, 3)) / np.sqrt(3),
        "b": rng.normal(0, 0.2, 3),
        "Q": between(rng, 1e-2, 1.0) * np.eye(3),
        "C": rng.normal(size=(4, 3)) * between(rng, 0.5, 4.0),
        "c": rng.normal(size=4),
    }, None


def wave(xp, p, z, u):
    return product(xp, p["W"], xp.sin(z)) + p["b"]


def classes(xp, p, z):
    return rows(xp, p, z)[..., None, :]


# A pendulum, angle and speed, whose horizontal position is seen with outliers.
def draw_pendulum(rng, number):
    step = rng.uniform(0.02, 0.3)
    return start(2, 0.5, rng.normal()) | {
        "step": np.full(1, step),
        "force": rng.uniform(1, 10, 1),
        "Q": between(rng, 1e-3, 0.3) * step * np.diag([0.1, 1.0]),
        "scale": between(rng, 0.02, 0.5, 1),
        "df": rng.uniform(1, 6, 1),
    }, None


def pendulum(xp, p, z, u):
    angle, speed = z[..., :1], z[..., 1:]
    faster = speed - p["step"] * p["force"] * xp.sin(angle)
    return xp.concatenate((angle + p["step"] * speed, faster), -1)


def horizontal(xp, p, z):
    return xp.sin(z[..., :1])


# Bearings of what moves on nearly straight, from two places.
def draw_bearings(rng, number):
    step = 0.1
    noise = np.array([[step**3 / 3, step**2 / 2], [step**2 / 2, step]])
    m0 = np.concatenate((rng.uniform(-2, 2, 2), rng.normal(size=2)))
    return {
        "m0": m0,
        "P0": between(rng, 1e-2, 1.0) * np.eye(4),
        "W": np.eye(4) + step * np.eye(4, k=2),
        "b": np.zeros(4),
        "Q": between(rng, 1e-2, 3.0) * np.kron(noise, np.eye(2)),
        "R": between(rng, 1e-3, 0.5) ** 2 * np.eye(2),
        "place": rng.uniform(-2, 2, (2, 2)),
    }, None


def matrix(xp, p, z, u):
    return product(xp, p["W"], z) + p["b"]


def bearings(xp, p, z):
    place = p["place"]
    return xp.arctan2(z[..., 1:2] - place[..., 1], z[..., :1] - place[..., 0])


# The growth model.
def draw_growth(rng, number):
    variances = (10.0, 1.0) if number == 0 else between(rng, 0.1, 10.0, 2)
    return start(1, 5.0) | {
        "a": np.array([0.5 if number == 0 else rng.uniform(0.2, 0.9)]),
        "b": np.array([25.0 if number == 0 else rng.uniform(5, 25)]),
        "Q": variances[0] * np.eye(1),
        "R": variances[1] * np.eye(1),
    }, None


def growth(xp, p, z, u):
    return p["a"] * z + p["b"] * z / (1 + z * z) + u


def squared(xp, p, z):
    return z * z / 20


# The oscillator of van der Pol, its force bounded; seen without its sign, or nearly so.
def draw_oscillator(rng, number):
    return start(2, 1.0, rng.normal()) | {
        "step": rng.uniform(0.02, 0.2, 1),
        "force": rng.uniform(0, 3, 1),
        "Q": between(rng, 1e-4, 0.1) * np.eye(2),
        "R": between(rng, 1e-3, 1.0) * np.eye(1),
        "even": (np.ones(1), rng.uniform(0, 1, 1))[number % 2],
    }, None


def oscillator(xp, p, z, u):
    x, v = z[..., :1], z[..., 1:]
    faster = v + p["step"] * (p["force"] * (1 - x * x / (1 + x * x / 9)) * xp.tanh(v / 9) * 9 - x)
    return xp.concatenate((x + p["step"] * v, faster), -1)


def nearly_even(xp, p, z):
    x = z[..., :1]
    return p["even"] * x * x + (1 - p["even"]) * x


FAMILIES = {
    "counts": Family((1, 1, 120), "poisson", draw_counts, line, affine),
    "tanh network": Family((4, 5, 30), "poisson", draw_network, network, rows),
    "kink": Family((1, 1, 100), "gaussian", draw_kink, kinked, affine),
    "relu network": Family((3, 2, 40), "student", draw_rectified, rectified, rows),
    "turn": Family((2, 3, 50), "bernoulli", draw_turn, saturating, rows),
    "classes": Family((3, 1, 40), "categorical", draw_classes, wave, classes),
    "pendulum": Family((2, 1, 60), "student", draw_pendulum, pendulum, horizontal),
    "bearings": Family((4, 2, 30), "gaussian", draw_bearings, matrix, bearings, wrap),
    "growth": Family((1, 1, 100), "gaussian", draw_growth, growth, squared),
    "oscillator": Family((2, 1, 60), "gaussian", draw_oscillator, oscillator, nearly_even),
}
DISTRIBUTIONS = {
    "poisson": lambda p, x: tfd.Poisson(log_rate=x),
    "bernoulli": lambda p, x: tfd.Bernoulli(logits=x),
    "categorical": lambda p, x: tfd.Categorical(logits=x),
    "student": lambda p, x: tfd.StudentT(p["df"], x, p["scale"]),
}


def emit(rng, kind, p, x):
    """Draw emissions (T, N); outliers are twenty deviations away."""
    if kind == "poisson":
        return rng.poisson(np.exp(np.clip(x, None, np.log(1e5)))).astype(float)
    if kind == "bernoulli":
        return (rng.random(x.shape) < 1 / (1 + np.exp(-x))).astype(float)
    if kind == "categorical":
        return np.argmax(x + rng.gumbel(size=x.shape), -1).astype(float)
    scale = p["scale"] if kind == "student" else np.sqrt(np.diagonal(p["R"]))
    error = rng.standard_t(p["df"], x.shape) if kind == "student" else rng.normal(size=x.shape)
    outlier = (rng.random() < 0.25) * (rng.random(x.shape) < 0.05)
    return x + scale * (error + 20 * outlier * rng.choice([-1, 1], x.shape))


@cache
def batch(name, numbers):
    """The models of a family, of these numbers, in float64."""
    family = FAMILIES[name]
    D, _, T = family.shape
    growing = name == "growth"
    inputs = 8 * np.cos(1.2 * np.arange(T))[:, None] if growing else np.zeros((T, 1))
    rngs = [np.random.default_rng([list(FAMILIES).index(name), number]) for number in numbers]
    drawn = [family.draw(rng, number) for rng, number in zip(rngs, numbers, strict=True)]
    p = {key: np.stack([model[key] for model, _ in drawn]) for key in drawn[0][0]}
    noise = np.stack([rng.normal(size=(T, D)) for rng in rngs])
    z = [p["m0"] + product(np, np.linalg.cholesky(p["P0"]), noise[:, 0])]
    root = np.linalg.cholesky(p["Q"])
    for t in range(1, T):
        z.append(family.dynamics(np, p, z[-1], inputs[t]) + product(np, root, noise[:, t]))
    z, emissions = np.stack(z, 1), []
    for rng, (model, y), states in zip(rngs, drawn, z, strict=True):
        if y is None:
            y = emit(rng, family.emission, model, family.predict(np, model, states))
        y = y if family.residual is None else np.asarray(family.residual(y, 0.0))
        gaps = (rng.random() < 0.25) * (rng.random(y.shape) < 0.2)
        emissions.append(np.where(gaps, np.nan, y))
    return Batch(p, np.stack(emissions), inputs)


def make_params(name, p):
    """Parameters of one model."""
    family = FAMILIES[name]
    common = p["m0"], p["P0"], partial(family.dynamics, jnp, p), p["Q"]
    if family.emission == "gaussian":
        return ParamsNLGSSM(*common, lambda z, u: family.predict(jnp, p, z), p["R"])
    make = DISTRIBUTIONS[family.emission]
    return elkax.ParamsDistributionSSM(*common, lambda z, u: make(p, family.predict(jnp, p, z)))


@cache
def smoother(name):
    """The plain call for models of a family, stacked: trajectories and `Info`."""

    def smooth(p, emissions, inputs):
        params, residual = make_params(name, p), FAMILIES[name].residual
        solution = elkax.iterated_smoother(params, emissions, inputs, residual=residual)
        return solution.trajectory, solution.info

    return jax.jit(jax.vmap(smooth, in_axes=(0, 0, None)))


@cache
def cost(name):
    """The MAP cost of (numbers, emissions, inputs, trajectory (T, D))."""

    def value(p, emissions, inputs, z):
        residual = FAMILIES[name].residual or jnp.subtract
        return map_cost(make_params(name, p), emissions, inputs, residual)(z)

    return value
