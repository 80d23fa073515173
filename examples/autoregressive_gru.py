"""A GRU that feeds on its own output, evaluated in parallel before and after training.

    python examples/autoregressive_gru.py
    python examples/autoregressive_gru.py --steps 1000 --epochs 50

Three hidden units and one output that is the next input: the recurrence of a sampler, whose noise
is drawn beforehand. It is trained, one step ahead, on a noisy sine of period 100. The table says
after how many iterations each method has the trajectory of `jax.lax.scan`. All of them restart the
guesses of a tail that was thrown away; DEER then goes on in short windows, ELK raises its damping
and takes all steps at once.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import elkax

METHODS = {
    "DEER": elkax.DEER(),
    "quasi-DEER": elkax.QuasiDEER(),
    "ELK": elkax.ELK(),
    "quasi-ELK": elkax.QuasiELK(),
}


def initial_weights(key, hidden=3):
    """Draw the weights of the unit and of its output."""
    keys = jax.random.split(key, 4)
    return {
        "recurrent": jax.random.normal(keys[0], (3 * hidden, hidden)) / hidden**0.5,
        "input": jax.random.normal(keys[1], (3 * hidden,)),
        "bias": jnp.zeros(3 * hidden),
        "output": jax.random.normal(keys[2], (hidden,)) / hidden**0.5,
        "log_sd": jnp.asarray(-2.0),
    }


def step(weights, state, noise):
    """Update the hidden units from the last output, and draw the next output."""
    hidden, output = state
    r, z, n = (weights["input"] * output + weights["bias"]).reshape(3, -1)
    ur, uz, un = (weights["recurrent"] @ hidden).reshape(3, -1)
    r, z = jax.nn.sigmoid(r + ur), jax.nn.sigmoid(z + uz)
    hidden = (1 - z) * jnp.tanh(n + r * un) + z * hidden
    return hidden, weights["output"] @ hidden + jnp.exp(weights["log_sd"]) * noise


def train(weights, data, epochs):
    """Maximise the likelihood of the data, each value predicted from those before it."""

    def loss(weights):
        def predict(hidden, output):
            hidden, mean = step(weights | {"log_sd": -jnp.inf}, (hidden, output), 0.0)
            return hidden, mean

        _, means = jax.lax.scan(predict, jnp.zeros(3), data[:-1])
        square = jnp.mean((data[1:] - means) ** 2)
        return weights["log_sd"] + 0.5 * square * jnp.exp(-2 * weights["log_sd"])

    optimizer = optax.adam(1e-2)

    @jax.jit
    def run(weights):
        def epoch(carry, _):
            weights, state = carry
            value, change = jax.value_and_grad(loss)(weights)
            updates, state = optimizer.update(change, state)
            return (optax.apply_updates(weights, updates), state), value

        return jax.lax.scan(epoch, (weights, optimizer.init(weights)), length=epochs)

    (weights, _), losses = run(weights)
    return weights, losses


def report(name, weights, noise):
    """Print what every method needs."""
    start = jnp.zeros(3), jnp.zeros(())
    cell = jax.tree_util.Partial(step, weights)
    exact = elkax.evaluate_recurrence(cell, start, noise, method=elkax.Sequential()).states
    exponent = elkax.lyapunov_exponent(cell, start, noise, exact)
    print(f"{name}: largest Lyapunov exponent {exponent:.3f}")
    for label, method in METHODS.items():
        solution = elkax.evaluate_recurrence(cell, start, noise, method=method)
        info = solution.info
        error = max(
            float(jnp.max(jnp.abs(a - b))) for a, b in zip(solution.states, exact, strict=True)
        )
        print(
            f"  {label}: {elkax.Status(int(info.status)).name}, {info.iterations} iterations, "
            f"{info.sweeps:.1f} sweeps, {info.resets} restarts, error {error:.1e}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=500)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    keys = jax.random.split(jax.random.key(0), 3)
    noise = jax.random.normal(keys[0], (arguments.steps,))
    times = jnp.arange(1000)
    data = jnp.sin(2 * jnp.pi * times / 100) + 0.1 * jax.random.normal(keys[1], times.shape)
    weights = initial_weights(keys[2])
    report("untrained", weights, noise)
    weights, losses = train(weights, data, arguments.epochs)
    print(f"loss {losses[0]:.2f} before and {losses[-1]:.2f} after training")
    report("trained", weights, noise)


if __name__ == "__main__":
    main()
