"""The contract of `evaluate_recurrence`: every method against `lax.scan`, and what it says."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import elkax
from recurrences import recurrence_problems as problems
from recurrences.recurrence_problems import CHAOTIC, SOLVABLE, Problem, T, errors, flat_problem

EPS = np.finfo(float).eps
TOLERANCE = EPS**0.75

METHODS = problems.METHODS | {
    "ELK smoother": elkax.ELK(elkax.ConstantDamping(1e-3), form="smoother"),
}


def check(problem, solution, tolerance=TOLERANCE):
    """What a solution says of itself is so; return whether it says that it has converged."""
    states, info = solution
    exact = problem.scan()
    chex.assert_trees_all_equal_shapes_and_dtypes(states, exact)
    gap, scale = problem.residual(states)
    # f may be rounded otherwise where it is evaluated by another program.
    rounding = 20 * np.finfo(scale.dtype).eps
    relative = np.max(gap / scale)
    np.testing.assert_allclose(info.residual, relative, rtol=1e-3, atol=rounding)
    if info.status not in (elkax.Status.CONVERGED, elkax.Status.ILL_CONDITIONED):
        return False
    assert relative <= tolerance + rounding
    assert info.prefix == problem.length
    if info.status == elkax.Status.CONVERGED:
        assert np.all(errors(states, exact) <= info.error_bound)
    return info.status == elkax.Status.CONVERGED


@pytest.mark.parametrize("name", [*SOLVABLE, CHAOTIC])
@pytest.mark.parametrize("method", METHODS)
def test_matches_sequential(method, name):
    problem = flat_problem(name)
    solution = problem.evaluate(method=METHODS[method], max_iters=400)
    converged = check(problem, solution)
    # An error of one rounding grows to 3e-4 in the chaos of these 60 steps.
    assert converged == (name != CHAOTIC)


GRU = problems.gru()


def test_states_and_inputs_may_be_pytrees():
    problem = problems.pytree()
    assert check(problem, problem.evaluate(method=elkax.DEER()))


def test_states_of_an_lstm():
    """A tuple; the Jacobian is kept in one block for h and one for c."""
    problem = problems.lstm()
    assert check(problem, problem.evaluate(method=elkax.QuasiDEER(elkax.BlockDiagonal(2))))


def test_another_backend():
    """Filter, backward pass and error bound by combination alone."""
    method = elkax.QuasiELK(form="smoother")
    assert check(GRU, GRU.evaluate(method=method, backend=elkax.Associative()))


def test_jit_and_vmap():
    """Every sequence of a batch as if alone, whatever the others take."""
    rng = np.random.default_rng(13)
    inputs = jnp.asarray(np.array([0.0, 1.0, 3.0])[:, None, None] * rng.normal(size=(3, T, 2)))

    def run(inputs):
        return GRU._replace(inputs=inputs).evaluate(method=elkax.QuasiDEER())

    together = jax.jit(jax.vmap(run))(inputs)
    for i in range(3):
        alone = run(inputs[i])
        assert check(GRU._replace(inputs=inputs[i]), jax.tree.map(lambda x, i=i: x[i], together))
        assert alone.info.iterations == together.info.iterations[i]
    assert len(set(np.asarray(together.info.iterations))) > 1


@pytest.mark.parametrize(
    "method",
    [*METHODS.values(), elkax.QuasiELK(form="smoother")],
    ids=[*METHODS, "quasi-ELK smoother"],
)
def test_many_sequences(method):
    """Enough of them to lie in the lanes, where some arrays have a sequence axis and some none."""
    inputs = jnp.asarray(np.random.default_rng(14).normal(size=(9, 16, 2)))

    def run(inputs):
        problem = GRU._replace(inputs=inputs, length=16)
        return problem.evaluate(method=method, max_iters=100)

    together = jax.jit(jax.vmap(run))(inputs)
    np.testing.assert_array_equal(together.info.status, elkax.Status.CONVERGED)
    for i in range(9):
        exact = GRU._replace(inputs=inputs[i], length=16).scan()
        assert np.all(errors(together.states[i], exact) <= together.info.error_bound[i])


def test_a_single_step():
    problem = GRU._replace(inputs=GRU.inputs[:1], length=1)
    solution = problem.evaluate(method=METHODS["ELK smoother"])
    assert check(problem, solution) and solution.info.iterations == 1


def test_step_by_step():
    solution = GRU.evaluate(method=elkax.Sequential())
    np.testing.assert_allclose(solution.states, GRU.scan(), rtol=1e-14)
    info = solution.info
    assert info.status == elkax.Status.CONVERGED and info.prefix == T and info.sweeps == 1.0
    # A bound takes all Jacobians: only where one is asked for.
    assert np.all(np.isnan(info.error_bound)) and info.residual == 0.0


def test_a_bound_step_by_step():
    """Of what rounding has done, where an error tolerance is named; derivatives are as without."""
    problem = problems.gru(dtype=jnp.float32)

    def total(cell, **options):
        solution = problem._replace(cell=cell).evaluate(method=elkax.Sequential(), **options)
        return jnp.sum(solution.states), solution

    grad = jax.grad(total, has_aux=True)
    slope, (states, info) = grad(problem.cell, error_tolerance=1e-3)
    assert info.status == elkax.Status.CONVERGED and info.residual <= 1e-6
    cell, state, inputs = jax.tree.map(lambda leaf: leaf.astype(float), problem[:3])
    gap = errors(states, problems.sequential(cell, state, inputs))
    assert np.all(gap <= info.error_bound) and np.max(info.error_bound) <= 1e-3
    chex.assert_trees_all_close(slope, grad(problem.cell)[0], rtol=1e-5)
    strict = grad(problem.cell, error_tolerance=1e-9)[1][1]
    assert strict.status == elkax.Status.ILL_CONDITIONED


def test_convergence_on_the_last_allowed_iteration():
    def run(max_iters):
        return GRU.evaluate(
            method=elkax.DEER(), max_iters=max_iters, error_tolerance=float("inf")
        ).info

    last = int(run(T).iterations)
    enough, short = run(last), run(last - 1)
    assert enough.status == elkax.Status.CONVERGED and enough.iterations == last
    assert enough.residual <= TOLERANCE < short.residual
    assert short.status == elkax.Status.MAX_ITERS and short.iterations == last - 1


@pytest.mark.parametrize("guess", ["zeros", "inputs", elkax.QuasiDEER()], ids=str)
def test_first_guesses(guess):
    solution = GRU.evaluate(method=elkax.DEER(), guess=guess)
    assert check(GRU, solution)
    if isinstance(guess, elkax.Method):
        assert solution.info.iterations < GRU.evaluate(method=elkax.DEER()).info.iterations


def test_guess_from_inputs_is_one_sweep_from_zeros():
    """Jacobi's first sweep from zeros gives f(0, x_t), so that from there it needs one less."""
    count = [
        int(GRU.evaluate(method=elkax.Jacobi(), guess=guess).info.iterations)
        for guess in ("zeros", "inputs")
    ]
    assert count[0] == count[1] + 1


