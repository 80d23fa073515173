"""A long series in float32 against the same in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import elkax
from elkax import Status
from nonlinear_problems import gaussian_params, simulate
from smoothers.linear_checks import within

T = 10_000


def spiral(z):
    return jnp.stack([z[0] + 0.2 * z[1], 0.9 * z[1] - 0.3 * jnp.sin(z[0])])


def look(z):
    return z[:1] + 0.2 * z[1:] ** 2


def test_float32_stays_near_float64():
    """In blocks, against float64 one step at a time; tolerances in posterior deviations."""
    params = gaussian_params([1.0, 0.0], np.eye(2), spiral, np.diag([0.01, 0.05]), look, [[0.1]])
    emissions = simulate(params, T, 2)[1]
    names = ("initial_mean", "initial_covariance", "dynamics_covariance", "emission_covariance")

    def smooth(dtype, backend):
        @jax.jit
        def run(arrays, emissions):
            start = arrays["initial_mean"]
            cast = params._replace(**arrays)
            return elkax.iterated_smoother(
                cast, emissions, start=start, max_iters=150, backend=backend
            )

        arrays = {name: getattr(params, name).astype(dtype) for name in names}
        solution = run(arrays, jnp.asarray(emissions, dtype))
        assert solution.info.status == Status.CONVERGED
        assert all(leaf.dtype == dtype for leaf in solution.posterior)
        return solution.trajectory, solution.posterior

    trajectory, exact = smooth(jnp.float64, elkax.Sequential())
    single_trajectory, single = smooth(jnp.float32, elkax.Blocked(num_blocks=32))
    means, covs = np.asarray(exact.smoothed_means), np.asarray(exact.smoothed_covariances)
    sd = np.sqrt(np.diagonal(covs, axis1=1, axis2=2))
    scale = sd[:, :, None] * sd[:, None, :]
    # Measured: 2e-4, 7e-5 and 2e-5.
    within(single_trajectory, np.asarray(trajectory), 5e-3 * sd, "trajectory")
    within(single.smoothed_means, means, 5e-3 * sd, "means")
    within(single.smoothed_covariances, covs, 1e-3 * scale, "covariances")
