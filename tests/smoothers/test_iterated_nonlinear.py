"""Levenberg-Marquardt smoothing of nonlinear models against dense algebra and SciPy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dynamax.linear_gaussian_ssm import PosteriorGSSMSmoothed
from scipy.optimize import minimize

import elkax
from elkax import GaussNewton, LevenbergMarquardt, LineSearch, SigmaPoints, Status, TrustRegion
from nonlinear_problems import (
    coordinated_turn,
    gaussian_params,
    map_cost,
    polished,
    simulate,
    ungm,
    ungm_dynamics,
    ungm_emission,
    wrap,
)
from smoothers.linear_checks import BACKENDS, within


def swing(z):
    return jnp.stack([z[0] + 0.2 * z[1], z[1] - 0.6 * jnp.sin(z[0])])


def look(z):
    return jnp.stack([jnp.sin(z[0]), z[0] * z[1]])


EYE = np.eye(2)
SWING = gaussian_params([1.0, 0.0], 0.3 * EYE, swing, 0.05 * EYE + 0.02, look, 0.1 * EYE)
T = 12
STATES, EMISSIONS = simulate(SWING, T, 1)
EMISSIONS = jnp.asarray(EMISSIONS)
START = jnp.asarray(STATES + 0.3 * np.random.default_rng(0).normal(size=STATES.shape))


@jax.jit
def derivatives(trajectory):
    """Gradient and Hessian of the cost, and the Jacobian of the whitened residuals."""
    cost = map_cost(SWING, EMISSIONS)

    def stacked(z):
        e = (z[1:] - jax.vmap(swing)(z[:-1])) @ jnp.linalg.inv(
            jnp.linalg.cholesky(SWING.dynamics_covariance)
        ).T
        v = (EMISSIONS - jax.vmap(look)(z)) / jnp.sqrt(0.1)
        return jnp.concatenate([(z[0] - SWING.initial_mean) / jnp.sqrt(0.3), e.ravel(), v.ravel()])

    return (
        jax.grad(cost)(trajectory),
        jax.hessian(cost)(trajectory),
        jax.jacfwd(stacked)(trajectory),
    )


def dense_step(start, strength, second_order):
    """One damped step by the stacked normal equations in NumPy, from JAX's own derivatives."""
    gradient, hessian, J = map(np.asarray, derivatives(start))
    J = J.reshape(-1, start.size)
    gauss_newton = J.T @ J
    reference = np.max(np.diag(gauss_newton).reshape(start.shape), axis=0)
    matrix = hessian.reshape(start.size, start.size) if second_order else gauss_newton
    matrix = matrix + strength * np.diag(np.tile(reference, len(start)))
    return np.asarray(start) - np.linalg.solve(matrix, gradient.ravel()).reshape(start.shape)


@pytest.mark.parametrize("second_order", [False, True])
def test_one_step_is_the_dense_one(second_order):
    """Damped enough for the second derivatives to leave every block positive definite."""
    damping = LevenbergMarquardt(longest=0.0, second_order=second_order)
    smooth = partial(elkax.iterated_smoother, SWING, damping=damping, max_iters=1)
    solution = jax.jit(lambda y, start: smooth(y, start=start))(EMISSIONS, START)
    assert solution.info.status == Status.MAX_ITERS and solution.info.iterations == 1
    expected = dense_step(START, 1.0, second_order)
    within(solution.trajectory, expected, 1e-9, "states")


@cache
def swing_solution(backend, form, damping):
    smooth = partial(
        elkax.iterated_smoother,
        SWING,
        damping=damping,
        max_iters=60,
        backend=BACKENDS[backend],
        form=form,
        history=True,
    )
    return jax.jit(lambda y, start: smooth(y, start=start))(EMISSIONS, START)


@pytest.mark.parametrize(
    "backend, form", [("blocked", "covariance"), ("sequential", "square_root")]
)
def test_backends_and_forms_take_the_same_steps(backend, form):
    """Every iteration."""
    one = swing_solution("sequential", "covariance", LevenbergMarquardt())
    other = swing_solution(backend, form, LevenbergMarquardt())
    assert one.info.iterations == other.info.iterations
    np.testing.assert_allclose(one.info.history.cost, other.info.history.cost, rtol=1e-9)
    np.testing.assert_allclose(one.trajectory, other.trajectory, atol=1e-9)
    for ours, theirs in zip(one.posterior, other.posterior, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-9)


