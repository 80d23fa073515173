"""Random recurrences: no false CONVERGED, and gradients where `lax.scan` has them.

Contracting, chaotic, unstable and kinked ones, GRUs and LSTMs. Size and length are data: what is
left of a state stays zero, and the last steps are padding, so that few programs serve them all.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import elkax
from recurrences import recurrence_problems as problems

KINDS = ["contracting", "chaotic", "unstable", "relu", "GRU", "LSTM"]


def vanilla_step(u, w, b, kind, state, x):
    """A tanh network, one that is not squashed, or one with kinks."""
    drive = u @ state + w @ x + b
    return jnp.select([kind < 2, kind == 2], [jnp.tanh(drive), drive], jax.nn.relu(drive))


STEPS = {
    "vanilla": (vanilla_step, 1, 1),
    "GRU": (problems.gru_step, 3, 1),
    "LSTM": (problems.lstm_step, 4, 2),
}


def draw(seed, name, most, longest):
    """Parameters of a random recurrence with at most so many states and steps, in doubles."""
    rng = np.random.default_rng(seed)
    _, gates, parts = STEPS[name]
    kind = int(rng.integers(4))
    size, length = int(rng.integers(1, most + 1)), int(rng.integers(1, longest + 1))
    low, high = [(0.3, 0.95), (1.0, 2.5), (0.9, 1.15), (0.5, 1.5)][kind]
    if name != "vanilla":
        low, high = 0.5, 3.0
    exists = np.arange(most) < size
    u = rng.uniform(low, high) * rng.normal(size=(gates, most, most)) / np.sqrt(size)
    u = np.where(exists[:, None] & exists, u, 0.0)
    w, b = rng.normal(size=(gates, most, 2)) / 2, rng.normal(size=(gates, most)) / 2
    w, b = np.where(exists[:, None], w, 0.0), np.where(exists, b, 0.0)
    start = np.where(exists, 0.5 * rng.normal(size=(parts, most)), 0.0)
    x = rng.choice([0.1, 1.0]) * rng.normal(size=(longest, 2))
    weights = np.where(np.arange(longest)[:, None] < length, rng.normal(size=(longest, most)), 0.0)
    if name == "vanilla":
        u, w, b = u[0], w[0], b[0]
    return u, w, b, np.asarray(kind), start, x, weights, np.asarray(length)


def evaluate(name, method, max_iters, u, w, b, kind, start, x, weights, length):
    """A loss of the first part of the state, with gradients; how it ended, and the states."""
    step, _, parts = STEPS[name]

    def loss(u, start, x):
        constants = (u, w, b, kind) if name == "vanilla" else (u, w, b)
        cell, state = Partial(step, *constants), tuple(start) if parts > 1 else start[0]
        if method is None:
            valid = jnp.arange(len(x)) < length

            def masked(state, row):
                new = jax.tree.map(partial(jnp.where, row[1]), cell(state, row[0]), state)
                return new, new

            states, info = jax.lax.scan(masked, state, (x, valid))[1], None
        else:
            states, info = elkax.evaluate_recurrence(
                cell, state, x, method=method, length=length, max_iters=max_iters
            )
        states = jnp.concatenate(jax.tree.leaves(states), -1)
        # Neither large nor small states count alone.
        return jnp.sum(weights * jnp.arcsinh(states[:, : weights.shape[1]])), (states, info)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(u, start, x)


@partial(jax.jit, static_argnames=("name", "method", "max_iters"))
def evaluate_all(name, method, max_iters, batch):
    return jax.vmap(partial(evaluate, name, method, max_iters))(*batch)


def judge(seeds, name, most, longest, dtype, method, max_iters=None):
    """What went wrong, in words, and how many converged."""
    drawn = [draw(seed, name, most, longest) for seed in seeds]
    batch = [np.stack(leaves) for leaves in zip(*drawn, strict=True)]

    def cast(leaf, dtype):
        return jnp.asarray(leaf, dtype if np.issubdtype(leaf.dtype, np.floating) else None)

    given = [cast(leaf, dtype) for leaf in batch]
    # What rounding of its parameters would do to a gradient is no error of it.
    doubles = [cast(np.asarray(leaf), float) for leaf in given]
    got, (states, info) = evaluate_all(name, method, max_iters, given)
    exact, (reference, _) = evaluate_all(name, None, None, given)
    fine = exact
    if dtype == jnp.float32:
        fine, _ = evaluate_all(name, None, None, doubles)
    wrong = []
    converged = np.asarray(info.status == elkax.Status.CONVERGED)
    for i in np.flatnonzero(converged):
        off = np.max(np.abs(states[i] - reference[i]), axis=1)
        scale = np.maximum.accumulate(np.max(np.abs(reference[i]), axis=1))
        scale = np.maximum(scale, np.max(np.abs(given[4][i])))
        # Terms that cancel inside the cell, as where a unit is switched on, are larger than f, and
        # so are their roundings; the bound knows the size of f alone.
        rounding = 4 * np.finfo(dtype).eps * scale
        if not np.all(off <= info.error_bound[i] + rounding):
            wrong.append(f"{name} {seeds[i]}: error {np.max(off)} above its bound")
        if not np.all(off <= 1e-3 * scale):
            wrong.append(f"{name} {seeds[i]}: error {np.max(off / scale)} of the states")
        one, other, best = ([np.asarray(leaf[i], float) for leaf in g] for g in (got, exact, fine))
        if not all(np.all(np.isfinite(leaf)) for leaf in other):
            continue
        largest = max(np.max(np.abs(leaf)) for leaf in other)
        doubt = max(np.max(np.abs(a - b)) for a, b in zip(other, best, strict=True))
        gap = max(np.max(np.abs(a - b)) for a, b in zip(one, other, strict=True))
        if not gap <= 1e-3 * largest + 10 * doubt:
            wrong.append(f"{name} {seeds[i]}: gradient off by {gap / largest}")
    return wrong, int(np.sum(converged))


# Newton's method where whole Jacobians are small, the quasi-Newton one where they are not.
SLICE = [
    ("vanilla", 4, 100, jnp.float32, elkax.DEER()),
    ("vanilla", 20, 60, jnp.float64, elkax.QuasiDEER()),
    ("GRU", 4, 100, jnp.float32, elkax.DEER()),
    ("LSTM", 2, 60, jnp.float32, elkax.QuasiDEER()),
]


@pytest.mark.parametrize("name, most, longest, dtype, method", SLICE, ids=str)
def test_a_slice(name, most, longest, dtype, method):
    wrong, converged = judge(range(24), name, most, longest, dtype, method)
    assert not wrong
    assert converged >= 12


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=str)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    "most, longest, method, count, max_iters",
    [
        (4, 600, elkax.DEER(), 80, None),
        (16, 300, elkax.DEER(), 40, None),
        (16, 300, elkax.ELK(), 20, 300),
        (24, 300, elkax.QuasiDEER(), 20, None),
        (64, 60, elkax.QuasiDEER(), 8, None),
    ],
    ids=str,
)
def test_a_thousand_recurrences(name, most, longest, method, count, max_iters, dtype):
    """168 of each kind of cell in both types."""
    seeds = range(100, 100 + count)
    wrong, converged = judge(seeds, name, most, longest, dtype, method, max_iters)
    print(f"{name}, D <= {most}, T <= {longest}, {np.dtype(dtype)}: {converged} of {count}")
    assert not wrong
    assert converged >= count // 4
