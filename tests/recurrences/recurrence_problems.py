"""Recurrences with small parameters, and what `lax.scan` makes of them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import elkax

T = 60
INPUTS = 2
METHODS = {
    "Jacobi": elkax.Jacobi(),
    "Picard": elkax.Picard(),
    "quasi-DEER": elkax.QuasiDEER(),
    "DEER": elkax.DEER(),
    "quasi-ELK": elkax.QuasiELK(),
    "ELK": elkax.ELK(),
}


class Problem(NamedTuple):
    """A recurrence whose cell is a `Partial`: parameters are data, so that programs are shared."""

    cell: Any
    state: Any
    inputs: Any
    length: int = T

    def evaluate(self, **options):
        return elkax.evaluate_recurrence(
            self.cell, self.state, self.inputs, num_timesteps=self.length, **options
        )

    def scan(self, **options):
        return sequential(self.cell, self.state, self.inputs, length=self.length, **options)

    def residual(self, states):
        """Largest entries of |s_t - f(s_{t-1}, x_t)| and of the states up to t, (T,) each."""
        before = jax.tree.map(lambda s, all_: jnp.append(s[None], all_[:-1], 0), self.state, states)
        values = jax.jit(jax.vmap(self.cell))(before, self.inputs)
        gap = jax.tree.map(jnp.subtract, values, states)
        start = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(self.state))
        return sizes(gap), np.maximum(np.maximum.accumulate(sizes(values)), start)


@partial(jax.jit, static_argnames=("length", "reverse"))
def sequential(cell, state, inputs, *, length=None, reverse=False):
    def step(state, x):
        new = cell(state, x)
        return new, new

    return jax.lax.scan(step, state, inputs, length, reverse)[1]


def sizes(trajectory):
    """Largest absolute entry at every time, (T,)."""
    rows = [np.abs(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(trajectory)]
    return np.max(np.concatenate(rows, axis=1), axis=1)


def errors(states, exact):
    """Largest entry of the difference at every time, (T,)."""
    return sizes(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), states, exact))


def gru_step(u, w, b, state, x):
    r, z = jax.nn.sigmoid(u[:2] @ state + w[:2] @ x + b[:2])
    candidate = jnp.tanh(u[2] @ (r * state) + w[2] @ x + b[2])
    return (1 - z) * state + z * candidate


def lstm_step(u, w, b, state, x):
    h, c = state
    i, f, o, g = u @ h + w @ x + b
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def rnn_step(u, w, b, state, x):
    return jnp.tanh(u @ state + w @ x + b)


def autoregressive_step(weights, state, noise):
    """A GRU whose input is its last output, and the output a draw about what it predicts."""
    u, w, out, sd = weights
    hidden, output = state
    r, z, n = w * output
    ur, uz, un = u @ hidden
    r, z = jax.nn.sigmoid(r + ur), jax.nn.sigmoid(z + uz)
    hidden = (1 - z) * jnp.tanh(n + r * un) + z * hidden
    return hidden, out @ hidden + sd * noise


def lorenz96_rate(forcing, s):
    return (jnp.roll(s, -1) - jnp.roll(s, 2)) * jnp.roll(s, 1) - s + forcing


def lorenz96_step(forcing, state, x):
    """One step of Runge and Kutta's method, dt = 0.01."""
    dt, rate = 0.01, partial(lorenz96_rate, forcing)
    k1 = rate(state)
    k2 = rate(state + dt / 2 * k1)
    k3 = rate(state + dt / 2 * k2)
    k4 = rate(state + dt * k3)
    return state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def logistic_step(r, state, x):
    return r * state * (1 - state)


def pytree_step(params, state, x):
    """Leaves of several ranks, a scalar, an empty node and integer inputs."""
    a, mixed, (level, none) = state["a"], state["mixed"], state["rest"]
    drive = jnp.sum(mixed) + x["signal"] + jnp.where(x["count"] > 0, params["jump"], 0.0)
    return {
        "a": jnp.tanh(params["u"] @ a + level),
        "mixed": 0.5 * mixed + jnp.outer(jnp.sin(a), jnp.cos(a))[:1] * drive,
        "rest": (0.8 * level + 0.1 * jnp.sin(drive), none),
    }


