import dynamax.linear_gaussian_ssm as dynamax_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.models import LinearGaussianConjugateSSM, LinearGaussianSSM
from elkax.smoothers import lgssm_marginal_log_prob
from problems import with_inputs, with_missing


def two_gapped_sequences():
    first = with_missing(with_inputs(2, 3, 30, U=1, seed=2), rows=(0, 5, 6), entries=((2, 1),))
    entries = [(t, t % 3) for t in range(0, 30, 2)]
    second = with_missing(with_inputs(2, 3, 30, U=1, seed=8), rows=(29,), entries=entries)
    return jnp.stack([first.emissions, second.emissions]), jnp.stack([first.inputs, second.inputs])


# From TensorFlow Probability, on sampling a Wishart distribution for its shape.
@pytest.mark.filterwarnings("ignore:shape requires ndarray:DeprecationWarning")
@pytest.mark.parametrize("cls", [LinearGaussianSSM, LinearGaussianConjugateSSM])
def test_em_is_monotone_with_gaps(cls, key):
    emissions, inputs = two_gapped_sequences()
    model = cls(2, 3, 1)
    params, props = model.initialize(
        key, emission_covariance=jnp.array([[1.0, 0.6, 0.2], [0.6, 1.5, 0.3], [0.2, 0.3, 0.8]])
    )
    fitted, values = model.fit_em(params, props, emissions, inputs, num_iters=12, verbose=False)
    first = sum(
        lgssm_marginal_log_prob(params, y, u) for y, u in zip(emissions, inputs, strict=True)
    )
    np.testing.assert_allclose(values[0], first + model.log_prior(params), rtol=1e-10)
    # Rounding of a value near 1e2, and the 1e-9 of dynamax's M-step.
    assert np.all(np.diff(values) > -1e-7)
    assert values[-1] > values[0] + 1.0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fitted))


def test_m_step_for_one_sequence_is_that_of_dynamax(key):
    rng = np.random.default_rng(4)
    params, props = LinearGaussianSSM(2, 3, 1).initialize(key)

    def gram(size, count):
        rows = jnp.asarray(rng.standard_normal((20, size + count)))
        total = rows.T @ rows
        return total[:size, :size][None], total[:size, size:][None], total[size:, size:][None]

    first = (jnp.ones((1, 2)), jnp.array([[[3.0, 1.2], [1.2, 4.0]]]), jnp.ones(1))
    stats = (first, (*gram(4, 2), jnp.array([19])), (*gram(4, 3), jnp.array([20])))
    # dynamax adds 1e-9 to the diagonal of its normal equations.
    ours = LinearGaussianSSM(2, 3, 1).m_step(params, props, stats, None)
    theirs = dynamax_models.LinearGaussianSSM(2, 3, 1).m_step(params, props, stats, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8), ours, theirs)

    # Two sequences that start at (1, 1) and at (3, 1), each with covariance I.
    means = jnp.array([[1.0, 1.0], [3.0, 1.0]])
    second = jnp.eye(2) + means[:, :, None] * means[:, None, :]
    twice = jax.tree.map(lambda x: jnp.concatenate((x, x)), stats)
    fitted, _ = LinearGaussianSSM(2, 3, 1).m_step(
        params, props, ((means, second, jnp.ones(2)), *twice[1:]), None
    )
    np.testing.assert_allclose(fitted.initial.mean, [2.0, 1.0])
    np.testing.assert_allclose(fitted.initial.cov, [[2.0, 0.0], [0.0, 1.0]])

    for group in props:
        for prop in group:
            prop.trainable = False
    kept, _ = LinearGaussianSSM(2, 3, 1).m_step(params, props, stats, None)
    jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_sgd_with_gaps_raises_the_likelihood(key):
    emissions, inputs = two_gapped_sequences()
    model = LinearGaussianSSM(2, 3, 1)
    params, props = model.initialize(key)
    props.dynamics.weights.trainable = False
    fitted, losses = model.fit_sgd(params, props, emissions, inputs, num_epochs=10)
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]
    np.testing.assert_array_equal(fitted.dynamics.weights, params.dynamics.weights)
