"""Firing rate of a neuron around a reach, from spike counts: a smooth trend seen through Poisson.

The logarithm of the rate is an integrated random walk, and its roughness is estimated by maximising
Laplace's approximation of the likelihood, whose gradient follows the MAP trajectory as it moves.
Counts are of one neuron of the subthalamic nucleus (25 reaches to each side, see the data file).

    python examples/poisson_counts.py                  # draws poisson_counts.png
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tensorflow_probability.substrates.jax as tfp
from scipy.optimize import minimize

import elkax
from elkax.plotting import plot_band, plot_series

DATA = Path(__file__).parent / "data" / "stn_reach_counts.csv"
BIN_SECONDS, TRIALS = 0.02, 25


def log_rate_model(log_roughness, first_count):
    """Put an integrated random walk (log-rate, slope per bin) behind Poisson counts."""
    q = jnp.exp(log_roughness)
    return elkax.ParamsDistributionSSM(
        initial_mean=jnp.array([jnp.log(first_count), 0.0]),
        initial_covariance=jnp.diag(jnp.array([1.0, 0.1])),
        dynamics_function=lambda z: jnp.stack([z[0] + z[1], z[1]]),
        dynamics_covariance=q * jnp.array([[1 / 3, 1 / 2], [1 / 2, 1.0]]),
        emission_distribution=lambda z: tfp.distributions.Poisson(log_rate=z[:1]),
    )


@jax.jit
@jax.value_and_grad
def negative_log_likelihood(log_roughness, counts):
    """Minimise the MAP cost, and approximate the likelihood about the minimum."""
    params = log_rate_model(log_roughness, jnp.mean(counts[:5]))
    trajectory = elkax.iterated_smoother(params, counts).trajectory
    return -elkax.laplace_log_prob(params, counts, trajectory=trajectory)


def fit(counts):
    """Estimate the roughness, and smooth with it; returns it with the solution."""
    found = minimize(
        lambda x: tuple(map(np.asarray, negative_log_likelihood(jnp.asarray(x[0]), counts))),
        x0=[-8.0],
        jac=True,
        bounds=[(-20.0, 0.0)],
    )
    log_roughness = jnp.asarray(found.x[0])
    params = log_rate_model(log_roughness, jnp.mean(counts[:5]))
    return float(log_roughness), elkax.iterated_smoother(params, counts, history=True)


def main(path):
    """Fit both directions, print how the iterations ended, and draw the picture."""
    jax.config.update("jax_enable_x64", True)
    time, *sides = np.genfromtxt(DATA, delimiter=",", skip_header=4).T
    per_second = 1 / (BIN_SECONDS * TRIALS)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for ax, name, color, counts in zip(axes, ("left", "right"), ("C0", "C1"), sides, strict=False):
        log_roughness, solution = fit(jnp.asarray(counts)[:, None])
        info, posterior = solution.info, solution.posterior
        status = elkax.Status(int(info.status)).name.lower()
        print(
            f"{name}: log roughness {log_roughness:.2f}, log-likelihood (linearized) "
            f"{posterior.marginal_loglik:.2f}, {status} after {info.iterations} iterations"
        )
        mean = np.asarray(posterior.smoothed_means[:, 0])
        sd = np.sqrt(np.asarray(posterior.smoothed_covariances[:, 0, 0]))
        limits = [np.exp(mean + sign * 1.645 * sd) * per_second for sign in (-1, 1)]
        plot_series(ax, time, counts * per_second, label="counts")
        rate = np.exp(mean) * per_second
        plot_band(
            ax, time, rate, lower=limits[0], upper=limits[1], color=color, label="rate, 90 % band"
        )
        ax.axvline(0, color="0.6", linewidth=0.8)
        ax.set(title=f"Reach to the {name}", xlabel="time around the reach, ms", ylim=(0, None))
        ax.legend(fontsize="small", loc="upper left")
        cost = np.asarray(info.history.cost)[: int(info.iterations)]
        excess = np.maximum(cost - cost[-1], 1e-16)
        axes[2].semilogy(np.arange(1, len(cost) + 1), excess, "o-", color=color, label=name)
    axes[0].set_ylabel("spikes per second")
    axes[2].set(title="MAP cost above its last value", xlabel="iteration")
    axes[2].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="poisson_counts.png", help="where to save the picture")
    main(parser.parse_args().output)
