"""Blocks of steps taken one after the other, as single steps of a coarser recurrence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.recurrences.problem import Problem


def coarsen(problem: Problem, block: int) -> Problem:
    """Return the recurrence of every `block`-th state; the last block may be shorter."""
    if block == 1:
        return problem
    count = -(-problem.length // block)
    padding = count * block - problem.length

    def cut(x: Array) -> Array:
        x = jnp.concatenate((x, jnp.repeat(x[-1:], padding, axis=0)))
        return x.reshape((count, block, *x.shape[1:]))

    inside = jnp.arange(count * block).reshape((count, block)) < problem.length

    def step(state: Array, x: tuple[PyTree, Array]) -> Array:
        return _inside(problem, state, x).run()[-1]

    return Problem(step, problem.initial, (jax.tree.map(cut, problem.inputs), inside))


def refine(problem: Problem, coarse: Problem, ends: Array) -> Array:
    """Return all states (T, D) from those at the ends of the blocks, all blocks at once."""
    if coarse is problem:
        return ends
    blocks = jax.vmap(lambda state, x: _inside(problem, state, x).run())
    states = blocks(coarse.before(ends), coarse.inputs)
    return states.reshape((-1, states.shape[-1]))[: problem.length]


def _inside(problem: Problem, state: Array, x: tuple[PyTree, Array]) -> Problem:
    """Return the recurrence inside one block; where it has no step the state stays."""

    def step(state: Array, x: tuple[PyTree, Array]) -> Array:
        inputs, inside = x
        return jnp.where(inside, problem.step(state, inputs), state)

    return Problem(step, state, x)
