"""dynamax where dynamax is right: same calls, same conventions, same numbers."""

import inspect

import dynamax.linear_gaussian_ssm.inference as dynamax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from problems import random_stable, varying, with_inputs

# dynamax adds 1e-9 to the diagonal of what it inverts; variances here are of order one.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    for name in theirs._fields:
        expected, actual = getattr(theirs, name), getattr(ours, name)
        if expected is None:
            assert actual is None, name
        else:
            assert actual.shape == expected.shape, name
            assert actual.dtype == expected.dtype, name
            np.testing.assert_allclose(actual, expected, err_msg=name, **TOLERANCE)


PROBLEMS = {
    "time-varying with inputs": varying,
    "time-invariant with inputs": with_inputs,
    "biases None": lambda: random_stable(3, 2, 7),
    "R of shape (N,)": lambda: random_stable(1, 2, 7, diagonal="constant"),
    "R of shape (T, N)": lambda: random_stable(1, 2, 7, diagonal="varying"),
    "one step": lambda: varying(T=1),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_filter_and_smoother(name):
    problem = PROBLEMS[name]()
    assert_same(jax.jit(elkax.lgssm_smoother)(*problem), jax.jit(dynamax.lgssm_smoother)(*problem))
    if name == "time-varying with inputs":
        assert_same(jax.jit(elkax.lgssm_filter)(*problem), jax.jit(dynamax.lgssm_filter)(*problem))


def test_emission_covariance_with_as_many_sensors_as_steps():
    """A square R is a full covariance, even where it could be T diagonals."""
    problem = random_stable(2, 3, 3)
    with pytest.warns(UserWarning, match="Emission covariance"):
        theirs = dynamax.lgssm_smoother(*problem)
    assert_same(elkax.lgssm_smoother(*problem), theirs)


def test_callables_of_time_with_inputs():
    problem = varying()
    p = problem.params
    params = p._replace(
        dynamics=p.dynamics._replace(
            weights=lambda t: p.dynamics.weights[t], bias=lambda t: p.dynamics.bias[t]
        ),
        emissions=p.emissions._replace(weights=lambda t: p.emissions.weights[t]),
    )
    problem = problem._replace(params=params)

    def smooth(module, emissions, inputs):
        return module.lgssm_smoother(params, emissions, inputs)

    # dynamax reads the shape of the emission weights, which a callable does not have.
    theirs = dynamax.lgssm_smoother(p, problem.emissions, problem.inputs)
    assert_same(smooth(elkax, problem.emissions, problem.inputs), theirs)
    under_jit = jax.jit(lambda y, u: smooth(elkax, y, u))(problem.emissions, problem.inputs)
    assert_same(under_jit, theirs)


FUNCTIONS = ["lgssm_filter", "lgssm_smoother", "lgssm_posterior_sample", "lgssm_joint_sample"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_begins_with_the_one_of_dynamax(name):
    """Same names in the same order; whatever is added is keyword-only."""
    theirs = list(inspect.signature(getattr(dynamax, name)).parameters.values())
    ours = list(inspect.signature(getattr(elkax, name)).parameters.values())
    positional = [p for p in ours if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [p.name for p in positional] == [p.name for p in theirs]
    assert [p.default for p in positional] == [p.default for p in theirs]


def test_import_leaves_the_configuration_alone():
    """Importing dynamax sets the precision of matrix products; importing elkax must not."""
    import subprocess
    import sys

    program = (
        "import jax, elkax\n"
        "print(jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["None", "False"], done.stderr


def test_emissions_of_smaller_precision_keep_it():
    """Float32 in, float32 out, although x64 is on."""
    problem = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), with_inputs())
    posterior = elkax.lgssm_smoother(*problem)
    assert {leaf.dtype for leaf in jax.tree.leaves(posterior)} == {jnp.dtype("float32")}
