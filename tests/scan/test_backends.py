"""Every backend against `jax.lax.scan`, and the choice among them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from elkax.gaussian.covariance import Covariance
from elkax.gaussian.markov import GaussMarkov, Transition
from elkax.scan import Associative, Blocked, Sequential, choice, choose, run
from elkax.scan.lanes import materialize
from elkax.scan.layout import block_shape
from elkax.scan.protocol import step
from scan.scannables import CASES, decoded

BACKENDS = [Sequential(), Associative(), Blocked(1), Blocked(4), Blocked(7), Blocked(64)]
# As for the laws: rounding of a few hundred well-conditioned float64 operations.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def jitted(backend, case, *, reverse=False):
    """Run a backend as one program."""
    run = jax.jit(lambda state, xs: backend(case.scannable, state, xs, reverse=reverse))
    return run(case.state, case.xs)


@pytest.mark.parametrize("length, reverse", [(1, False), (2, True), (31, False), (33, True)])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_backend_equals_lax_scan(backend, length, reverse):
    case = CASES["affine dense"](length)
    expected = jax.lax.scan(case.scannable.step, case.state, case.xs, reverse=reverse)
    got = jitted(backend, case, reverse=reverse)
    chex.assert_trees_all_close(decoded(case, got), decoded(case, expected), **TOLERANCE)


@pytest.mark.parametrize("backend", [Associative(), Blocked(7)], ids=str)
@pytest.mark.parametrize(
    "name", ["kalman covariance", "kalman square root", "gauss-markov square root"]
)
def test_backend_equals_lax_scan_for_gaussian_recurrences(name, backend):
    # The program of an associative scan grows with every halving; all of these are odd.
    case = CASES[name](7)
    expected = jax.lax.scan(case.scannable.step, case.state, case.xs)
    got = jitted(backend, case)
    chex.assert_trees_all_close(decoded(case, got), decoded(case, expected), **TOLERANCE)


@pytest.mark.parametrize("name", ["affine diagonal", "kalman covariance"])
def test_blocks_of_a_long_sequence(name):
    case = CASES[name](8191)
    expected = jax.lax.scan(case.scannable.step, case.state, case.xs)
    got = jitted(Blocked(64), case)
    chex.assert_trees_all_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_vmap_equals_one_at_a_time(backend):
    case = CASES["affine dense"](9)
    starts = jnp.stack([case.state, 2 * case.state])

    def outputs(start):
        return backend(case.scannable, start, case.xs)[1]

    together = jax.jit(jax.vmap(outputs))(starts)
    alone = jnp.stack([jax.jit(outputs)(s) for s in starts])
    chex.assert_trees_all_close(together, alone, **TOLERANCE)


@jax.tree_util.register_static
class Fragile:
    """A running sum whose blocks have no summary if they hold a negative number."""

    def step(self, state, x):
        return state + x, state + x

    def identity(self, lanes, dtype):
        return jnp.zeros(lanes, dtype), jnp.ones(lanes, bool)

    def absorb(self, summary, x):
        # Deliberately wrong where unsound, so that using it shows.
        total, sound = summary
        return jnp.where(x >= 0, total + x, jnp.nan), sound & (x >= 0)

    def combine(self, left, right):
        return left[0] + right[0], left[1] & right[1]

    def apply(self, summary, state):
        return state + summary[0]

    def sound(self, summary):
        return summary[1]


@pytest.mark.parametrize("backend", [Associative(), Blocked(4)], ids=str)
def test_gives_way_to_sequential_where_a_summary_does_not_exist(backend):
    xs = jnp.arange(16.0).at[3].set(-1.0)

    def outputs(x):
        return backend(Fragile(), jnp.zeros(()), x)[1]

    chex.assert_trees_all_close(jax.jit(outputs)(xs), jnp.cumsum(xs))
    batch = jnp.stack([xs, jnp.arange(16.0)])
    together = jax.jit(jax.vmap(outputs))(batch)
    chex.assert_trees_all_close(together, jnp.cumsum(batch, axis=1))


def test_a_batched_fallback_stays_one_branch():
    def program(xs):
        return Blocked(4)(Fragile(), jnp.zeros(()), xs)[1]

    batched = str(jax.make_jaxpr(jax.vmap(program))(jnp.ones((3, 16))))
    assert "cond[" in batched


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_empty_sequences_and_unequal_lengths_are_refused(backend):
    case = CASES["affine dense"](3)
    empty = jax.tree.map(lambda leaf: leaf[:0], case.xs)
    with pytest.raises(ValueError, match="T = 0"):
        backend(case.scannable, case.state, empty)
    with pytest.raises(ValueError, match="common leading length"):
        backend(case.scannable, case.state, (case.xs[0], case.xs[1][:2]))


@pytest.mark.usefixtures("unchecked")
def test_num_blocks_must_be_a_positive_integer():
    for wrong in (0, -3, 2.5):
        with pytest.raises(ValueError, match="num_blocks"):
            Blocked(wrong)


def test_the_choice_can_be_seen_and_named(monkeypatch):
    monkeypatch.setattr(choice, "LOOPS_ARE_KERNELS", True)
    assert choose(num_timesteps=100_000, state_dim=4, platform="cpu") == Sequential()
    monkeypatch.setattr(choice, "LOOPS_ARE_KERNELS", False)
    assert choose(num_timesteps=10, state_dim=4, platform="cpu") == Sequential()
    assert isinstance(choose(num_timesteps=100_000, state_dim=4, platform="cpu"), Blocked)
    assert choose(num_timesteps=100_000, state_dim=64, platform="cpu") == Sequential()
    affine = choose(num_timesteps=100_000, state_dim=4, platform="cpu", recurrence="affine")
    assert affine == Sequential()
    assert choose(num_timesteps=8192, state_dim=2, platform="cpu") == Blocked(128)
    assert isinstance(choose(num_timesteps=100, state_dim=4, platform="gpu"), Blocked)
    assert elkax.scan.choose is choose
    case = CASES["affine dense"](5)
    chosen = run(case.scannable, case.state, case.xs)
    named = run(case.scannable, case.state, case.xs, backend=Blocked(2))
    chex.assert_trees_all_close(chosen, named, **TOLERANCE)


def test_materialize_changes_nothing():
    rng = np.random.default_rng(0)
    tree = (jnp.asarray(rng.normal(size=(2, 2, 5))), jnp.arange(5), jnp.asarray([jnp.nan] * 5))
    for got in (materialize(tree), jax.jit(materialize)(tree)):
        chex.assert_trees_all_equal(got, tree)
    nan_first = (jnp.full((2, 2, 5), jnp.nan), jnp.ones(5))
    chex.assert_trees_all_equal(materialize(nan_first), nan_first)
    gradient = jax.grad(lambda x: jnp.sum(materialize(x) ** 2))(tree[0])
    chex.assert_trees_all_close(gradient, 2 * tree[0])
    chex.assert_trees_all_close(jax.vmap(materialize)(jnp.stack([tree[0]] * 3))[1], tree[0])


@pytest.mark.parametrize("length", [1, 2, 7, 100, 997, 1000, 9999, 10_000])
@pytest.mark.parametrize("most", [1, 3, 32, 128])
def test_blocks_cover_the_sequence(length, most):
    steps, blocks, padding = block_shape(length, most)
    assert 1 <= blocks <= min(most, length)
    assert steps * blocks == length + padding
    # The block run last holds at least one real step.
    assert 0 <= padding < steps


def test_no_padding_where_a_block_count_divides_the_length():
    assert block_shape(10_000, 128) == (80, 125, 0)
    assert block_shape(1000, 128) == (8, 125, 0)


def test_recurrences_of_equal_fields_are_told_apart():
    """JAX takes two dataclasses of equal fields for the same structure, whatever their classes.

    Its caches then confuse them where their hashes fall together, so many are tried.
    """

    def make(number):
        class Numbered(GaussMarkov):
            def step(self, state, x):
                return state, (x.offset,) * number

        fields = {"data_fields": [], "meta_fields": ["size", "form"]}
        return jax.tree_util.register_dataclass(Numbered, **fields)(3, Covariance())

    matrix, vector = jnp.eye(3), jnp.ones(3)
    x, state = Transition(matrix, vector, matrix), (vector, matrix)
    lengths = [len(step(make(n), state, x)[1]) for n in range(200)]
    assert lengths == list(range(200))