def test_history():
    solution = GRU.evaluate(method=elkax.QuasiELK(), history=True, max_iters=40)
    assert check(GRU, solution)
    prefix, damping, residual = solution.info.history
    last = int(solution.info.iterations)
    assert prefix.shape == damping.shape == (41,) and residual.shape == (41, T)
    assert np.all(np.diff(prefix[: last + 1]) >= 0) and prefix[last] == T
    assert np.all(np.arange(last) <= prefix[:last])
    np.testing.assert_allclose(damping[0], elkax.PrefixDamping().initial)
    assert damping[last] == solution.info.damping < damping[0]
    assert np.max(residual[last]) <= TOLERANCE < np.max(residual[last - 1])
    for leaf in solution.info.history:
        assert np.all(np.isnan(leaf[last + 1 :]))


def test_tolerances():
    """Of residuals and of errors, which are about as large in a recurrence that contracts."""
    tight = GRU.evaluate(method=elkax.QuasiDEER())
    loose = GRU.evaluate(method=elkax.QuasiDEER(), tolerance=1e-4, error_tolerance=1e-2)
    assert check(GRU, loose, 1e-4)
    assert loose.info.iterations < tight.info.iterations and loose.info.residual > 1e-8
    # The same trajectory, of which more is asked.
    strict = GRU.evaluate(method=elkax.QuasiDEER(), tolerance=1e-4, error_tolerance=1e-12)
    assert strict.info.status == elkax.Status.ILL_CONDITIONED
    np.testing.assert_array_equal(strict.states, loose.states)
    silent = GRU.evaluate(method=elkax.QuasiDEER(), error_tolerance=float("inf"))
    assert silent.info.status == elkax.Status.CONVERGED
    assert np.all(np.isnan(silent.info.error_bound))