def _arrays(rng, gates, size, dtype=jnp.float64):
    u = rng.normal(size=(*gates, size, size)) / np.sqrt(size)
    w, b = rng.normal(size=(*gates, size, INPUTS)) / 2, rng.normal(size=(*gates, size)) / 2
    return [jnp.asarray(x, dtype) for x in (u, w, b)]


def _inputs(rng, length, dtype=jnp.float64):
    return jnp.asarray(rng.normal(size=(length, INPUTS)), dtype)


def gru(length=T, size=3, seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    cell = Partial(gru_step, *_arrays(rng, (3,), size, dtype))
    return Problem(cell, jnp.zeros(size, dtype), _inputs(rng, length, dtype), length)


def lstm(length=T, size=2):
    rng = np.random.default_rng(1)
    cell = Partial(lstm_step, *_arrays(rng, (4,), size))
    return Problem(cell, (jnp.zeros(size), jnp.zeros(size)), _inputs(rng, length), length)


def rnn(length=T, size=4):
    rng = np.random.default_rng(2)
    cell = Partial(rnn_step, *_arrays(rng, (), size))
    return Problem(cell, jnp.zeros(size), _inputs(rng, length), length)


def autoregressive(length, seed):
    """Three hidden units and one output, untrained."""
    keys = jax.random.split(jax.random.key(seed), 4)
    weights = (
        jax.random.normal(keys[0], (3, 3, 3)) / 3**0.5,
        jax.random.normal(keys[1], (3, 3)),
        jax.random.normal(keys[2], (3,)) / 3**0.5,
        jnp.exp(-2.0),
    )
    state = jnp.zeros(3), jnp.zeros(())
    noise = jax.random.normal(keys[3], (length,))
    return Problem(Partial(autoregressive_step, weights), state, noise, length)


def lorenz96(length=T):
    """Five sites, F = 8: chaotic, an error grows e-fold in about two time units."""
    state = jnp.asarray([8.01, 8.0, 8.0, 8.0, 8.0])
    return Problem(Partial(lorenz96_step, 8.0), state, None, length)


def logistic(length=T, r=3.2):
    """A cycle of length two at r = 3.2, chaos at 3.9."""
    return Problem(Partial(logistic_step, r), jnp.asarray([0.3]), None, length)


def pytree(length=T):
    rng = np.random.default_rng(3)
    params = {"u": jnp.asarray(rng.normal(size=(2, 2)) / 2), "jump": jnp.asarray(0.3)}
    state = {"a": jnp.ones(2), "mixed": jnp.zeros((1, 2)), "rest": (jnp.asarray(0.5), None)}
    inputs = {
        "signal": jnp.asarray(rng.normal(size=length)),
        "count": jnp.asarray(rng.integers(0, 2, length)),
    }
    return Problem(Partial(pytree_step, params), state, inputs, length)


def _flat_step(kind, params, flat, x):
    """Any of the flat recurrences above; what is left of the state stays zero."""

    def branch(step, size, flat, x):
        return jnp.zeros_like(flat).at[:size].set(step(flat[:size], x))

    def lstm(state, x):
        return jnp.concatenate(lstm_step(*params["lstm"], (state[:2], state[2:]), x))

    steps = [
        (partial(gru_step, *params["gru"]), 3),
        (lstm, 4),
        (partial(rnn_step, *params["rnn"]), 4),
        (partial(lorenz96_step, params["forcing"]), 5),
        (partial(logistic_step, params["r"]), 1),
    ]
    return jax.lax.switch(kind, [partial(branch, *step) for step in steps], flat, x)


# What a method must solve, and what it may say that it has not.
SOLVABLE = ["gru", "lstm", "rnn", "lorenz96", "logistic"]
CHAOTIC = "logistic in chaos"


def flat_problem(name):
    """A problem by name, all of them with one program: a state (5,), inputs (T, 2)."""
    rng = np.random.default_rng(4)
    kind = SOLVABLE.index("logistic" if name == CHAOTIC else name)
    params = {
        "gru": gru().cell.args,
        "lstm": lstm().cell.args,
        "rnn": rnn().cell.args,
        "forcing": 8.0,
        "r": 3.9 if name == CHAOTIC else 3.2,
    }
    starts = [jnp.zeros(3), jnp.zeros(4), jnp.zeros(4), lorenz96().state, logistic().state]
    state = jnp.zeros(5).at[: len(starts[kind])].set(starts[kind])
    return Problem(Partial(_flat_step, kind, params), state, _inputs(rng, T))
