"""Components without a prior: which states are diffuse, after any transformation, and values."""

import copy
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dynamax.linear_gaussian_ssm.inference import ParamsLGSSMInitial

import elkax
from elkax import ExactDiffuse
from elkax.models import (
    LinearGaussianConjugateSSM,
    LinearGaussianSSM,
    arma,
    combine,
    local_level,
    local_linear_trend,
    regression,
    seasonal,
    trigonometric_seasonal,
)
from elkax.smoothers import (
    lgssm_filter,
    lgssm_forecast,
    lgssm_marginal_log_prob,
    lgssm_posterior_sample,
    lgssm_smoother,
)
from oracles import dense, dense_log_likelihood, model_arrays
from problems import with_inputs

T = 12
RNG = np.random.default_rng(8)
X = np.c_[np.ones(T), RNG.standard_normal(T)]
VALUES = np.cumsum(RNG.standard_normal(T)) + np.tile([2.0, -1.0, -1.0], T // 3)
VALUES[[4, 9]] = np.nan
Y = VALUES[:, None]
BUILDERS = {
    "level": lambda v, **start: local_level(v, 0.5, **start),
    "trend": lambda v, **start: local_linear_trend(v, 0.1, 0.5, **start),
    "seasonal": lambda v, **start: seasonal(3, v, 0.5, **start),
    "harmonics": lambda v, **start: trigonometric_seasonal(5, v, 0.5, **start),
    "regression": lambda v, **start: regression(X, v, 0.5, **start),
}
every_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def known_start(params):
    """The parameters with mean and covariance zero, and which states are diffuse."""
    size = len(params.initial.mean)
    start = ParamsLGSSMInitial(jnp.zeros(size), jnp.zeros((size, size)))
    return params._replace(initial=start), params.initial.diffuse


@every_builder
def test_nothing_is_known_of_the_first_state(build):
    initial = build(0.2).initial
    assert isinstance(initial, elkax.DiffuseInitial)
    assert initial.diffuse == (True,) * len(initial.mean)
    np.testing.assert_array_equal(initial.mean, 0.0)
    # A function that does not know the record gives NaN and not a wrong number.
    np.testing.assert_array_equal(initial.cov, np.diag(np.full(len(initial.mean), np.inf)))


@every_builder
def test_a_variance_gives_a_proper_start(build):
    size = len(build(0.2).initial.mean)
    initial = build(0.2, initial_variance=3.0, initial_mean=2.0).initial
    assert type(initial) is ParamsLGSSMInitial
    np.testing.assert_array_equal(initial.mean, np.full(size, 2.0))
    np.testing.assert_array_equal(initial.cov, 3.0 * np.eye(size))
    assert type(build(0.2, initial_variance=0.0).initial) is ParamsLGSSMInitial


@every_builder
def test_a_mean_alone_is_refused(build, unchecked):
    for options in ({}, {"initial_variance": np.inf}):
        with pytest.raises(ValueError, match="initial_mean.*finite initial_variance too"):
            build(0.2, initial_mean=1.0, **options)


def test_infinite_variances_are_diffuse_states():
    for variance in (np.array([np.inf, 2.0, 3.0]), jnp.array([jnp.inf, 2.0, 3.0]), [np.inf, 2, 3]):
        initial = seasonal(4, 0.1, initial_variance=variance, initial_mean=1.0).initial
        assert initial.diffuse == (True, False, False)
        np.testing.assert_array_equal(initial.mean, [0.0, 1.0, 1.0])
        np.testing.assert_array_equal(initial.cov, np.diag([np.inf, 2.0, 3.0]))
    assert seasonal(4, 0.1, initial_variance=np.inf).initial.diffuse == (True,) * 3
    assert local_level(0.1, 1.0, initial_variance=[np.inf]).initial.diffuse == (True,)


def test_infinite_variance_beside_a_traced_one():
    def build(v):
        return seasonal(4, 0.1, initial_variance=[np.inf, v, 3.0]).initial

    assert jax.jit(build)(2.0).diffuse == (True, False, False)
    gradient = jax.grad(lambda v: build(v).cov[1, 1] ** 2)(2.0)
    np.testing.assert_array_equal(gradient, 4.0)


def test_combination_keeps_what_is_diffuse():
    known = local_level(0.1, 1.0, initial_variance=2.0)
    diffuse = local_linear_trend(0.1, 0.2, 1.0)
    params = combine(known, diffuse, arma((0.5,)))
    assert params.initial.diffuse == (False, True, True, False)
    np.testing.assert_array_equal(params.initial.cov, np.diag([2.0, np.inf, np.inf, 4 / 3]))
    again = combine(combine(known, diffuse), arma((0.5,)))
    assert again.initial.diffuse == params.initial.diffuse
    assert type(combine(known, arma((0.5,))).initial) is ParamsLGSSMInitial
    plain = known._replace(initial=ParamsLGSSMInitial(jnp.zeros(1), jnp.full((1, 1), jnp.inf)))
    assert combine(plain, known).initial.diffuse == (True, False)


TRANSFORMATIONS = {
    "jit": lambda build: jax.jit(build)(0.2),
    "vmap": lambda build: jax.tree.map(lambda leaf: leaf[1], jax.vmap(build)(jnp.array([9, 0.2]))),
    "jvp": lambda build: jax.jvp(build, (0.2,), (1.0,))[0],
    "scan": lambda build: jax.tree.map(
        lambda leaf: leaf[0], jax.lax.map(build, jnp.array([0.2, 0.3]))
    ),
    "pickle": lambda build: pickle.loads(pickle.dumps(build(0.2))),
    "copy": lambda build: copy.copy(build(0.2)),
    "deep copy": lambda build: copy.deepcopy(build(0.2)),
    "tree": lambda build: jax.tree.map(jnp.asarray, build(0.2)),
    "replace": lambda build: build(0.2)._replace(initial=build(0.2).initial._replace(mean=0.0)),
}


@pytest.mark.parametrize("transform", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_what_is_diffuse_survives(transform):
    def build(v):
        return combine(local_level(v, 0.5), seasonal(3, v, initial_variance=[2.0, np.inf]))

    params, expected = transform(build), build(0.2)
    assert params.initial.diffuse == (True, False, True)
    np.testing.assert_array_equal(params.initial.cov, expected.initial.cov)
    for actual, wanted in zip(
        jax.tree.leaves(params[1:]), jax.tree.leaves(expected[1:]), strict=True
    ):
        np.testing.assert_allclose(actual, wanted, rtol=1e-15)


def mixed(v):
    """Three diffuse states and a stationary one."""
    return combine(local_level(v[0], v[1]), seasonal(3, v[2]), arma((0.6,), (), v[3]))


V = jnp.array([0.3, 0.5, 0.2, 0.7])


def test_value_and_gradient_of_a_mixed_start():
    """The infinities of the record spoil neither the value nor a derivative."""

    def value(v):
        params = mixed(v)
        return lgssm_marginal_log_prob(params, Y, initial=ExactDiffuse(params.initial.diffuse))

    def oracle(v):
        start = mixed(v).initial.cov.at[jnp.arange(3), jnp.arange(3)].set(0.0)
        params = mixed(v)._replace(initial=ParamsLGSSMInitial(jnp.zeros(4), start))
        return dense_log_likelihood(model_arrays(params, T), Y, (True, True, True, False))

    result, gradient = jax.jit(jax.value_and_grad(value))(V)
    np.testing.assert_allclose(result, float(oracle(V)), rtol=1e-11)
    step = 1e-5
    for i, unit in enumerate(np.eye(4)):
        change = oracle(V + step * unit) - oracle(V - step * unit)
        # Central differences in extended precision: the second order of the step.
        np.testing.assert_allclose(gradient[i], float(change / (2 * step)), rtol=1e-7)


@every_builder
def test_default_call_equals_the_dense_oracle(build):
    params = build(0.2)
    plain, diffuse = known_start(params)
    expected = dense(model_arrays(plain, T), Y, diffuse)
    posterior = lgssm_smoother(params, Y)
    np.testing.assert_allclose(
        posterior.marginal_loglik, float(expected.log_likelihood), rtol=1e-10
    )
    np.testing.assert_allclose(
        posterior.smoothed_means, expected.smoothed_means.astype(float), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("size", [1e-6, 1.0, 2.4e6])
def test_default_call_in_float32_in_any_units(size):
    """A level of millions, or a coefficient of millionths, is found without a word."""
    with jax.enable_x64(False):
        y = jnp.asarray(size * (1.0 + 0.01 * np.nan_to_num(VALUES)))[:, None]
        noise = (0.01 * size) ** 2
        level = lgssm_smoother(local_level(0.1 * noise, noise), y).smoothed_means[-1, 0]
        line = lgssm_smoother(regression(X, 0.0, noise), y).smoothed_means[-1]
    assert abs(level / size - 1.0) < 0.1
    expected = np.linalg.lstsq(X, np.asarray(y, float)[:, 0])[0]
    np.testing.assert_allclose(line, expected, rtol=1e-4, atol=1e-5 * size)


CLASSES = [LinearGaussianSSM, LinearGaussianConjugateSSM]


@pytest.mark.parametrize("model", CLASSES)
def test_class_hands_its_start_and_the_length_on(model):
    problem = with_inputs(D=2, N=2, T=7)
    start, key = elkax.ExactDiffuse((True, False)), jax.random.key(0)
    ours = model(2, 2, 1, initial=start)
    head = problem.params, problem.emissions[:5], problem.inputs[:5]
    padded = problem.params, problem.emissions.at[5:].set(jnp.nan), problem.inputs
    future = jnp.ones((2, 1))
    for method, function in (
        (ours.marginal_log_prob, lgssm_marginal_log_prob),
        (ours.filter, lgssm_filter),
        (ours.smoother, lgssm_smoother),
        (partial(ours.posterior_sample, key), partial(lgssm_posterior_sample, key)),
    ):
        whole = method(*padded, length=5)
        for actual, wanted in zip(
            jax.tree.leaves(whole),
            jax.tree.leaves(function(*padded, initial=start, length=5)),
            strict=True,
        ):
            np.testing.assert_array_equal(actual, wanted)
    np.testing.assert_allclose(
        ours.marginal_log_prob(*padded, length=5),
        lgssm_marginal_log_prob(*head, initial=start),
        rtol=1e-11,
    )
    for actual, wanted in zip(
        ours.forecast(padded[0], padded[1], 2, padded[2], future, length=5),
        lgssm_forecast(head[0], head[1], 2, head[2], future, initial=start),
        strict=True,
    ):
        np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-12)
    for actual, wanted in zip(
        ours.posterior_predictive(*padded, length=5), ours.posterior_predictive(*head), strict=True
    ):
        np.testing.assert_allclose(actual[:5], wanted, rtol=1e-9, atol=1e-12)
    assert model(2, 2, 1).initial is None
