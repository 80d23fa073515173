"""Time elkax's linear-Gaussian filter, smoother and gradient beside dynamax's and cuthbert's.

Every cell is one compiled program per competitor; runs are interleaved and medians reported.
Compile time stands apart. The error is the largest difference of the filtered (or smoothed) means
from elkax's sequential float64 result, in posterior standard deviations; for the gradient it is the
relative error of d loglik / dF. Peak memory is XLA's own count of temporary and output bytes.

    python examples/benchmarks/linear.py                  # the whole table, an hour or two
    python examples/benchmarks/linear.py --states 1 4 --steps 8192 --dtypes float64
    python examples/benchmarks/linear.py --series 16 256 --states 4 --steps 1000

dynamax's parallel functions can deadlock XLA's thread pool on few cores from T of about 4,000 on.
Each of their cells first runs under a time limit in a process of its own, but may still hang here
after that; with them set XLA_FLAGS=--xla_cpu_multi_thread_eigen=false, which avoids it. cuthbert is
optional.
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import compile_program, interleave, survives

import elkax

TASKS = ("filter", "smoother", "gradient")


def make_problem(state_dim, num_steps, num_series, dtype):
    """Build a stable rotation seen by one or two sensors, and data drawn from nothing special."""
    from dynamax.linear_gaussian_ssm.inference import make_lgssm_params

    rng = np.random.default_rng(0)
    emission_dim = 1 if state_dim == 1 else 2
    rotation = 0.95 * np.linalg.qr(rng.normal(size=(state_dim, state_dim)))[0]
    parts = (
        np.zeros(state_dim),
        np.eye(state_dim),
        rotation,
        0.1 * np.eye(state_dim) + 0.02,
        rng.normal(size=(emission_dim, state_dim)),
        0.3 * np.eye(emission_dim) + 0.05,
    )
    params = make_lgssm_params(*(jnp.asarray(part, dtype) for part in parts))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    shape = (num_series, num_steps, emission_dim) if num_series > 1 else (num_steps, emission_dim)
    return params, jnp.asarray(rng.normal(size=shape), dtype)


def gradient_of(log_prob: Callable) -> Callable:
    """Differentiate a log-likelihood with respect to the dynamics weights."""

    def value(weights, params, emissions):
        dynamics = params.dynamics._replace(weights=weights)
        return log_prob(params._replace(dynamics=dynamics), emissions)

    return lambda params, emissions: jax.grad(value)(params.dynamics.weights, params, emissions)


def elkax_program(task, **options):
    """Return (params, emissions) -> result for elkax."""
    if task == "gradient":
        return gradient_of(partial(elkax.lgssm_marginal_log_prob, **options))
    function = elkax.lgssm_filter if task == "filter" else elkax.lgssm_smoother
    return lambda params, emissions: moments(function(params, emissions, **options), task)


def moments(posterior, task):
    """Take the means and covariances that the task is about, and the likelihood."""
    name = "filtered" if task == "filter" else "smoothed"
    return (
        getattr(posterior, f"{name}_means"),
        getattr(posterior, f"{name}_covariances"),
        posterior.marginal_loglik,
    )


def dynamax_program(task, *, parallel):
    """Return (params, emissions) -> result for dynamax."""
    if parallel:
        from dynamax.linear_gaussian_ssm import parallel_inference as library
    else:
        import dynamax.linear_gaussian_ssm as library
    if task == "gradient":
        return gradient_of(lambda p, y: library.lgssm_filter(p, y).marginal_loglik)
    function = library.lgssm_filter if task == "filter" else library.lgssm_smoother
    return lambda params, emissions: moments(function(params, emissions), task)


def cuthbert_program(task):
    """Return (params, emissions) -> result for cuthbert's square-root parallel filter."""
    from cuthbert import filter as run_filter
    from cuthbert import smoother as run_smoother
    from cuthbert.gaussian import kalman

    def program(params, emissions):
        f, q = params.dynamics.weights, jnp.linalg.cholesky(params.dynamics.cov)
        h, r = params.emissions.weights, jnp.linalg.cholesky(params.emissions.cov)
        zero_state, zero_emission = jnp.zeros(f.shape[0], f.dtype), jnp.zeros(h.shape[0], f.dtype)

        def dynamics(t):
            first = t == 0  # cuthbert starts one step before the first emission
            return jnp.where(first, jnp.eye(f.shape[0], dtype=f.dtype), f), zero_state, q * ~first

        def observation(t):
            return h, zero_emission, r, emissions[t]

        kalman_filter = kalman.build_filter(
            params.initial.mean, jnp.linalg.cholesky(params.initial.cov), dynamics, observation
        )
        times = jnp.arange(emissions.shape[0])
        start = kalman_filter.init_prepare()
        states = run_filter(kalman_filter, times, start, parallel=True)
        if task == "smoother":
            total = states.log_normalizing_constant[-1]
            states = run_smoother(kalman.build_smoother(dynamics), states, parallel=True)
            factor = states.chol_cov[1:]
            return states.mean[1:], factor @ jnp.swapaxes(factor, -1, -2), total
        factor = states.chol_cov[1:]
        covs = factor @ jnp.swapaxes(factor, -1, -2)
        return states.mean[1:], covs, states.log_normalizing_constant[-1]

    return program if task != "gradient" else gradient_of(lambda p, y: cuthbert_value(p, y))


