"""Time exactly diffuse starts beside proper ones: filter, smoother, likelihood with its gradient.

Local linear trends with a trigonometric seasonal of 3, 13 and 53 states in all. Runs are
interleaved and medians reported; compile time stands apart.

    python examples/benchmarks/diffuse.py
    python examples/benchmarks/diffuse.py --states 13 --steps 240 --dtypes float64
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import compile_program, interleave

import elkax

# States to the period of the seasonal beside a trend of two; one harmonic less than all.
PERIODS = {3: 2, 13: 12, 53: 52}


def build(states, variance):
    """Build the model; a proper start of that variance, or a diffuse one if it is None."""
    return elkax.combine(
        elkax.local_linear_trend(0.1, 0.01, 1.0, initial_variance=variance),
        elkax.trigonometric_seasonal(PERIODS[states], 0.01, initial_variance=variance),
    )


def likelihood(variances, emissions, *, states, initial_variance):
    """Compute the log-likelihood as a function of three variances."""
    params = build(states, initial_variance)
    level, slope, error = variances
    cov = params.dynamics.cov.at[0, 0].set(level).at[1, 1].set(slope)
    params = params._replace(
        dynamics=params.dynamics._replace(cov=cov),
        emissions=params.emissions._replace(cov=error[None, None]),
    )
    return elkax.lgssm_marginal_log_prob(params, emissions)


def programs(states):
    """Give the two programs of every task, by name."""
    variances = jnp.array([0.1, 0.01, 1.0])
    for task in ("filter", "smoother", "value and gradient"):
        pair = {}
        for name, variance in (("proper", 10.0), ("diffuse", None)):
            if task == "value and gradient":
                function = partial(likelihood, states=states, initial_variance=variance)
                pair[name] = partial(jax.value_and_grad(function), variances)
            else:
                function = getattr(elkax, f"lgssm_{task}")
                pair[name] = partial(function, build(states, variance))
        yield task, pair


def main():
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, nargs="+", default=list(PERIODS), choices=PERIODS)
    parser.add_argument("--steps", type=int, nargs="+", default=[240, 10_000])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, medians of {options.repeats}")
    for dtype in options.dtypes:
        jax.config.update("jax_enable_x64", dtype == "float64")
        for states in options.states:
            for steps in options.steps:
                emissions = jnp.asarray(np.random.default_rng(0).normal(size=(steps, 1)), dtype)
                for task, pair in programs(states):
                    compiled = {name: compile_program(p, emissions) for name, p in pair.items()}
                    ready = {name: program for name, (program, *_) in compiled.items()}
                    for program in ready.values():
                        jax.block_until_ready(program(emissions))
                    times = interleave(ready, (emissions,), options.repeats)
                    proper, diffuse = (np.array(times[name]) for name in pair)
                    print(
                        f"{dtype} D = {states:2d}, T = {steps:6d}, {task:18s} proper "
                        f"{1e3 * np.median(proper):8.2f} ms, diffuse "
                        f"{np.median(diffuse / proper):5.2f} x; compile "
                        f"{compiled['proper'][1]:4.1f} s, {compiled['diffuse'][1]:4.1f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
