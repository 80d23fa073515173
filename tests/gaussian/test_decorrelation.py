"""Decorrelated measurements, and the gradient that is carried back through them."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.gaussian.decorrelation import uncorrelate, uncorrelate_and_pull_back
from elkax.gaussian.model import Model

T, N, D = 5, 3, 2


def make_model(rows_vary, cov_varies, missing, exact):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(T, N, N))
    if exact:
        root[:, 0] = 0.0
    cov = root @ np.swapaxes(root, 1, 2)
    observed = np.ones((T, N), bool)
    if missing:
        observed[1] = False
        observed[3, 1] = False
    rows = rng.normal(size=(T, N, D))
    return Model(
        initial_mean=jnp.zeros(D),
        initial_cov=jnp.eye(D),
        weights=jnp.eye(D),
        offset=jnp.zeros(D),
        noise=jnp.eye(D),
        rows=jnp.asarray(rows if rows_vary else rows[0]),
        variances=None,
        values=jnp.asarray(np.where(observed, rng.normal(size=(T, N)), 0.0)),
        observed=jnp.asarray(observed),
        first=jnp.zeros(T).at[0].set(1.0),
        correlated=jnp.asarray(cov if cov_varies else cov[0]),
    )


CASES = list(product([False, True], repeat=4))


@pytest.mark.parametrize("case", [case for case in CASES if not case[3]])
def test_information_is_the_same(case):
    r"""$H^\top R^{-1}H$, $H^\top R^{-1}y$ of the observed entries, where no error is zero."""
    model = make_model(*case)
    plain = jax.jit(uncorrelate)(model)
    for t in range(T):
        seen = np.asarray(model.observed[t])

        def at(field, rank, t=t):
            return np.asarray(field[t] if field.ndim > rank else field)

        h, y = at(model.rows, 2)[seen], np.asarray(model.values[t])[seen]
        inverse = np.linalg.inv(at(model.correlated, 2)[np.ix_(seen, seen)])
        new_h, new_y = at(plain.rows, 2)[seen], np.asarray(plain.values[t])[seen]
        weights = 1.0 / at(plain.variances, 1)[seen]
        np.testing.assert_allclose((new_h.T * weights) @ new_h, h.T @ inverse @ h, rtol=1e-9)
        np.testing.assert_allclose((new_h.T * weights) @ new_y, h.T @ inverse @ y, rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_carried_back(case):
    """The pairing of a gradient with a change is the same before and after."""
    model = make_model(*case)
    rng = np.random.default_rng(1)
    names = ("rows", "correlated", "values")
    changes = [jnp.asarray(rng.normal(size=getattr(model, name).shape)) for name in names]
    changes[1] = changes[1] + jnp.swapaxes(changes[1], -1, -2)

    def plain(*fields):
        new = uncorrelate(model._replace(**dict(zip(names, fields, strict=True))))
        return new.rows, new.variances, new.values

    @jax.jit
    def pairings():
        moved, change = jax.jvp(plain, [getattr(model, name) for name in names], changes)
        # Nothing depends on a missing entry, nor does any gradient.
        seen = model.observed
        rows = seen[..., None] if moved[0].ndim == 3 else jnp.ones((N, 1))
        gradient = [
            jnp.asarray(rng.normal(size=part.shape)) * mask
            for part, mask in zip(moved, (rows, seen if rows.ndim == 3 else 1.0, seen), strict=True)
        ]
        found, pull_back = uncorrelate_and_pull_back(model)
        fields = dict(zip(("rows", "variances", "values"), gradient, strict=True))
        back = pull_back(found._replace(**fields))
        after = sum(jnp.sum(g * c) for g, c in zip(gradient, change, strict=True))
        before = sum(
            jnp.sum(getattr(back, name) * c) for name, c in zip(names, changes, strict=True)
        )
        return before, after, back.correlated

    before, after, cov = pairings()
    np.testing.assert_allclose(before, after, rtol=1e-9)
    np.testing.assert_allclose(cov, jnp.swapaxes(cov, -1, -2), atol=1e-12)
