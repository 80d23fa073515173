"""Nonlinear models with exact dynamics or an exact start, against problems without the constraint.

Where Q has no noise in some direction the states are functions of what is left: SciPy minimises
over that, and the constraints hold by construction.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

import elkax
from elkax import LevenbergMarquardt, Status
from nonlinear_problems import gaussian_params, horizontal, pendulum_dynamics, simulate
from smoothers.linear_checks import within

T = 15


pendulum = partial(pendulum_dynamics, dt=0.2, g=5.0)

PROBLEMS = {
    "position is exact": ([[0.0, 0.0], [0.0, 0.3]], np.eye(2)),
    "known start": ([[0.2, 0.0], [0.0, 0.3]], np.zeros((2, 2))),
    "no noise in the dynamics": (np.zeros((2, 2)), 0.5 * np.eye(2)),
}


def smooth(damping):
    def run(Q, P0, emissions, start):
        params = gaussian_params(MEAN, np.eye(2), pendulum, np.eye(2), horizontal, [[0.1]])
        params = params._replace(dynamics_covariance=Q, initial_covariance=P0)
        return elkax.iterated_smoother(
            params,
            emissions,
            damping=damping,
            start=start,
            max_iters=200,
            history=True,
            backend=elkax.Sequential(),
        )

    return jax.jit(jax.vmap(run))


MEAN = np.array([1.2, 0.0])


def reduced(Q, P0, emissions, trajectory):
    """What SciPy makes of a trajectory, over start and noise in units of their spread.

    Returns the cost and the trajectory that the noise of the given one leads to, and the cost of
    the minimum that is found from there.
    """
    root, start = (np.sqrt(np.diagonal(np.asarray(x))) for x in (Q, P0))

    def unfold(x):
        w = x.reshape(T, 2)

        def step(z, w):
            z = pendulum(z) + root * w
            return z, z

        first = MEAN + start * w[0]
        return jnp.concatenate([first[None], jax.lax.scan(step, first, w[1:])[1]])

    @jax.jit
    @jax.value_and_grad
    def cost(x):
        v = emissions - jnp.sin(unfold(x)[:, :1])
        return 0.5 * jnp.sum(x**2) + 0.5 * jnp.sum(v**2) / 0.1

    z = np.asarray(trajectory)
    errors = z - np.concatenate([MEAN[None], np.asarray(jax.vmap(pendulum)(z[:-1]))])
    scale = np.concatenate([start[None], np.broadcast_to(root, (T - 1, 2))])
    noise = np.where(scale > 0, errors / np.where(scale > 0, scale, 1.0), 0.0)
    best = minimize(
        lambda x: tuple(np.asarray(part) for part in cost(x)),
        noise.ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-6},
    )
    return cost(noise.ravel())[0], np.asarray(unfold(noise.ravel())), best.fun


def test_singular_models_reach_a_constrained_minimum():
    """From a constant trajectory, which violates the dynamics at every step."""
    Q = np.stack([np.asarray(Q) for Q, _ in PROBLEMS.values()])
    P0 = np.stack([P0 for _, P0 in PROBLEMS.values()])
    emissions = []
    for q, p in zip(Q, P0, strict=True):
        params = gaussian_params(MEAN, p, pendulum, q, horizontal, [[0.1]])
        emissions.append(simulate(params, T, 3)[1])
    emissions = np.stack(emissions)
    start = np.broadcast_to(MEAN, (len(Q), T, 2))
    solution = smooth(LevenbergMarquardt())(*map(jnp.asarray, (Q, P0, emissions, start)))
    for i, name in enumerate(PROBLEMS):
        cost, unfolded, lowest = reduced(Q[i], P0[i], emissions[i], solution.trajectory[i])
        assert solution.info.status[i] == Status.CONVERGED, name
        assert solution.info.constraint_residual[i] < 1e-9, name
        # The trajectory is the one that its noise leads to, and that noise is the best nearby.
        within(solution.trajectory[i], unfolded, 1e-6, name)
        np.testing.assert_allclose(solution.info.cost[i], cost, rtol=1e-8, err_msg=name)
        assert cost - lowest < 1e-6 * (1 + cost), name
