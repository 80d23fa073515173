"""Time nonlinear smoothers of elkax, dynamax and cuthbert, one pass and to convergence.

Every row is one compiled program; runs are interleaved and medians reported, compile time apart.
The iterated smoothers all start from elkax's extended smoother, given to them, and stop when no
state moves by more than 1.5e-8 of its standard deviation (elkax: when also the cost stays), or
after `--iterations`. The time of an iteration is that of the whole run, including elkax's last pass
for the posterior, divided by their number. elkax's GN (Gauss-Newton) and LM (Levenberg-Marquardt)
choose their backend, blocks in parallel from T = 512 on. The MAP cost of the smoothed means stands
beside the times; the unscented smoothers minimise another. One-pass smoothers know no angles, so
that bearings near half a turn cost them; the iterated ones wrap the difference.

cuthbert's iterated smoother is a loop about its parallel elements, Gauss-Newton without damping
(Newton for stochastic volatility), run by its sequential and by its parallel scan. dynamax has no
iterated smoother, and none for stochastic volatility: the mean of its emissions is zero.

    python examples/benchmarks/nonlinear.py
    python examples/benchmarks/nonlinear.py --problems pendulum --steps 100 --repeats 3

cuthbert's parallel scan can deadlock XLA's thread pool on few cores from T of about 4,000 on; it
first runs under a time limit in a process of its own. cuthbert is optional.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import compile_program, interleave, survives

import elkax

sys.path.append(str(Path(__file__).parents[2] / "tests"))
import nonlinear_problems  # noqa: E402

PROBLEMS = {
    "coordinated turn": nonlinear_problems.coordinated_turn,
    "pendulum": nonlinear_problems.pendulum,
    "stochastic volatility": nonlinear_problems.stochastic_volatility,
}


def one_pass(smoother, params, *arguments, **options):
    """Return the program of a smoother without iteration; see `METHODS`."""

    def program(emissions, start):
        posterior = smoother(params, emissions, *arguments, **options)
        means = posterior.smoothed_means
        return means, posterior.smoothed_covariances, jnp.asarray(1), jnp.all(jnp.isfinite(means))

    return program


def elkax_iterated(problem, max_iters, *, backend, damping):
    """Return the program of `elkax.iterated_smoother`; see `METHODS`."""

    def program(emissions, start):
        options = {"damping": damping, "backend": backend, "max_iters": max_iters}
        if problem.residual is not None:
            options["residual"] = problem.residual
        solution = elkax.iterated_smoother(problem.params, emissions, start=start, **options)
        covs = solution.posterior.smoothed_covariances
        info = solution.info
        return solution.trajectory, covs, info.iterations, info.status == elkax.Status.CONVERGED

    return program


def elkax_unscented(problem, max_iters):
    from dynamax.nonlinear_gaussian_ssm.inference_ukf import UKFHyperParams

    return one_pass(elkax.unscented_kalman_smoother, problem.params, UKFHyperParams())


def dynamax_extended(problem, max_iters):
    from dynamax.nonlinear_gaussian_ssm import extended_kalman_smoother

    return one_pass(extended_kalman_smoother, problem.params)


def dynamax_unscented(problem, max_iters):
    from dynamax.nonlinear_gaussian_ssm import unscented_kalman_smoother
    from dynamax.nonlinear_gaussian_ssm.inference_ukf import UKFHyperParams

    return one_pass(unscented_kalman_smoother, problem.params, UKFHyperParams())


def cuthbert_gaussian(params, residual, iterated):
    """Return cuthbert's filter and smoother of a model with Gaussian emissions."""
    from cuthbert.gaussian import moments

    f, h = params.dynamics_function, params.emission_function
    start, q, r = (
        jnp.linalg.cholesky(x)
        for x in (params.initial_covariance, params.dynamics_covariance, params.emission_covariance)
    )

    def dynamics(state, x):
        first = x["t"] == 0  # cuthbert starts one step before the first emission

        def mean_and_root(z):
            return jnp.where(first, z, f(z)), jnp.where(first, 0.0, q)

        return mean_and_root, x["before"] if iterated else state.mean

    def observation(state, x):
        if not iterated:
            return lambda z: (h(z), r), state.mean, x["y"]
        # On the side of the circle where the prediction is.
        y = h(x["at"]) + residual(x["y"], h(x["at"]))
        return lambda z: (h(z), r), x["at"], y

    run_filter = moments.build_filter(
        params.initial_mean, start, dynamics, observation, associative=iterated
    )
    return run_filter, moments.build_smoother(dynamics)


def cuthbert_density(params, iterated):
    """Return cuthbert's filter and smoother of a stationary model with an emission density.

    The step before the first emission needs no exception: the start is stationary.
    """
    import tensorflow_probability.substrates.jax.distributions as tfd
    from cuthbert.gaussian import taylor

    root = jnp.linalg.cholesky(params.dynamics_covariance)
    start = jnp.linalg.cholesky(params.initial_covariance)

    def transition(before, after):
        mean = params.dynamics_function(before)
        return tfd.MultivariateNormalTriL(mean, root).log_prob(after)

    def dynamics(state, x):
        before = x["before"] if iterated else state.mean
        return transition, before, params.dynamics_function(before)

    def observation(state, x):
        def potential(z):
            return jnp.sum(params.emission_distribution(z).log_prob(x["y"]))

        return potential, x["at"] if iterated else state.mean

    prior = tfd.MultivariateNormalTriL(params.initial_mean, start).log_prob
    run_filter = taylor.build_filter(
        prior, params.initial_mean, dynamics, observation, associative=iterated
    )
    return run_filter, taylor.build_smoother(dynamics)