def cuthbert_value(params, emissions):
    """Return cuthbert's log-likelihood."""
    return cuthbert_program("filter")(params, emissions)[2]


COMPETITORS = {
    "elkax": lambda task: elkax_program(task),
    "elkax sequential": lambda task: elkax_program(task, backend=elkax.Sequential()),
    "elkax blocks": lambda task: elkax_program(task, backend=elkax.Blocked(128)),
    "elkax square root": lambda task: elkax_program(task, form="square_root"),
    "dynamax": lambda task: dynamax_program(task, parallel=False),
    "dynamax parallel": lambda task: dynamax_program(task, parallel=True),
    "cuthbert": cuthbert_program,
}


def prepare(name, task, params, emissions):
    """Compile one competitor; return it with compile seconds and peak bytes."""
    program = COMPETITORS[name](task)
    if emissions.ndim == 3:
        program = jax.vmap(program, in_axes=(None, 0))
    return compile_program(program, params, emissions)


def _once(name, task, cell):
    jax.config.update("jax_enable_x64", cell[-1] == jnp.float64)
    params, emissions = make_problem(*cell)
    jax.block_until_ready(prepare(name, task, params, emissions)[0](params, emissions))


def error_of(result, exact, task):
    """Compare with the exact result; see the module's first lines."""
    result = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), result)
    if task == "gradient":
        return np.max(np.abs(result - exact)) / np.max(np.abs(exact))
    sd = np.sqrt(np.diagonal(exact[1], axis1=-2, axis2=-1))
    return np.max(np.abs(result[0] - exact[0]) / sd)


def run_cell(task, cell, names, repeats, limit):
    """Print one line for each competitor."""
    jax.config.update("jax_enable_x64", True)
    exact_problem = make_problem(*cell[:3], jnp.float64)
    exact = jax.device_get(prepare("elkax sequential", task, *exact_problem)[0](*exact_problem))
    # Without this dynamax and cuthbert would mix float64 into float32.
    jax.config.update("jax_enable_x64", cell[-1] == jnp.float64)
    params, emissions = make_problem(*cell)
    programs, seconds, peaks, errors = {}, {}, {}, {}
    for name in names:
        if name == "dynamax parallel" and not survives(_once, (name, task, cell), limit):
            print(f"  {name:18s} did not finish within {limit} s", flush=True)
            continue
        programs[name], seconds[name], peaks[name] = prepare(name, task, params, emissions)
        result = jax.block_until_ready(programs[name](params, emissions))
        errors[name] = error_of(result, exact, task)
    times = interleave(programs, (params, emissions), repeats)
    ours = np.array(times["elkax"])
    for name, measured in times.items():
        ratio = np.median(np.array(measured) / ours)
        print(
            f"  {name:18s} {1e3 * np.median(measured):9.2f} ms  {ratio:7.2f} x elkax  compile "
            f"{seconds[name]:5.1f} s  peak {peaks[name] / 2**20:8.1f} MiB  "
            f"error {errors[name]:.1e}",
            flush=True,
        )


def main():
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--series", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--competitors", nargs="+", choices=COMPETITORS, default=list(COMPETITORS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one risky cell")
    options = parser.parse_args()
    names = ["elkax", *(name for name in options.competitors if name != "elkax")]
    try:
        import cuthbert  # noqa: F401
    except ImportError:
        names = [name for name in names if name != "cuthbert"]
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, medians of {options.repeats}")
    for dtype in options.dtypes:
        for state_dim in options.states:
            for steps in options.steps:
                for series in options.series:
                    for task in options.tasks:
                        print(f"D = {state_dim}, T = {steps}, {series} series, {dtype}, {task}")
                        cell = (state_dim, steps, series, jnp.dtype(dtype))
                        run_cell(task, cell, names, options.repeats, options.limit)


if __name__ == "__main__":
    main()