@pytest.mark.parametrize("method", ["DEER", "quasi-ELK"])
def test_long_chaos_is_never_plain_success(method):
    """The logistic map at r = 3.9: an error of one rounding has grown to O(1) after 75 steps."""
    problem = problems.logistic(2000, r=3.9)
    info = problem.evaluate(method=METHODS[method], max_iters=300).info
    assert info.status in (elkax.Status.ILL_CONDITIONED, elkax.Status.MAX_ITERS)


@pytest.mark.parametrize(
    "options",
    [
        {"method": elkax.Sequential(), "error_tolerance": 1e-3},
        {"method": elkax.DEER(), "max_iters": 20, "window": 200, "on_failure": "sequential"},
    ],
    ids=["sequential", "on failure"],
)
def test_chaos_step_by_step_is_no_plain_success_either(options):
    """Where a bound is asked for: the states are those of `lax.scan`, and ill-conditioned."""
    problem = problems.logistic(200, r=3.9)
    states, info = problem.evaluate(**options)
    assert info.status == elkax.Status.ILL_CONDITIONED and info.prefix == 200
    np.testing.assert_allclose(states[:60], problem.scan()[:60], atol=1e-6)
    # Once an error is O(1), the first-order bound grows on.
    assert np.min(info.error_bound[80:]) >= 1e-3


@pytest.mark.parametrize("method, most", [("DEER", 4), ("quasi-DEER", 10)])
def test_iterations_on_a_long_gru(method, most):
    problem = problems.gru(1000, size=4)
    solution = problem.evaluate(method=METHODS[method], guess="zeros", max_iters=most)
    assert np.mean(np.abs(solution.states - problem.scan())) <= 1e-4


@pytest.mark.parametrize("length", [300, 1000])
def test_iterations_on_lorenz96(length):
    problem = problems.lorenz96(length)
    solution = problem.evaluate(method=elkax.DEER())
    assert check(problem, solution)
    assert np.max(errors(solution.states, problem.scan())) < 1e-6
    assert solution.info.iterations <= 100 and solution.info.sweeps <= 6


def test_iterations_on_an_autoregressive_gru():
    """Untrained, T = 2000: undamped steps throw the tail away, damping saves it.

    Once a tail is lost, `DEER` goes on in windows of 48 steps until 100 iterations went well.
    """
    problem = problems.autoregressive(2000, seed=13)
    exact = problem.scan()
    for method, most in {"DEER": 60, "ELK": 25, "quasi-ELK": 60}.items():
        states, info = problem.evaluate(
            method=METHODS[method], max_iters=most, error_tolerance=float("inf")
        )
        if METHODS[method].damping is None:
            assert info.status == elkax.Status.MAX_ITERS and info.resets >= 1
        else:
            assert info.status == elkax.Status.CONVERGED
            # Errors of the size of the tolerance, 2e-12, grow before they fade.
            assert np.max(errors(states, exact)) <= 1e-8


def test_float32():
    """Default tolerances; the default on residuals is eps^(3/4) = 6e-6."""
    problem = problems.gru(dtype=jnp.float32)
    solution = problem.evaluate(method=elkax.DEER())
    assert solution.states.dtype == jnp.float32
    assert check(problem, solution, np.finfo(np.float32).eps ** 0.75)
    exact = problems.gru().scan()
    # The cell contracts, so that errors are about the residuals, and those of rounding 1e-7.
    assert np.max(errors(solution.states, exact)) <= 5e-5


