"""Print where and how the iterated smoother ends, by damping and by start.

The growth model (UNGM, T = 100, 50 seeds) for every damping, beside L-BFGS from the same start; and
the coordinated turn with bearings only, from zeros, from the initial mean and from the truth plus
N(0, I). "rises" counts accepted steps that raised the MAP cost by more than 1e-12 (1 + |cost|).

    python examples/benchmarks/convergence.py
    python examples/benchmarks/convergence.py --steps 500 10000 --dampings LM
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import elkax

sys.path.append(str(Path(__file__).parents[2] / "tests"))
import nonlinear_problems  # noqa: E402

DAMPINGS = {
    "LM": elkax.LevenbergMarquardt(),
    "LM 1": elkax.LevenbergMarquardt(initial=1.0),
    "LM 10,000": elkax.LevenbergMarquardt(initial=1e4),
    "LM, always damped": elkax.LevenbergMarquardt(longest=0.0),
    "trust region": elkax.TrustRegion(),
    "line search": elkax.LineSearch(),
    "undamped": elkax.GaussNewton(),
}
SEEDS = 50


def count_rises(history, iterations):
    """Count the steps that raised the cost."""
    cost = np.asarray(history.cost)[: int(iterations)]
    return int(np.sum(np.diff(cost) > 1e-12 * (1 + np.abs(cost[1:]))))


def growth(dampings, max_iters):
    """Print the table of the growth model."""
    problems = [nonlinear_problems.ungm(seed) for seed in range(SEEDS)]
    params, inputs = problems[0].params, problems[0].inputs
    emissions = jnp.stack([problem.emissions for problem in problems])
    print(f"\n## Growth model, T = {emissions.shape[1]}, {SEEDS} seeds\n")
    print("| damping | converged | iterations, median | most | median cost | rises |")
    print("|---|---|---|---|---|---|")
    for name in dampings:

        def smooth(y, damping=DAMPINGS[name]):
            return elkax.iterated_smoother(
                params, y, inputs, damping=damping, max_iters=max_iters, history=True
            ).info

        info = jax.jit(jax.vmap(smooth))(emissions)
        rises = sum(
            count_rises(jax.tree.map(lambda leaf, i=i: leaf[i], info.history), info.iterations[i])
            for i in range(SEEDS)
        )
        arrived = int(np.sum(info.status == elkax.Status.CONVERGED))
        print(
            f"| {name} | {arrived} of {SEEDS} | {np.median(info.iterations):.0f} | "
            f"{np.max(info.iterations)} | {np.median(info.cost):.1f} | {rises} |"
        )
    start = jax.jit(lambda y: elkax.extended_kalman_smoother(params, y, None, inputs))
    costs = [
        nonlinear_problems.polished(
            nonlinear_problems.map_cost(params, y, inputs), start(y).smoothed_means
        )
        for y in emissions
    ]
    print(f"| L-BFGS | | | | {np.median(costs):.1f} | |")


def turn(dampings, lengths, max_iters):
    """Print the table of the coordinated turn."""
    print("\n## Coordinated turn, bearings only\n")
    print("| T | r | start | damping | status | iterations | cost | rises | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    params = nonlinear_problems.coordinated_turn(T=1).params
    for length in lengths:
        for name in dampings:
            solve = jax.jit(partial(_smooth_turn, params, DAMPINGS[name], max_iters))
            for r in (0.5, 0.05):
                problem = nonlinear_problems.coordinated_turn(r, T=length)
                truth, mean = problem.states, jnp.asarray(problem.params.initial_mean)
                noise = np.random.default_rng(1).standard_normal(truth.shape)
                starts = {
                    "zeros": 0 * truth,
                    "m0": 0 * truth + mean,
                    "truth + N(0, I)": truth + noise,
                }
                for begin, means in starts.items():
                    arguments = problem.params.emission_covariance, problem.emissions, means
                    since = time.perf_counter()
                    info = jax.block_until_ready(solve(*arguments))
                    seconds = time.perf_counter() - since
                    rises = count_rises(info.history, info.iterations)
                    status = elkax.Status(int(info.status)).name
                    print(
                        f"| {length:,} | {r} | {begin} | {name} | {status} | {info.iterations} | "
                        f"{info.cost:.6f} | {rises} | {seconds:.1f} |",
                        flush=True,
                    )


def _smooth_turn(params, damping, max_iters, noise, emissions, start):
    return elkax.iterated_smoother(
        params._replace(emission_covariance=noise),
        emissions,
        damping=damping,
        start=start,
        residual=nonlinear_problems.wrap,
        max_iters=max_iters,
        history=True,
    ).info


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dampings", nargs="+", choices=DAMPINGS, default=list(DAMPINGS))
    parser.add_argument("--steps", type=int, nargs="*", default=[500], help="of the turn")
    parser.add_argument("--iterations", type=int, default=1000, help="most iterations")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    growth(options.dampings, options.iterations)
    if options.steps:
        turn(options.dampings, options.steps, options.iterations)
