"""How the plain call arrives: hard counts, kinks, units, diverged starts, several starts, words."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_probability.substrates.jax.distributions as tfd

import elkax
from elkax import LevenbergMarquardt, ParamsDistributionSSM, SigmaPoints, Status
from nonlinear_problems import (
    coordinated_turn,
    gaussian_params,
    map_cost,
    pendulum,
    polished,
    ungm,
    wrap,
)

SEQUENTIAL = {"backend": elkax.Sequential()}


def log_rate(z):
    return tfd.Poisson(log_rate=z)


def counts(top, dtype):
    """Sixty zeros, then counts that rise to `top`; a random walk of their log-rate."""
    rate = np.concatenate((np.zeros(60), np.linspace(0, top, 60)))
    y = np.random.default_rng(0).poisson(rate)[:, None]
    one = jnp.ones((1, 1), dtype)
    params = ParamsDistributionSSM(one[0] * 0, one, lambda z: z, 0.04 * one, log_rate)
    return params, jnp.asarray(y, dtype)


@jax.jit
def smooth_counts(params, y, prior):
    smooth = partial(elkax.iterated_smoother, params, y, max_iters=100, history=True, **SEQUENTIAL)
    return jax.lax.cond(prior, lambda: smooth(start="prior"), smooth)


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_counts_from_zero_to_a_hundred_thousand(dtype, prior):
    """The counts' own size decides no step; a Newton step from the prior would overflow."""
    for top in (8_000, 100_000):
        params, y = counts(top, dtype)
        solution = smooth_counts(params, y, prior)
        assert solution.info.status == Status.CONVERGED
        exact = counts(top, jnp.float64)
        cost = map_cost(*exact)
        trajectory = np.asarray(solution.trajectory, np.float64)
        # In nats; float32 resolves the largest log-rate to 2e-4 posterior deviations.
        fall = cost(trajectory) - polished(cost, trajectory)
        assert fall < (1e-3 if dtype == jnp.float32 else 1e-6)
        history = np.asarray(solution.info.history.cost, np.float64)
        history = history[: int(solution.info.iterations)]
        # The terms of each log-density are 1e6 where counts are 1e5: they round to .06 in float32.
        rounding = 200 * top * np.log(top) * np.finfo(dtype).eps
        assert np.all(np.diff(history) <= rounding)


def test_a_long_step_never_counts_as_arrival():
    """From 60, where every step of one lowers a cost of 1e28 by two thirds, also in float32."""
    params, y = counts(100, jnp.float32)
    start = jnp.full(y.shape, 60.0, jnp.float32)
    for iterations in (1, 3, 10, 30):
        info = elkax.iterated_smoother(params, y, start=start, max_iters=iterations).info
        assert not info.converged and info.cost > 1e5


def kinked(seed):
    rng = np.random.default_rng(seed)
    z, states = 0.5, []
    for _ in range(60):
        z = max(0.95 * z - 0.08, 0) + 0.1 * rng.normal()
        states.append(z)
    return np.array(states)[:, None] + 0.2 * rng.normal(size=(60, 1))


def test_kinks_end_as_stalled():
    """Where the minimum lies on a kink: at its cost, with a posterior and words, and no NaN."""
    params = gaussian_params(
        [0.5], [[0.1]], lambda z: jnp.maximum(0.95 * z - 0.08, 0), [[0.01]], lambda z: z, [[0.04]]
    )
    emissions = jnp.stack([kinked(seed) for seed in range(8)])
    solution = jax.jit(jax.vmap(partial(elkax.iterated_smoother, params)))(emissions)
    status = np.asarray(solution.info.status)
    assert set(status) == {Status.CONVERGED, Status.STALLED}
    assert np.all(np.isfinite(solution.posterior.smoothed_covariances))
    for y, trajectory in zip(emissions, solution.trajectory, strict=True):
        cost = map_cost(params, y)
        # A kink gives L-BFGS no slope to end by either: from points about the trajectory.
        rng = np.random.default_rng(1)
        ends = [polished(cost, trajectory + 1e-3 * rng.normal(size=(60, 1))) for _ in range(5)]
        assert cost(trajectory) - min(ends) < 2e-2
    assert "of 8 converged" in str(solution.info) and "kink" in str(solution.info)


def test_units_of_the_states_change_nothing():
    """An angle in millionths and a rate in thousands: the same steps."""
    problem = pendulum(T=60)
    unit = jnp.array([1e6, 1e-3])
    params = problem.params
    scaled = params._replace(
        initial_mean=unit * params.initial_mean,
        initial_covariance=unit[:, None] * params.initial_covariance * unit,
        dynamics_function=lambda z: unit * params.dynamics_function(z / unit),
        dynamics_covariance=unit[:, None] * params.dynamics_covariance * unit,
        emission_function=lambda z: params.emission_function(z / unit),
    )
    # Damped from the first step on, so that the damping is compared and not only Newton's steps.
    damping = LevenbergMarquardt(longest=0.5)
    smooth = partial(elkax.iterated_smoother, damping=damping, **SEQUENTIAL)
    one = smooth(params, problem.emissions, start=jnp.zeros(2))
    other = smooth(scaled, problem.emissions, start=jnp.zeros(2))
    assert one.info.converged and one.info.iterations == other.info.iterations
    np.testing.assert_allclose(other.trajectory / unit, one.trajectory, atol=1e-7)


TURN = coordinated_turn(T=300)


@jax.jit
def smooth_turn(start):
    return elkax.iterated_smoother(
        TURN.params, TURN.emissions, start=start, residual=wrap, history=True, **SEQUENTIAL
    ).info