@pytest.mark.parametrize("method", ["DEER", "quasi-DEER", "ELK"])
def test_float32_goes_to_rounding(method):
    """By default: what is left of a residual of 6e-6 goes, where another Newton step gains."""
    rng = np.random.default_rng(1)
    cell = Partial(
        problems.rnn_step, *(jnp.asarray(x, jnp.float32) for x in problems.rnn().cell.args)
    )
    problem = Problem(
        cell, jnp.zeros(4, "float32"), jnp.asarray(rng.normal(size=(T, 2)), "float32")
    )
    exact = problem.scan()
    states, info = problem.evaluate(method=METHODS[method])
    loose, before = problem.evaluate(
        method=METHODS[method], tolerance=np.finfo("float32").eps ** 0.75
    )
    assert info.iterations == before.iterations and before.corrections == 0
    assert 1 <= info.corrections <= 2 and before.residual > 1e-6 >= info.residual
    gap = errors(states, exact)
    assert np.all(gap <= info.error_bound) and np.max(gap) <= 0.2 * np.max(errors(loose, exact))
    # A bound of 1e-3 is the least that is asked for.
    assert info.status == elkax.Status.CONVERGED
    assert np.max(info.error_bound) <= 1e-3


@pytest.mark.parametrize(
    "dtype, method",
    [(jnp.bfloat16, "DEER"), (jnp.float16, "quasi-DEER")],
)
def test_half_precision(dtype, method):
    """Default tolerances, against the same parameters and inputs in doubles."""
    problem = problems.gru(dtype=dtype)
    states, info = problem.evaluate(method=METHODS[method])
    assert states.dtype == info.error_bound.dtype == dtype
    assert info.status == elkax.Status.CONVERGED and info.prefix == T
    eps = float(jnp.finfo(dtype).eps)
    cell, state, inputs = jax.tree.map(lambda leaf: leaf.astype(float), problem[:3])
    gap = errors(states.astype(float), problems.sequential(cell, state, inputs))
    assert np.all(gap <= np.asarray(info.error_bound, float))
    # The cell contracts: errors are a few roundings and what is left of the residual.
    assert np.max(gap) <= 2 * (eps**0.75 + eps) and info.residual <= eps**0.75


class Gates:
    """A cell that states its Jacobian: h = g h + (1 - g) x with g a function of h."""

    jacobian_structure = elkax.Diagonal()

    def __call__(self, state, x):
        gate = jax.nn.sigmoid(2.0 * state + x)
        return gate * state + (1 - gate) * jnp.tanh(x)


class KnownGates(Gates):
    jacobian_structure = elkax.Diagonal(
        lambda h, x: (
            jax.nn.sigmoid(2 * h + x)
            + 2 * jax.nn.sigmoid(2 * h + x) * jax.nn.sigmoid(-2 * h - x) * (h - jnp.tanh(x))
        )
    )


class Rotation:
    """Two coordinates at a time."""

    jacobian_structure = elkax.BlockDiagonal(2)

    def __call__(self, state, x):
        pairs = state.reshape(2, 2)
        return 0.9 * jnp.tanh(jnp.stack((pairs[:, 1], -pairs[:, 0]), 1).reshape(4) + x)


class Shift:
    jacobian_structure = elkax.Zero()

    def __call__(self, state, x):
        return jnp.sin(x)


class Sum:
    jacobian_structure = elkax.Identity()

    def __call__(self, state, x):
        return state + jnp.sin(x)


DECLARED = [Gates(), KnownGates(), Rotation(), Shift(), Sum()]


def declared_problem(cell):
    inputs = jnp.asarray(np.random.default_rng(14).normal(size=(T, 4)))
    return Problem(Partial(cell), jnp.zeros(4), inputs)


