"""Many series by `vmap`: in lanes, with one set of covariances where the gaps agree."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from problems import random_stable, with_missing
from smoothers.linear_checks import BACKENDS, check_smoothed, oracle

T = 6


def series_of(problem, *, gaps):
    """Three series of one model; with gaps that differ, gaps that agree, or none."""
    y = problem.emissions
    batch = jnp.stack([y, 2 * y, y + 1])
    if gaps == "alike":
        batch = batch.at[:, 1].set(jnp.nan).at[:, 3, 0].set(jnp.nan)
    if gaps == "different":
        batch = batch.at[0, 1].set(jnp.nan).at[1, 3, 0].set(jnp.nan)
    return batch


def slowed(params, factor):
    """The same model with other dynamics."""
    return params._replace(
        dynamics=params.dynamics._replace(weights=factor * params.dynamics.weights)
    )


def check_each(posteriors, problem, batch, params=None):
    for i, emissions in enumerate(batch):
        own = jax.tree.map(lambda x, i=i: x[i], posteriors)
        alone = problem._replace(emissions=emissions)
        check_smoothed(own, oracle(alone if params is None else alone._replace(params=params[i])))


@pytest.mark.parametrize("backend, form", [(None, "covariance"), (None, "square_root")])
def test_series_of_one_model(backend, form):
    problem = random_stable(2, 2, T)
    smooth = partial(elkax.lgssm_smoother, backend=backend, form=form)
    together = jax.jit(jax.vmap(smooth, in_axes=(None, 0)))
    for gaps in ("none", "alike", "different"):
        batch = series_of(problem, gaps=gaps)
        check_each(together(problem.params, batch), problem, batch)


def test_series_in_blocks_of_time():
    problem = random_stable(2, 2, T)
    smooth = partial(elkax.lgssm_smoother, backend=BACKENDS["blocked"])
    together = jax.jit(jax.vmap(smooth, in_axes=(None, 0)))
    for gaps in ("alike", "different"):
        batch = series_of(problem, gaps=gaps)
        check_each(together(problem.params, batch), problem, batch)


def test_series_with_more_states_and_sensors_than_are_written_out():
    problem = random_stable(10, 9, T)
    together = jax.jit(jax.vmap(elkax.lgssm_smoother, in_axes=(None, 0)))
    for gaps in ("alike", "different"):
        batch = series_of(problem, gaps=gaps)
        check_each(together(problem.params, batch), problem, batch)


@pytest.mark.parametrize("form", ["covariance", "square_root"])
def test_series_with_models_of_their_own(form):
    problem = random_stable(2, 2, T, diagonal="constant")
    params = [slowed(problem.params, factor) for factor in (1.0, 0.9, 0.5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    batch = series_of(problem, gaps="different")
    together = jax.jit(jax.vmap(partial(elkax.lgssm_smoother, form=form)))
    check_each(together(stacked, batch), problem, batch, params)


def test_nested_vmap():
    problem = random_stable(2, 2, T)
    batch = jnp.stack([series_of(problem, gaps="alike"), series_of(problem, gaps="different")])
    inner = jax.vmap(elkax.lgssm_smoother, in_axes=(None, 0))
    posteriors = jax.jit(jax.vmap(inner, in_axes=(None, 0)))(problem.params, batch)
    for i in range(len(batch)):
        check_each(jax.tree.map(lambda x, i=i: x[i], posteriors), problem, batch[i])


def test_gradient_of_each_series():
    """Against the gradient of one series at a time, which has an oracle of its own."""
    problem = random_stable(2, 2, T)
    gradient = jax.grad(elkax.lgssm_marginal_log_prob)
    alone = jax.jit(gradient)
    together = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))
    for gaps in ("none", "different"):
        batch = series_of(problem, gaps=gaps)
        gradients = together(problem.params, batch)
        for i, emissions in enumerate(batch):
            own = jax.tree.map(lambda x, i=i: x[i], gradients)
            expected = alone(problem.params, emissions)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), own, expected)


def test_gradient_through_the_smoothed_means_of_all_series():
    problem = random_stable(2, 1, T)
    batch = with_missing(problem, rows=(2,)).emissions + jnp.arange(3.0)[:, None, None]

    def one(params, emissions):
        return jnp.sum(elkax.lgssm_smoother(params, emissions).smoothed_means ** 2)

    def sum_of_all(params):
        return jnp.sum(jax.vmap(one, in_axes=(None, 0))(params, batch))

    got = jax.jit(jax.grad(sum_of_all))(problem.params)
    each = jax.jit(jax.grad(one))
    parts = [each(problem.params, emissions) for emissions in batch]
    expected = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), got, expected)


def test_what_the_series_have_in_common_is_computed_once():
    """Where the gaps agree no covariance of the recursion has the series among its axes."""
    problem = random_stable(2, 1, T)
    batch = jnp.stack([problem.emissions] * 7)
    program = jax.vmap(partial(elkax.lgssm_filter, problem.params))
    shared = _branches(jax.make_jaxpr(program)(batch).jaxpr)[-1]
    (loop,) = [eqn for eqn in _equations(shared.jaxpr) if eqn.primitive.name == "scan"]
    shapes = {v.aval.shape for v in loop.outvars}
    assert {(2, 7), (2, 2), (T, 2, 2)} <= shapes
    assert not {(2, 2, 7), (T, 2, 2, 7)} & shapes


def _equations(jaxpr):
    """All equations, those inside of others too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _branches(jaxpr):
    """The branches of the outermost condition: for gaps that differ, for gaps that agree."""
    return next(eqn for eqn in _equations(jaxpr) if eqn.primitive.name == "cond").params["branches"]
