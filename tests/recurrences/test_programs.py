"""What the programs keep, and how precisely they multiply, as XLA is told."""

import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

import elkax
from elkax.recurrences.tangent import LARGE
from recurrences import recurrence_problems as problems

T, D = 50, 24
# So many that their whole Jacobians are too many.
MANY = 200_000


def states(cell, state, inputs, **options):
    return elkax.evaluate_recurrence(cell, state, inputs, **options).states


def gradient(cell, state, inputs, **options):
    def loss(*arguments):
        return jnp.sum(jnp.sin(states(*arguments, **options)))

    return jax.grad(loss, (0, 1, 2))(cell, state, inputs)


@cache
def program(function, length=T, **options):
    """Of a cell with matrix products, whose weights are (3, D, D)."""
    problem = problems.gru(length, size=D)
    return jax.jit(partial(function, **options)).lower(*problem[:3]).as_text()


def largest(text):
    """Number of entries of the largest array."""
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    return max(math.prod(int(n) for n in shape[:-1].split("x")) for shape in shapes)


DIAGONAL = {"method": elkax.QuasiDEER(), "gradient": elkax.MatrixFree()}
DAMPED = {"method": elkax.QuasiELK(form="smoother"), "gradient": elkax.MatrixFree()}
WINDOWS = {"method": elkax.DEER(), "gradient": elkax.Implicit(), "window": 5}
DAMPED_WINDOWS = WINDOWS | {"method": elkax.ELK(form="smoother")}
WHOLE = WINDOWS | {"window": None}


@pytest.mark.parametrize("function", [states, gradient], ids=["states", "gradient"])
@pytest.mark.parametrize("options", [WINDOWS, DAMPED_WINDOWS], ids=["undamped", "damped"])
def test_no_whole_jacobians_of_all_steps(options, function):
    """Windows keep 5 Jacobians.

    The most are five trajectories side by side in the error bound.
    """
    assert T * D < largest(program(function, **options)) <= 2 * 5 * T * D < T * D * D


@pytest.mark.parametrize("function", [states, gradient], ids=["states", "gradient"])
@pytest.mark.parametrize("options", [DIAGONAL, DAMPED], ids=["diagonal", "damped diagonal"])
def test_limited_memory_without_whole_jacobians(options, function):
    """Diagonals come from one product with a vector at a time.

    Where the iteration of a derivative does not arrive, so many Jacobians are kept as a limit
    allows, and two gates of the cell beside them.
    """
    most = largest(program(function, MANY, **options))
    assert MANY * D < most <= 2 * LARGE < MANY * D * D


def test_whole_jacobians_would_be_seen():
    assert largest(program(states, **WHOLE)) >= T * D * D


@pytest.mark.parametrize("function", [states, gradient], ids=["states", "gradient"])
@pytest.mark.parametrize(
    "options",
    [
        WHOLE,
        DAMPED_WINDOWS,
        DIAGONAL,
        DIAGONAL | {"method": elkax.QuasiDEER(elkax.BlockDiagonal(4))},
    ],
    ids=["full", "damped", "diagonal", "blocks"],
)
def test_products_are_precise(options, function):
    """A GPU would take TF32 for them, in which Newton's method does not converge."""
    products = re.findall(r"stablehlo\.dot_general.*", program(function, **options))
    assert len(products) >= 3
    for product in products:
        assert "precision = [HIGHEST, HIGHEST]" in product


def dependent_steps(jaxpr):
    """Turns of loops that wait for each other, of one iteration: loops of unknown length once.

    A branch that takes all steps one after the other is where blocks have no summary; apart.
    """
    total = 0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "custom_linear_solve":
            params = {"solve": params["jaxprs"].solve}
        inside = [dependent_steps(part) for part in jaxprs_in_params(params)]
        match equation.primitive.name:
            case "cond":
                total += max((n for n in inside if n < LONG), default=LONG)
            case "scan":
                total += equation.params["length"] * max(1, *inside)
            case _:
                total += sum(inside)
    return total


LONG = 10_000


@pytest.mark.parametrize("size", [4, 20])
@pytest.mark.parametrize("method", [None, "Jacobi", "Picard", "quasi-DEER", "DEER", "quasi-ELK"])
def test_dependent_steps_on_a_gpu(gpu, method, size):
    """Of an iteration and the bound, and of a gradient."""
    problem = problems.gru(LONG, size=size)
    options = {"method": method and problems.METHODS[method]}
    forward, both = (
        dependent_steps(jax.make_jaxpr(partial(function, **options))(*problem[:3]).jaxpr)
        for function in (states, gradient)
    )
    print(f"D = {size}, {method}: iteration and bound {forward}, gradient {both - forward}")
    assert 0 < forward <= 400 and 0 < both - forward <= 400


def test_dependent_steps_would_be_seen(gpu):
    problem = problems.gru(LONG, size=4)
    options = {"method": elkax.DEER(), "window": 48}
    jaxpr = jax.make_jaxpr(partial(states, **options))(*problem[:3]).jaxpr
    assert dependent_steps(jaxpr) >= LONG