@jax.jit
def smooth_turn_undamped(start):
    return elkax.iterated_smoother(
        TURN.params,
        TURN.emissions,
        start=start,
        residual=wrap,
        damping=elkax.GaussNewton(),
        **SEQUENTIAL,
    ).info


@pytest.mark.parametrize("where", ["zeros", "initial mean"])
def test_turn_takes_at_most_twice_the_undamped_iterations(where):
    """The cost never rises, which undamped ones may let it."""
    start = jnp.zeros((300, 5)) + (0 if where == "zeros" else TURN.params.initial_mean)
    info, undamped = smooth_turn(start), smooth_turn_undamped(start)
    assert info.converged and undamped.converged
    np.testing.assert_allclose(info.cost, undamped.cost, rtol=1e-9)
    assert info.iterations <= 2 * undamped.iterations
    history = np.asarray(info.history.cost)[: int(info.iterations)]
    assert np.all(np.diff(history) <= 1e-11 * history[1:])


def test_sigma_points_arrive_as_undamped_ones_do():
    """Damping is there only where steps get longer."""
    problem = pendulum(T=60)
    run = partial(
        elkax.iterated_smoother,
        problem.params,
        problem.emissions,
        linearizer=SigmaPoints(),
        **SEQUENTIAL,
    )
    damped, undamped = run(), run(damping=elkax.GaussNewton())
    assert damped.info.converged and undamped.info.converged
    assert damped.info.iterations <= undamped.info.iterations + 2
    np.testing.assert_allclose(damped.trajectory, undamped.trajectory, atol=1e-6)
    with pytest.raises(TypeError, match="damping must be .* got TrustRegion"):
        run(damping=elkax.TrustRegion())


def test_a_filter_that_diverged_gives_way_to_the_prior():
    """Finite, but so far off that the counts overflow."""
    params, y = counts(8_000, jnp.float64)
    one = elkax.iterated_smoother(params, y, max_iters=0)
    prior = elkax.iterated_smoother(params, y, max_iters=0, start="prior")
    np.testing.assert_array_equal(one.trajectory, prior.trajectory)


def test_several_starts_and_the_lowest_end():
    problem = ungm(3, T=40)
    call = partial(
        elkax.iterated_smoother, problem.params, problem.emissions, problem.inputs, **SEQUENTIAL
    )
    starts = ["prior", jnp.full(1, 5.0), jnp.full((40, 1), -5.0)]
    best = call(starts=starts)
    alone = [call(start=start) for start in starts]
    costs = np.array([solution.info.cost for solution in alone])
    np.testing.assert_allclose(best.info.starts.cost, costs, rtol=1e-9)
    np.testing.assert_array_equal(best.info.starts.status, [a.info.status for a in alone])
    np.testing.assert_allclose(best.info.cost, costs.min(), rtol=1e-9)
    np.testing.assert_allclose(best.trajectory, alone[costs.argmin()].trajectory, atol=1e-6)
    for wrong in ({"starts": []}, {"starts": "prior"}, {"starts": starts, "start": "prior"}):
        with pytest.raises(ValueError, match="either start or starts"):
            call(**wrong)


def test_excess_is_that_of_chi_square():
    """Twice the least cost of a linear model is the sum of squared innovations."""
    rng = np.random.default_rng(0)
    params = gaussian_params([0.0], [[2.0]], lambda z: 0.9 * z, [[0.5]], lambda z: z, [[0.3]])
    emissions = jnp.asarray(3 * rng.normal(size=(40, 1))).at[5:9].set(jnp.nan)
    info = elkax.iterated_smoother(params, emissions).info
    cov = 2.0 * 0.9 ** np.add.outer(np.arange(40), np.arange(40))
    for s in range(1, 40):
        past = np.where(np.arange(40) >= s, 0.9 ** (np.arange(40) - s), 0.0)
        cov += 0.5 * np.outer(past, past)
    seen = ~np.isnan(np.asarray(emissions[:, 0]))
    y, S = np.asarray(emissions)[seen, 0], (cov + 0.3 * np.eye(40))[np.ix_(seen, seen)]
    expected = (y @ np.linalg.solve(S, y) - 36) / np.sqrt(72)
    np.testing.assert_allclose(info.excess, expected, rtol=1e-9)
    assert expected > 5 and f"{expected:.2g} standard deviations above" in str(info)


def test_words():
    assert [str(status) for status in Status][:2] == ["converged", "max_iters"]
    problem = pendulum(T=60)
    info = elkax.iterated_smoother(problem.params, problem.emissions, max_iters=1).info
    assert not info.converged
    assert str(info).startswith("max_iters: the steps are still long; raise max_iters")
    # Under jit it is what it is, and no error.
    jax.jit(lambda info: str(info) and info.converged)(info)


def test_a_saddle_is_said_to_be_one():
    """A state seen by its square, from zero, where the slope vanishes."""
    params = gaussian_params([0.0], [[1.0]], lambda z: 0.5 * z, [[1.0]], lambda z: z**2, [[0.1]])
    emissions = jnp.full((4, 1), 4.0)
    solution = elkax.iterated_smoother(params, emissions, start=jnp.zeros(1))
    assert solution.info.status == Status.CONVERGED
    assert solution.check(params, emissions).status == Status.SADDLE
    assert "not positive definite" in str(solution.check(params, emissions))
    away = elkax.iterated_smoother(params, emissions, start=jnp.ones(1))
    assert away.check(params, emissions).status == Status.CONVERGED