def check_minimum(solution):
    """SciPy does not lower it, the cost is the cost, and the posterior is centred on it."""
    cost = map_cost(SWING, EMISSIONS)
    assert solution.info.status == Status.CONVERGED
    np.testing.assert_allclose(solution.info.cost, cost(solution.trajectory), rtol=1e-12)
    assert cost(solution.trajectory) - polished(cost, solution.trajectory) < 1e-9
    within(solution.posterior.smoothed_means, np.asarray(solution.trajectory), 1e-6, "means")
    history = np.asarray(solution.info.history.cost)[: int(solution.info.iterations)]
    assert np.all(np.diff(history) <= 1e-12 * (1 + np.abs(history[1:])))


def test_solution_is_a_minimum():
    check_minimum(swing_solution("blocked", "covariance", LevenbergMarquardt()))


def test_line_search_finds_the_same_minimum():
    solution = swing_solution("sequential", "covariance", LevenbergMarquardt())
    other = swing_solution("sequential", "covariance", LineSearch())
    assert other.info.status == Status.CONVERGED
    np.testing.assert_allclose(other.trajectory, solution.trajectory, atol=1e-6)


def test_trust_region_finds_a_minimum():
    check_minimum(swing_solution("sequential", "covariance", TrustRegion()))


@cache
def growth():
    problems = [ungm(seed) for seed in range(50)]
    return problems[0], jnp.stack([problem.emissions for problem in problems])


def smooth_growth(damping, max_iters, history):
    problem, emissions = growth()

    def smooth(y):
        return elkax.iterated_smoother(
            problem.params,
            y,
            problem.inputs,
            damping=damping,
            max_iters=max_iters,
            history=history,
            backend=elkax.Sequential(),
        )

    return jax.jit(jax.vmap(smooth))(emissions)


def growth_cost(z, y):
    """Written out once more for the model with numbers in it."""
    problem, _ = growth()
    e = z[1:] - ungm_dynamics(z[:-1], problem.inputs[1:, 0])
    return (z[0] ** 2 / 5 + jnp.sum(e**2) / 10 + jnp.sum((y - ungm_emission(z, 0)) ** 2)) / 2


def test_growth_model_always_reaches_a_stationary_point():
    """UNGM, 50 seeds: monotone, stationary, and not lowered by L-BFGS from there."""
    _, emissions = growth()
    solution = smooth_growth(LevenbergMarquardt(), 300, True)
    assert np.all(solution.info.status == Status.CONVERGED)
    z, y = solution.trajectory[..., 0], emissions[..., 0]
    gradient = jax.jit(jax.vmap(jax.grad(growth_cost)))(z, y)
    hessian = jax.jit(jax.vmap(jax.hessian(growth_cost)))(z, y)
    scale = np.sqrt(np.abs(np.diagonal(hessian, axis1=1, axis2=2)))
    assert np.max(np.abs(gradient) / scale) < 1e-6
    # Minima, not saddle points.
    assert np.min(np.linalg.eigvalsh(hessian)) > 0
    cost = np.asarray(solution.info.history.cost)
    fall = cost[:, 1:] - cost[:, :-1]
    assert np.all((fall <= 1e-12 * (1 + np.abs(cost[:, 1:]))) | np.isnan(fall))
    costs = np.asarray(jax.vmap(growth_cost)(z, y))
    np.testing.assert_allclose(solution.info.cost, costs, rtol=1e-12)
    value = jax.jit(jax.value_and_grad(growth_cost))
    for seed in range(50):
        # A smaller tolerance of the gradient sends the first step of L-BFGS, which has length one,
        # to other basins.
        result = minimize(
            lambda x, seed=seed: tuple(np.asarray(part) for part in value(x, y[seed])),
            np.asarray(z[seed]),
            jac=True,
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-5},
        )
        assert costs[seed] - result.fun < 1e-6
    print(
        f"UNGM: median cost {np.median(costs):.1f}, iterations median "
        f"{np.median(solution.info.iterations):.0f}, most {np.max(solution.info.iterations)}"
    )


