"""The laws of `Scannable`, for every instance."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.scan.protocol import Centred, state_dtype
from scan.scannables import CASES, SHORT_CASES, decoded

# Each side is a handful of float64 products of well-conditioned 3 x 3 matrices.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}
SHORT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
ALL_CASES = CASES | SHORT_CASES


def tolerance(name):
    return SHORT_TOLERANCE if name in SHORT_CASES else TOLERANCE


def summary_of(case, start, stop):
    """Absorb the steps start, ..., stop - 1."""
    empty = case.scannable.identity((), state_dtype(case.state))
    part = jax.tree.map(lambda leaf: leaf[start:stop], case.xs)

    def absorb(summary, x):
        return case.scannable.absorb(summary, x), None

    return jax.lax.scan(absorb, empty, part)[0]


def plain(case, summary):
    """A summary with factors multiplied out, without its flag."""
    leaves = [leaf for leaf in jax.tree.leaves(summary) if leaf.dtype != bool]
    weights = leaves[0][..., :3]  # the transition is no factor
    return [weights, *decoded(case, leaves[1:])]


@pytest.mark.parametrize("name", ALL_CASES)
def test_absorb_is_combine_with_one_step(name):
    case = ALL_CASES[name](33)
    left, right = summary_of(case, 0, 20), summary_of(case, 20, 21)
    longer = jax.jit(case.scannable.absorb)(left, jax.tree.map(lambda leaf: leaf[20], case.xs))
    joined = jax.jit(case.scannable.combine)(left, right)
    chex.assert_trees_all_close(plain(case, longer), plain(case, joined), **tolerance(name))


@pytest.mark.parametrize("name", ALL_CASES)
def test_combine_is_associative_with_neutral_identity(name):
    case = ALL_CASES[name](33)
    a, b, c = summary_of(case, 0, 5), summary_of(case, 5, 17), summary_of(case, 17, 33)
    combine = jax.jit(case.scannable.combine)
    whole = plain(case, summary_of(case, 0, 33))
    for joined in (combine(combine(a, b), c), combine(a, combine(b, c))):
        chex.assert_trees_all_close(plain(case, joined), whole, **tolerance(name))
    empty = case.scannable.identity((), state_dtype(case.state))
    for joined in (combine(empty, a), combine(a, empty)):
        chex.assert_trees_all_close(plain(case, joined), plain(case, a), **tolerance(name))


@pytest.mark.parametrize("name", ALL_CASES)
def test_apply_is_the_fold_of_step(name):
    """Of one step up to all of them, in one program that is given their number."""
    case = ALL_CASES[name](8191)

    @jax.jit
    def jump_and_fold(xs, length):
        def advance(t, carry):
            summary, state = carry
            x = jax.tree.map(lambda leaf: leaf[t], xs)
            return case.scannable.absorb(summary, x), case.scannable.step(state, x)[0]

        start = case.scannable.identity((), state_dtype(case.state)), case.state
        summary, folded = jax.lax.fori_loop(0, length, advance, start)
        return case.scannable.apply(summary, case.state), folded

    for length in (1, 31, 33, 8191):
        jumped, folded = jump_and_fold(case.xs, length)
        chex.assert_trees_all_close(decoded(case, jumped), decoded(case, folded), **tolerance(name))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("kalman")])
def test_a_summary_about_another_state_is_the_same(name):
    case = ALL_CASES[name](33)
    kalman = case.scannable
    left, right = summary_of(case, 0, 20), summary_of(case, 20, 33)
    assert isinstance(kalman, Centred) and not isinstance(
        CASES["affine dense"](1).scannable, Centred
    )
    moved = jax.jit(lambda s: kalman.recenter(s, kalman.locate(s)))(right)
    assert np.max(np.abs(moved.origin)) > 0.1
    # What the observations say about the origin is used up, but for the ridge.
    assert np.max(np.abs(moved.eta)) < 1e-6 * np.max(np.abs(right.eta))
    state = kalman.apply(left, case.state)
    chex.assert_trees_all_close(kalman.apply(moved, state), kalman.apply(right, state), **TOLERANCE)
    joined = kalman.combine(left, moved), kalman.combine(left, right)
    chex.assert_trees_all_close(*(plain(case, s) for s in joined), **TOLERANCE)
    back = kalman.recenter(moved, right.origin)
    chex.assert_trees_all_close(plain(case, back), plain(case, right), **TOLERANCE)


@pytest.mark.parametrize("name", ALL_CASES)
def test_lanes_are_independent(name):
    case = ALL_CASES[name](6)
    empty = case.scannable.identity((6,), state_dtype(case.state))
    lanes = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), case.xs)
    absorb = jax.jit(case.scannable.absorb)
    together = absorb(empty, lanes)
    for t in range(6):
        x = jax.tree.map(lambda leaf, t=t: leaf[t], case.xs)
        alone = absorb(case.scannable.identity((), state_dtype(case.state)), x)
        lane = jax.tree.map(lambda leaf, t=t: leaf[..., t], together)
        chex.assert_trees_all_close(plain(case, lane), plain(case, alone), **tolerance(name))