@pytest.mark.parametrize("cell", DECLARED, ids=lambda cell: type(cell).__name__)
def test_a_cell_may_state_its_jacobian(cell):
    """Newton's method is then the one with this structure."""
    problem = declared_problem(cell)
    solution = problem.evaluate(method=elkax.DEER())
    assert check(problem, solution) and solution.info.iterations <= 8
    elkax.check_structure(cell, problem.state, problem.inputs)


def test_a_wrong_statement_is_found():
    class Mixing(Gates):
        def __call__(self, state, x):
            return super().__call__(state, x) + 0.1 * state[::-1]

    class Wrong(KnownGates):
        jacobian_structure = elkax.Diagonal(lambda h, x: jax.nn.sigmoid(h))

    class Rotating(Rotation):
        jacobian_structure = elkax.Diagonal()

    problem = declared_problem(_times)
    for cell in (Mixing(), Wrong(), Rotating()):
        with pytest.raises(ValueError, match="jacobian_structure"):
            elkax.check_structure(cell, problem.state, problem.inputs)
    with pytest.raises(ValueError, match="jacobian_structure"):
        elkax.check_structure(GRU.cell, GRU.state, GRU.inputs)


def test_lyapunov_exponents():
    """Those of a linear map, where they are known, and of one in chaos."""
    weights = jnp.asarray([[0.5, 0.3], [0.0, -0.9]])
    linear = Problem(Partial(_times, weights), jnp.ones(2), None, 400)
    found = elkax.lyapunov_exponent(*linear[:3], linear.scan(), num_timesteps=400)
    # The first vector is random: what is not along the leading one adds O(1) / T.
    np.testing.assert_allclose(found, np.log(0.9), atol=1e-2)
    logistic = problems.logistic(400, r=4.0)
    states = logistic.scan()
    found = elkax.lyapunov_exponent(*logistic[:3], states, num_timesteps=400)
    before = np.append(logistic.state, states[:-1])
    np.testing.assert_allclose(found, np.mean(np.log(np.abs(4 - 8 * before))), rtol=1e-10)
    # log 2 in the limit, with a standard deviation of 0.9 / sqrt(T).
    assert abs(found - np.log(2)) < 0.15


def _times(weights, state, x):
    return weights @ state


@pytest.mark.parametrize(
    "options, method, reason",
    [
        ({"platform": "cpu"}, elkax.Sequential(), "CPU"),
        ({"platform": "gpu", "num_timesteps": 100}, elkax.Sequential(), "T = 100"),
        ({"platform": "gpu"}, elkax.DEER(), "D = 4"),
        ({"platform": "gpu", "state_dim": 64}, elkax.QuasiDEER(), "D = 64"),
        ({"platform": "gpu", "state_dim": 64, "contracts": True}, elkax.QuasiDEER(), "contracts"),
        (
            {"platform": "gpu", "state_dim": 64, "contracts": False},
            elkax.DEER(),
            "does not contract",
        ),
        (
            {"platform": "gpu", "state_dim": 64, "structure": elkax.Diagonal()},
            elkax.QuasiDEER(),
            "states its Jacobian",
        ),
    ],
    ids=str,
)
def test_choice(options, method, reason):
    choice = elkax.choose_method(**({"num_timesteps": 10_000, "state_dim": 4} | options))
    assert choice.method == method and reason in choice.reason


def test_no_method_is_the_one_that_is_explained():
    explained = elkax.explain(*GRU[:3])
    chosen = elkax.choose_method(num_timesteps=T, state_dim=3)
    assert type(chosen.method).__name__ in explained and chosen.reason in explained
    solution = GRU.evaluate()
    same = GRU.evaluate(method=chosen.method)
    chex.assert_trees_all_equal(solution, same)


def test_explanations_look_at_the_recurrence():
    """A state of 20: whether it contracts decides, and what the cell states."""
    inputs = jnp.zeros((300, 20))

    def scaled(factor):
        return lambda state, x: factor * jnp.sin(state) + x

    explain = partial(elkax.explain, platform="gpu")
    assert "diagonal" in explain(scaled(0.5), inputs[0], inputs).lower()
    assert "does not contract" in explain(scaled(2.0), inputs[0], inputs)
    assert "states its Jacobian" in explain(Gates(), inputs[0], inputs)