def test_growth_model_without_damping_does_not():
    """What the damping is for: Gauss-Newton neither arrives nor says that it did."""
    solution = smooth_growth(GaussNewton(), 100, False)
    print(f"UNGM, Gauss-Newton: converged {np.sum(solution.info.status == 0)} of 50")
    assert np.sum(solution.info.status == Status.CONVERGED) <= 5


def test_coordinated_turn_from_any_start():
    """Bearings only, wrapped; from zeros, from m0, and from the truth plus N(0, I)."""
    problems = [coordinated_turn(r, T=200) for r in (0.5, 0.05)]
    params = problems[0].params
    rng = np.random.default_rng(1)
    noisy = [problem.states + rng.standard_normal(problem.states.shape) for problem in problems]
    mean = np.broadcast_to(np.asarray(params.initial_mean), noisy[0].shape)
    starts = jnp.asarray([[0 * mean, mean, start] for start in noisy])

    def smooth(R, y, start):
        return elkax.iterated_smoother(
            params._replace(emission_covariance=R),
            y,
            start=start,
            residual=wrap,
            max_iters=200,
            history=True,
        )

    R = jnp.stack([problem.params.emission_covariance for problem in problems for _ in range(3)])
    y = jnp.stack([problem.emissions for problem in problems for _ in range(3)])
    runs = jax.jit(jax.vmap(smooth))(R, y, starts.reshape(6, *mean.shape))
    solution = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), runs)
    assert np.all(solution.info.status == Status.CONVERGED)
    cost = np.asarray(solution.info.history.cost)
    fall = cost[..., 1:] - cost[..., :-1]
    assert np.all((fall <= 1e-12 * (1 + np.abs(cost[..., 1:]))) | np.isnan(fall))
    for i, problem in enumerate(problems):
        function = map_cost(problem.params, problem.emissions, residual=wrap)
        best = np.argmin(solution.info.cost[i])
        trajectory = solution.trajectory[i, best]
        np.testing.assert_allclose(solution.info.cost[i, best], function(trajectory), rtol=1e-9)
        # Of a cost of about 200 nats.
        assert function(trajectory) - polished(function, trajectory) < 1e-6
    print("coordinated turn: costs", np.round(np.asarray(solution.info.cost), 4).tolist())


def test_sigma_points_arrive_at_their_own_fixed_point():
    """From a trajectory without covariances; starting at the result gives it back."""

    @jax.jit
    def smooth(y, means, covs):
        start = PosteriorGSSMSmoothed(jnp.zeros(()), means, covs, means, covs)
        return elkax.iterated_smoother(
            SWING,
            y,
            start=start,
            max_iters=100,
            linearizer=SigmaPoints(),
            backend=elkax.Sequential(),
        )

    first = smooth(EMISSIONS, START, jnp.zeros((T, 2, 2)))
    assert first.info.status == Status.CONVERGED
    within(first.posterior.smoothed_means, np.asarray(first.trajectory), 1e-6, "means")
    again = smooth(EMISSIONS, first.posterior.smoothed_means, first.posterior.smoothed_covariances)
    for one, other in zip(first.posterior, again.posterior, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_dynamics_that_diverge_are_reported():
    """NaN ahead of the start: status nonfinite, and the last finite trajectory comes back."""
    params = gaussian_params(
        [1.0], [[1.0]], lambda z: jnp.log(z - 3.0), [[1.0]], lambda z: z, [[1.0]]
    )
    emissions = jnp.ones((5, 1))
    smooth = jax.jit(lambda start: elkax.iterated_smoother(params, emissions, start=start))
    solution = smooth(jnp.full((5, 1), 2.0))
    assert solution.info.status == Status.NONFINITE
    np.testing.assert_array_equal(solution.trajectory, np.full((5, 1), 2.0))
    # Where the functions are defined at the start, steps out of their domain are turned down.
    solution = smooth(jnp.full((5, 1), 3.5))
    assert np.all(np.isfinite(solution.trajectory)) and np.isfinite(solution.info.cost)
