"""One instance of every `Scannable`, with inputs, for the contract of the scan layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elkax.gaussian import Covariance, KalmanFilter, Model, SquareRoot
from elkax.gaussian.costates import BrysonFrazier, Reverse
from elkax.gaussian.diagonal import DiagonalKalmanFilter, DiagonalStep
from elkax.gaussian.markov import GaussMarkov, Transition
from elkax.gaussian.model import constant_part, over_time
from elkax.gaussian.square_root import Turn
from elkax.gaussian.whitened import After, Whitened
from elkax.scan import Affine, Restarted


class Case(NamedTuple):
    """A recurrence, its start, and inputs with leading axis T."""

    scannable: Any
    state: Any
    xs: Any


def _stable(rng, length, size):
    return 0.9 * np.linalg.qr(rng.normal(size=(length, size, size)))[0]


def _covariances(rng, length, size):
    root = rng.normal(size=(length, size, size))
    return root @ np.swapaxes(root, -1, -2) / size


def affine(length, *, diagonal):
    rng = np.random.default_rng(1)
    weights = rng.uniform(-0.9, 0.9, (length, 3)) if diagonal else _stable(rng, length, 3)
    xs = jnp.asarray(weights), jnp.asarray(rng.normal(size=(length, 3)))
    return Case(Affine(3, diagonal), jnp.asarray(rng.normal(size=3)), xs)


def restarted(length, *, diagonal):
    """Steps that start anew from zero among those of the affine case."""
    case = affine(length, diagonal=diagonal)
    cuts = jnp.asarray(np.random.default_rng(7).uniform(size=length) < 0.1)
    return Case(Restarted(case.scannable), case.state, (case.xs, cuts))


def gauss_markov(length, *, form):
    rng = np.random.default_rng(2)
    covs = jax.vmap(form.encode)(jnp.asarray(_covariances(rng, length, 3)))
    weights, offsets = _stable(rng, length, 3), rng.normal(size=(length, 3))
    state = jnp.asarray(rng.normal(size=3)), form.encode(jnp.asarray(_covariances(rng, 1, 3)[0]))
    return Case(
        GaussMarkov(3, form), state, Transition(jnp.asarray(weights), jnp.asarray(offsets), covs)
    )


def kalman(length, *, form):
    """Everything varies in time, single entries are missing, and padding stands at the end."""
    rng = np.random.default_rng(3)
    model = Model(
        initial_mean=jnp.asarray(rng.normal(size=3)),
        initial_cov=form.encode(jnp.asarray(_covariances(rng, 1, 3)[0])),
        weights=jnp.asarray(_stable(rng, length, 3)),
        offset=jnp.asarray(rng.normal(size=(length, 3))),
        noise=jax.vmap(form.encode)(jnp.asarray(_covariances(rng, length, 3))),
        rows=jnp.asarray(rng.normal(size=(length, 2, 3))),
        variances=jnp.asarray(rng.uniform(0.1, 1.0, (length, 2))),
        values=jnp.asarray(rng.normal(size=(length, 2))),
        observed=jnp.asarray(rng.uniform(size=(length, 2)) > 0.2),
        first=(jnp.arange(length) == 0).astype(float),
        valid=jnp.arange(length) <= 0.9 * length,
    )
    recurrence = KalmanFilter(constant_part(model), form)
    return Case(recurrence, recurrence.begin(float), over_time(lambda field, rank: field, model))


def diagonal_kalman(length):
    """Transitions and noises vary in time, and every third noise is zero."""
    rng = np.random.default_rng(5)
    noise = np.where(np.arange(length)[:, None] % 3, rng.uniform(0.0, 2.0, (length, 3)), 0.0)
    xs = DiagonalStep(
        jnp.asarray(rng.uniform(-1.5, 1.5, (length, 3))),
        jnp.asarray(rng.normal(size=(length, 3))),
        jnp.asarray(noise),
    )
    state = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.uniform(0.0, 1.0, 3))
    return Case(DiagonalKalmanFilter(3), state, xs)


def smoother(length):
    """Rotations and measurements of random noise, and factors of what the filter may have found."""
    rng = np.random.default_rng(4)
    form = SquareRoot()
    whole = np.linalg.qr(rng.normal(size=(length, 6, 6)))[0]
    shrink = np.tril(rng.normal(size=(length, 3, 3)))
    shrink = 0.9 * shrink / np.linalg.norm(shrink, axis=(1, 2), ord=2, keepdims=True)
    turn = Turn(
        whole[:, :3, :3] - np.eye(3),
        whole[:, :3, 3:],
        shrink - np.eye(3),
        rng.normal(size=(length, 3)),
    )
    factors = jax.vmap(form.encode)(jnp.asarray(_covariances(rng, length + 1, 3)))
    mean = jnp.asarray(rng.normal(size=(length, 3)))
    xs = After(
        jax.tree.map(jnp.asarray, turn), mean, jnp.zeros_like(mean), factors[:-1], factors[1:]
    )
    start = form.encode(jnp.asarray(_covariances(rng, 1, 3)[0]))
    return Case(Whitened(3, form), (jnp.zeros(3), start), xs)


def costates(length, *, moments):
    """The Kalman case and something for its filter to have found."""
    rng = np.random.default_rng(6)
    case = kalman(length, form=Covariance())
    mean, covs = rng.normal(size=(length, 3)), _covariances(rng, length, 3)
    update = (
        0.05 * rng.normal(size=(length, 2, 3)),
        rng.normal(size=(length, 2)),
        rng.uniform(0.5, 2.0, (length, 2)),
    )
    xs = Reverse(
        case.xs.rows,
        jax.tree.map(jnp.asarray, update),
        jnp.asarray(_stable(rng, length, 3)),
        jnp.asarray(_covariances(rng, length, 3)) if moments else None,
        jnp.arange(length) < 0.9 * length,
        (jnp.asarray(mean), jnp.zeros((length, 3)), jnp.asarray(covs)) if moments else None,
    )
    recurrence = BrysonFrazier(3, Covariance(), case.scannable.fixed)
    return Case(recurrence, (jnp.zeros(3), jnp.zeros((3, 3))), xs)


# What rounding leaves in a covariance is carried as it arises in steps, and no law holds for it.
COVARIANCE, SQUARE_ROOT = Covariance(exact_entries=False), SquareRoot(exact_entries=False)

CASES = {
    "affine dense": lambda length: affine(length, diagonal=False),
    "affine diagonal": lambda length: affine(length, diagonal=True),
    "restarted dense": lambda length: restarted(length, diagonal=False),
    "restarted diagonal": lambda length: restarted(length, diagonal=True),
    "gauss-markov covariance": lambda length: gauss_markov(length, form=Covariance()),
    "gauss-markov square root": lambda length: gauss_markov(length, form=SquareRoot()),
    "kalman covariance": lambda length: kalman(length, form=COVARIANCE),
    "kalman square root": lambda length: kalman(length, form=SQUARE_ROOT),
    "diagonal kalman": diagonal_kalman,
    "smoother square root": smoother,
    "costates": lambda length: costates(length, moments=False),
    "costates and moments": lambda length: costates(length, moments=True),
}


def in_float32(case):
    """The same in float32, with a state that carries what rounding leaves out of its factor."""
    if isinstance(case.scannable, KalmanFilter):
        state = case.scannable.begin(jnp.float32)
    else:
        *means, cov = case.state
        state = (*means, case.scannable.form.exact(cov.astype(jnp.float32)))
    cast = Case(case.scannable, state, case.xs)
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, cast
    )


SHORT_CASES = {
    f"float32 {name}": lambda length, name=name: in_float32(CASES[name](length))
    for name in CASES
    if name.endswith("square root")
}


def decoded(case, tree):
    """Replace factors by what they stand for: they are unique only up to rounding-level signs."""
    form = getattr(case.scannable, "form", None)
    if not isinstance(form, SquareRoot):
        return tree

    def decode(leaf):
        if leaf.shape[-2:] not in ((3, 3), (3, 6)):
            return leaf
        factor = leaf[..., :3]
        return factor @ jnp.swapaxes(factor, -1, -2)

    return jax.tree.map(decode, tree)
