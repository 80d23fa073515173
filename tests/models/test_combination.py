import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.models import arma, combine, local_level, local_linear_trend, regression, seasonal
from elkax.smoothers import lgssm_marginal_log_prob
from oracles import dense_log_likelihood, model_arrays
from problems import random_stable, varying, with_inputs

RNG = np.random.default_rng(3)


def emission_moments(params, T, inputs=None):
    """Mean and covariance of (y_1, ..., y_T) stacked, by running the state's moments forward."""
    p = model_arrays(params, T, inputs, np.float64)
    N, D = p.H.shape[1:]
    means, cov = [p.m0], np.zeros((T * D, T * D))
    cov[:D, :D] = p.P0
    for t in range(1, T):
        now, before = slice(t * D, (t + 1) * D), slice((t - 1) * D, t * D)
        means.append(p.F[t] @ means[-1] + p.c[t])
        cov[now, : t * D] = p.F[t] @ cov[before, : t * D]
        cov[: t * D, now] = cov[now, : t * D].T
        cov[now, now] = p.F[t] @ cov[before, before] @ p.F[t].T + p.Q[t]
    H, R = np.zeros((T * N, T * D)), np.zeros((T * N, T * N))
    for t in range(T):
        H[t * N : (t + 1) * N, t * D : (t + 1) * D] = p.H[t]
        R[t * N : (t + 1) * N, t * N : (t + 1) * N] = p.R[t]
    return H @ np.concatenate(means) + p.d.reshape(-1), H @ cov @ H.T + R


T = 9
SUMS = {
    "univariate": (
        [
            local_linear_trend(0.2, 0.1, 0.5, initial_variance=3.0),
            seasonal(4, 0.3, 0.1, initial_variance=2.0),
            arma((0.5, 0.2), (0.4,), 1.5, mean=7.0),
        ],
        None,
    ),
    "with regression": (
        [local_level(0.2, 0.5, 0.0, 9.0), regression(RNG.standard_normal((T, 2)), 0.1, 0.2, 3.0)],
        None,
    ),
    "two emissions, all varying, inputs in one": (
        [varying(3, 2, T).params, random_stable(2, 2, T).params],
        varying(3, 2, T).inputs,
    ),
    "diagonal R, inputs in both": (
        [random_stable(2, 2, T, diagonal="varying").params, with_inputs(3, 2, T).params],
        with_inputs(3, 2, T).inputs,
    ),
}


@pytest.mark.parametrize(("components", "inputs"), SUMS.values(), ids=SUMS)
def test_moments_of_the_emissions_add_up(components, inputs):
    def own_inputs(params):
        has = params.dynamics.input_weights is not None and params.dynamics.input_weights.size
        return inputs if has else None

    total = emission_moments(combine(*components), T, inputs)
    parts = [emission_moments(each, T, own_inputs(each)) for each in components]
    for k in range(2):
        expected = sum(part[k] for part in parts)
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(total[k], expected, rtol=1e-12, atol=1e-13 * scale)


def test_log_likelihood_of_a_sum_equals_the_dense_oracle():
    components, inputs = SUMS["two emissions, all varying, inputs in one"]
    params = combine(*components)
    emissions = varying(3, 2, T).emissions
    expected = dense_log_likelihood(model_arrays(params, T, inputs), np.asarray(emissions))
    value = jax.jit(lgssm_marginal_log_prob)(params, emissions, inputs)
    np.testing.assert_allclose(value, float(expected), rtol=1e-10)


def test_one_component_is_itself_and_combination_is_associative():
    a, b, c = SUMS["univariate"][0]
    for pair in ((combine(a), a), (combine(a, combine(b, c)), combine(combine(a, b), c))):
        jax.tree.map(np.testing.assert_array_equal, *pair)


def test_differentiable_under_jit():
    def total(v):
        params = combine(local_level(v[0], v[1]), regression(np.ones((T, 1)), v[2], v[3]))
        return jnp.sum(params.dynamics.cov * jnp.array([[1.0, 5.0], [5.0, 2.0]])) + 3 * jnp.sum(
            params.emissions.cov
        )

    np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.ones(4)), [1.0, 3.0, 2.0, 3.0])


def test_what_does_not_fit_is_refused():
    level = local_level(1.0, 1.0)
    with pytest.raises(ValueError, match="at least one component, got none"):
        combine()
    with pytest.raises(ValueError, match=r"share one number of time steps T, got \[4, 5\]"):
        combine(regression(np.ones((4, 1))), level, regression(np.ones((5, 1))))
    with pytest.raises(ValueError, match=r"share one emission dimension N, got \[1, 2\]"):
        combine(level, random_stable(2, 2, T).params)
    with pytest.raises(ValueError, match=r"share one number of inputs, got \[1, 2\]"):
        combine(with_inputs(2, 2, T, U=1).params, with_inputs(2, 2, T, U=2).params)
    moving = level._replace(dynamics=level.dynamics._replace(weights=lambda t: jnp.eye(1)))
    with pytest.raises(TypeError, match="parameters as arrays, got a function of time"):
        combine(level, moving)
