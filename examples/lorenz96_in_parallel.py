"""Lorenz-96 evaluated in parallel over time, and where each method stands after every iteration.

    python examples/lorenz96_in_parallel.py
    python examples/lorenz96_in_parallel.py --steps 300 --output residuals.png

The system is chaotic: far from the trajectory Newton's method (DEER) throws the tail away, restarts
its guesses, and goes on with short windows behind what has converged; quasi-DEER, which keeps the
diagonal of the Jacobian alone, advances more slowly. One picture shows both: residuals over time
steps and iterations.
"""

import argparse

import jax
import jax.numpy as jnp

import elkax
from elkax.plotting import plot_residuals


def lorenz96(state, _, forcing=8.0, dt=0.01):
    """One step of the classical Runge-Kutta method."""

    def rate(s):
        return (jnp.roll(s, -1) - jnp.roll(s, 2)) * jnp.roll(s, 1) - s + forcing

    k1 = rate(state)
    k2 = rate(state + 0.5 * dt * k1)
    k3 = rate(state + 0.5 * dt * k2)
    k4 = rate(state + dt * k3)
    return state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", default="lorenz96_in_parallel.png")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    start = 8.0 + jax.random.normal(jax.random.key(0), (5,))
    options = {"num_timesteps": arguments.steps, "history": True}
    exact = elkax.evaluate_recurrence(
        lorenz96, start, num_timesteps=arguments.steps, method=elkax.Sequential()
    ).states
    exponent = elkax.lyapunov_exponent(lorenz96, start, None, exact, num_timesteps=arguments.steps)
    print(f"largest Lyapunov exponent {exponent:.4f} per step")
    methods = {"DEER": elkax.DEER(), "quasi-DEER": elkax.QuasiDEER()}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, (name, method) in zip(axes, methods.items(), strict=True):
        solution = elkax.evaluate_recurrence(lorenz96, start, method=method, **options)
        info = solution.info
        error = jnp.max(jnp.abs(solution.states - exact))
        print(
            f"{name}: {elkax.Status(int(info.status)).name}, {info.iterations} iterations, "
            f"{info.sweeps:.1f} sweeps, {info.resets} restarts, error {error:.1e} "
            f"(bound {jnp.max(info.error_bound):.1e})"
        )
        image = plot_residuals(ax, info.history.residual)
        ax.set_title(f"{name}: {info.iterations} iterations")
    figure.colorbar(image, ax=axes, label="residual, power of ten")
    figure.savefig(arguments.output, dpi=120)


if __name__ == "__main__":
    main()
