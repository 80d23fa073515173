"""Which method evaluates a recurrence when none is named, and why."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from elkax.linearize import Full, Structure
from elkax.recurrences.method import DEER, Method, QuasiDEER
from elkax.recurrences.plan import WINDOW
from elkax.recurrences.prepare import Arguments, Cell, declared_structure, prepare
from elkax.recurrences.problem import Problem
from elkax.recurrences.state_types import separate
from elkax.scan import Sequential

# Up to this dimension a whole Jacobian costs less than the iterations that it saves.
DENSE = 16
# Fewer steps are not worth an iteration.
SHORT = 256
# Steps on which it is tried whether a recurrence contracts.
SAMPLE = 64


class Choice(NamedTuple):
    """A method, and why it is taken.

    Attributes:
        method: the method.
        reason: one sentence.
    """

    method: Method | Sequential
    reason: str


def choose_method(
    *,
    num_timesteps: int,
    state_dim: int,
    platform: str | None = None,
    structure: Structure | None = None,
    contracts: bool | None = None,
) -> Choice:
    """Name the method for a recurrence.

    On a CPU `Sequential`: a step of `jax.lax.scan` takes about 0.1 microseconds there. Elsewhere,
    by reasoning and not by measurement, Newton's method where the whole Jacobian is cheap, that is
    for D <= 16 or a structure that the cell states, and where the recurrence does not contract,
    so that quasi-Newton steps would not converge; else quasi-DEER.

    Args:
        num_timesteps: T.
        state_dim: D.
        platform: "cpu", "gpu" or "tpu"; by default the one JAX computes on.
        structure: one that holds all of the Jacobian, None if that is not known.
        contracts: whether neighbouring trajectories approach each other, None if that is not known.
    """
    platform = platform or jax.default_backend()
    if platform == "cpu":
        return Choice(Sequential(), "on a CPU one step after the other is fastest")
    if num_timesteps < SHORT:
        return Choice(Sequential(), f"T = {num_timesteps} steps are too few to gain by iterating")
    if structure is not None:
        return Choice(Method(structure), f"the cell states its Jacobian, {structure}: Newton steps")
    if state_dim <= DENSE:
        return Choice(DEER(), f"a Jacobian of D = {state_dim} is cheap to keep: Newton steps")
    if contracts is False:
        return Choice(DEER(), "the recurrence does not contract, so quasi-Newton steps diverge")
    known = "contracts" if contracts else "may contract"
    return Choice(QuasiDEER(), f"D = {state_dim} is large and the recurrence {known}")


def choose_for(arguments: Arguments, platform: str | None = None) -> Choice:
    """Name the method for checked arguments; whether they contract is tried if they are known."""
    leaves = jax.tree.leaves(arguments.initial)
    if not arguments.has_one_type():
        if (platform or jax.default_backend()) == "cpu":
            return choose_method(num_timesteps=arguments.length, state_dim=1, platform="cpu")
        try:
            separated = separate(arguments)
        except TypeError:
            return Choice(Sequential(), "the types of the state depend on each other")
        if separated is None:
            return Choice(Sequential(), "no entry of the state is a real number")
        return choose_for(separated.arguments, platform)
    size = sum(leaf.size for leaf in leaves)
    choice = {
        "num_timesteps": arguments.length,
        "state_dim": size,
        "platform": platform,
        "structure": declared_structure(arguments.cell),
    }
    first = choose_method(**choice)
    leaves = jax.tree.leaves(arguments)
    known = not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if not (known and isinstance(first.method, Method) and size > DENSE):
        return first
    return choose_method(**choice, contracts=bool(_contracts(arguments)))


def _contracts(arguments: Arguments) -> Array:
    """Tell whether a small change of the first state has faded after the first steps."""
    problem, _ = arguments.flatten()
    xs = jax.tree.map(lambda leaf: leaf[:SAMPLE], problem.inputs)
    flat = problem.initial

    def end(state: Array) -> Array:
        return Problem(problem.step, state, xs).run()[-1]

    change = jax.random.rademacher(jax.random.key(0), flat.shape, flat.dtype)
    return jnp.linalg.norm(jax.jvp(end, (flat,), (change,))[1]) < jnp.linalg.norm(change)


def explain(
    cell: Cell,
    initial_state: PyTree,
    inputs: PyTree = None,
    *,
    num_timesteps: int | None = None,
    length: ArrayLike | None = None,
    platform: str | None = None,
) -> str:
    """Say which method `evaluate_recurrence` takes when none is named, and why.

    Args:
        cell: as `evaluate_recurrence`.
        initial_state: as there.
        inputs: as there.
        num_timesteps: as there.
        length: as there.
        platform: "cpu", "gpu" or "tpu"; by default the one JAX computes on.

    Raises:
        TypeError: as `evaluate_recurrence`.
        ValueError: as `evaluate_recurrence`.
    """
    arguments = prepare(cell, initial_state, inputs, num_timesteps, length)
    method, reason = choose_for(arguments, platform)
    if isinstance(method, Method):
        kept = "the whole Jacobian" if isinstance(method.jacobian, Full) else method.jacobian
        lost = ""
        if method.damping is None and arguments.length > 2 * WINDOW:
            lost = (
                f". Once guesses are lost, steps over the whole and in windows of {WINDOW} go on "
                "side by side until one has arrived"
            )
        return f"Newton's iteration with {kept}: {reason}{lost}."
    return f"{type(method).__name__}: {reason}."
