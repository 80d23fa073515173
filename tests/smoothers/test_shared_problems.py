"""The iterated smoother on the shared problems that no other file puts to these questions.

`test_iterated_nonlinear.py` asks them of the growth model and the coordinated turn.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from elkax import Status
from nonlinear_problems import (
    lorenz63,
    lorenz96,
    map_cost,
    pendulum,
    polished,
    ricker,
    stochastic_volatility,
)
from smoothers.linear_checks import BACKENDS

PROBLEMS = {
    "pendulum": pendulum,
    "Lorenz-63": lorenz63,
    "Lorenz-96": lorenz96,
    "stochastic volatility": stochastic_volatility,
    "Ricker": ricker,
}


@cache
def solve(name, backend):
    problem = PROBLEMS[name](T=60)

    def trajectory_and_info(emissions):
        # From a constant, which takes less to compile than a pass of the filter.
        solution = elkax.iterated_smoother(
            problem.params,
            emissions,
            start=problem.params.initial_mean,
            max_iters=200,
            backend=BACKENDS[backend],
            history=True,
        )
        return solution.trajectory, solution.info

    solve = jax.jit(trajectory_and_info)
    return problem, *solve(problem.emissions)


@pytest.mark.parametrize("name", PROBLEMS)
def test_descends_to_a_minimum(name):
    """The cost never rises, and SciPy finds nothing below where it ends."""
    problem, trajectory, info = solve(name, "sequential")
    assert info.status == Status.CONVERGED
    history = np.asarray(info.history.cost)[: int(info.iterations)]
    assert np.all(np.diff(history) <= 1e-12 * (1 + np.abs(history[1:])))
    cost = map_cost(problem.params, problem.emissions)
    value = jax.jit(cost)(trajectory)
    np.testing.assert_allclose(info.cost, value, rtol=1e-9)
    assert value - polished(cost, trajectory) < 1e-6
    rmse = jnp.sqrt(jnp.mean((trajectory - problem.states) ** 2))
    print(f"{name}: {info.iterations} iterations, cost {value:.4f}, RMSE {rmse:.3f}")


# One emission of each kind: most of the time goes into compiling these programs.
@pytest.mark.parametrize("name", ["pendulum", "Ricker"])
def test_backends_end_at_the_same_trajectory(name):
    _, one, one_info = solve(name, "sequential")
    _, other, other_info = solve(name, "blocked")
    assert one_info.iterations == other_info.iterations
    # Rounding, carried through 60 steps and some 30 iterations.
    np.testing.assert_allclose(one, other, atol=1e-7)


def test_a_step_that_damping_makes_vanish_is_no_arrival():
    """The largest entry of the Hessian, exp(60), leaves a damping that is never small elsewhere."""
    problem = ricker(T=50)
    start = jnp.zeros((50, 1)).at[1].set(60.0)

    def info(emissions):
        return elkax.iterated_smoother(
            problem.params, emissions, start=start, backend=elkax.Sequential(), max_iters=100
        ).info

    found = jax.jit(info)(problem.emissions)
    assert found.cost > 1e10 and found.status == Status.STALLED and jnp.isinf(found.step)
