"""Time parallel evaluation of recurrences against `jax.lax.scan`.

A GRU with random weights and inputs, forward, and the gradient of the sum of squares of all states
with respect to the weights. Every row is one compiled program; runs are interleaved and medians
reported, compile time apart. `ratio` is that of the medians of `lax.scan` and the method: above
one, the method is faster. `error` is the largest difference from `lax.scan`: of states, or of the
gradient relative to its largest entry. `iterations` and `status` are those of the first series.

    python examples/benchmarks/recurrences.py
    python examples/benchmarks/recurrences.py --sizes 4 --steps 1000 --batches 1 --repeats 3
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import compile_program, interleave

import elkax

METHODS = {
    "lax.scan": elkax.Sequential(),
    "DEER": elkax.DEER(),
    "quasi-DEER": elkax.QuasiDEER(),
    "ELK": elkax.ELK(),
    "quasi-ELK": elkax.QuasiELK(),
    "Jacobi": elkax.Jacobi(),
    "Picard": elkax.Picard(),
}


def gru(weights, state, x):
    """One step of a gated recurrent unit."""
    recurrent, inputs = weights
    r, z, n = (inputs @ x).reshape(3, -1)
    ur, uz, un = (recurrent @ state).reshape(3, -1)
    r, z = jax.nn.sigmoid(r + ur), jax.nn.sigmoid(z + uz)
    return (1 - z) * jnp.tanh(n + r * un) + z * state


def random_problem(size, steps, batch, dtype):
    """Return weights, first states and inputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    bound = size**-0.5
    draw = partial(jax.random.uniform, minval=-bound, maxval=bound, dtype=dtype)
    weights = draw(keys[0], (3 * size, size)), draw(keys[1], (3 * size, size))
    inputs = jax.random.normal(keys[2], (batch, steps, size), dtype)
    return weights, jnp.zeros((batch, size), dtype), inputs


def forward(method, weights, starts, inputs):
    """Return states and how the evaluation ended, for all series."""
    cell = jax.tree_util.Partial(gru, weights)

    def one(start, xs):
        solution = elkax.evaluate_recurrence(cell, start, xs, method=method)
        return solution.states, solution.info

    states, info = jax.vmap(one)(starts, inputs)
    return states, info.iterations[0], info.status[0]


def gradient(method, weights, starts, inputs):
    """Return the gradient of the sum of squares, and how the evaluation ended."""

    def loss(weights):
        states, *ended = forward(method, weights, starts, inputs)
        return jnp.sum(states**2), ended

    change, ended = jax.grad(loss, has_aux=True)(weights)
    return change, *ended


def difference(task, actual, expected):
    """Return the largest difference, of gradients relative."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    gaps = [float(jnp.max(jnp.abs(a - b))) for a, b in pairs]
    if task == "forward":
        return max(gaps)
    return max(gaps) / max(float(jnp.max(jnp.abs(b))) for b in jax.tree.leaves(expected))


def measure(task, size, steps, batch, dtype, names, repeats):
    """Print the rows of one problem."""
    arguments = random_problem(size, steps, batch, dtype)
    function = {"forward": forward, "gradient": gradient}[task]
    compiled, costs = {}, {}
    for name in names:
        program = partial(function, METHODS[name])
        compiled[name], *costs[name] = compile_program(program, *arguments)
    first = {name: jax.block_until_ready(program(*arguments)) for name, program in compiled.items()}
    times = interleave(compiled, arguments, repeats)
    base = np.asarray(times["lax.scan"])
    for name in names:
        result, iterations, status = first[name]
        error = difference(task, result, first["lax.scan"][0])
        seconds, peak = costs[name]
        own = np.asarray(times[name])
        print(
            f"| {size} | {steps:,} | {batch} | {dtype.__name__} | {task} | {name} "
            f"| {1e3 * np.median(own):.2f} | {np.median(base / own):.3f} | {int(iterations)} "
            f"| {elkax.Status(int(status)).name.lower()} | {error:.1e} | {seconds:.1f} "
            f"| {peak / 2**20:.1f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tasks", nargs="+", default=["forward", "gradient"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[1:])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most-entries", type=float, default=2e8, help="T D^2 batch, at most")
    options = parser.parse_args()
    if "float64" in options.dtypes:
        jax.config.update("jax_enable_x64", True)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}\n")
    columns = "D T batch dtype task method ms ratio iterations status error".split()
    print("| " + " | ".join([*columns, "compile s", "peak MiB"]) + " |\n" + "|---" * 13 + "|")
    names = ["lax.scan", *options.methods]
    for size in options.sizes:
        for steps in options.steps:
            for batch in options.batches:
                if steps * size**2 * batch > options.most_entries:
                    continue
                for dtype in options.dtypes:
                    for task in options.tasks:
                        kind = getattr(jnp, dtype)
                        measure(task, size, steps, batch, kind, names, options.repeats)


if __name__ == "__main__":
    main()