def cuthbert_pass(problem, emissions, points=None, *, parallel=False):
    """Smooth once, linearized about points (T, D), or without them about cuthbert's own means."""
    import cuthbert

    iterated = points is not None
    if isinstance(problem.params, elkax.ParamsDistributionSSM):
        filter_, smoother = cuthbert_density(problem.params, iterated)
    else:
        residual = problem.residual or jnp.subtract
        filter_, smoother = cuthbert_gaussian(problem.params, residual, iterated)
    inputs = {"t": jnp.arange(len(emissions)), "y": emissions}
    if iterated:
        inputs |= {"at": points, "before": jnp.concatenate((points[:1], points[:-1]))}
    states = cuthbert.filter(filter_, inputs, filter_.init_prepare(), parallel=parallel)
    smoothed = cuthbert.smoother(smoother, states, inputs, parallel=parallel)
    factor = smoothed.chol_cov[1:]
    return smoothed.mean[1:], factor @ jnp.swapaxes(factor, -1, -2)


def cuthbert_extended(problem, max_iters):
    def program(emissions, start):
        means, covs = cuthbert_pass(problem, emissions)
        return means, covs, jnp.asarray(1), jnp.all(jnp.isfinite(means))

    return program


def cuthbert_iterated(problem, max_iters, *, parallel):
    """Return a program that linearizes again until the means stay; see `METHODS`."""
    tolerance = np.sqrt(np.finfo(np.float64).eps)

    def program(emissions, start):
        def advance(carry):
            points, _, _, count = carry
            means, covs = cuthbert_pass(problem, emissions, points, parallel=parallel)
            sd = jnp.sqrt(jnp.diagonal(covs, axis1=1, axis2=2))
            return means, covs, jnp.max(jnp.abs(means - points) / sd), count + 1

        def unfinished(carry):
            _, _, step, count = carry
            return (step > tolerance) & (count < max_iters)

        covs = jnp.zeros((*start.shape, start.shape[1]))
        carry = (start, covs, jnp.asarray(jnp.inf), jnp.asarray(0))
        means, covs, step, count = jax.lax.while_loop(unfinished, advance, carry)
        return means, covs, count, step <= tolerance

    return program


def elkax_row(backend, damping):
    return partial(elkax_iterated, backend=backend, damping=damping)


# Of problem and most iterations: a program (emissions, start) -> (means, covariances, iterations,
# whether it arrived).
METHODS = {
    "elkax extended": lambda problem, _: one_pass(elkax.gaussian_smoother, problem.params),
    "elkax unscented": elkax_unscented,
    "elkax GN": elkax_row(None, elkax.GaussNewton()),
    "elkax GN sequential": elkax_row(elkax.Sequential(), elkax.GaussNewton()),
    "elkax LM": elkax_row(None, elkax.LevenbergMarquardt()),
    "elkax LM sequential": elkax_row(elkax.Sequential(), elkax.LevenbergMarquardt()),
    "dynamax extended": dynamax_extended,
    "dynamax unscented": dynamax_unscented,
    "cuthbert extended": cuthbert_extended,
    "cuthbert sequential": partial(cuthbert_iterated, parallel=False),
    "cuthbert parallel": partial(cuthbert_iterated, parallel=True),
}
GAUSSIAN_ONLY = ("elkax unscented", "dynamax extended", "dynamax unscented")


def make_cell(problem_name, num_steps):
    """Return a problem and the start of its iterated smoothers."""
    problem = PROBLEMS[problem_name](T=num_steps)
    start = elkax.gaussian_smoother(problem.params, problem.emissions).smoothed_means
    return problem, start


def _once(name, problem_name, num_steps, max_iters):
    jax.config.update("jax_enable_x64", True)
    problem, start = make_cell(problem_name, num_steps)
    program = METHODS[name](problem, max_iters)
    jax.block_until_ready(jax.jit(program)(problem.emissions, start))


def run_cell(problem_name, num_steps, names, options):
    """Print one line for each method."""
    problem, start = make_cell(problem_name, num_steps)
    gaussian = not isinstance(problem.params, elkax.ParamsDistributionSSM)
    residual = problem.residual or jnp.subtract
    cost = jax.jit(
        nonlinear_problems.map_cost(problem.params, problem.emissions, residual=residual)
    )
    programs, seconds, results = {}, {}, {}
    for name in names:
        if name in GAUSSIAN_ONLY and not gaussian:
            continue
        risky = (name, problem_name, num_steps, options.iterations)
        if name == "cuthbert parallel" and not survives(_once, risky, options.limit):
            print(f"  {name:20s} did not finish within {options.limit:.0f} s", flush=True)
            continue
        program = METHODS[name](problem, options.iterations)
        programs[name], seconds[name], _ = compile_program(program, problem.emissions, start)
        means, _, count, arrived = programs[name](problem.emissions, start)
        results[name] = int(count), bool(arrived), float(cost(means))
    times = interleave(programs, (problem.emissions, start), options.repeats)
    for name, measured in times.items():
        median = 1e3 * np.median(measured)
        count, arrived, value = results[name]
        print(
            f"  {name:20s} {median:9.2f} ms  {count:4d} iterations  {median / count:8.2f} ms each  "
            f"compile {seconds[name]:5.1f} s  cost {value:12.5f}{'' if arrived else '  not there'}",
            flush=True,
        )


def main():
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--steps", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--iterations", type=int, default=100, help="most iterations")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a risky method")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    names = options.methods
    try:
        import cuthbert  # noqa: F401
    except ImportError:
        names = [name for name in names if not name.startswith("cuthbert")]
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float64, "
        f"medians of {options.repeats}"
    )
    for problem_name in options.problems:
        for num_steps in options.steps:
            print(f"{problem_name}, T = {num_steps}")
            run_cell(problem_name, num_steps, names, options)


if __name__ == "__main__":
    main()
