"""What single cells promise beyond the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax import cells


@pytest.mark.parametrize("name", ["forget", "input"])
def test_gates_that_are_shut_leave_no_quotient_of_zeros(name):
    """sigma(-200) is zero in float32."""
    cell = cells.MinLSTM(1, 1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cell.initialize(jax.random.key(0)))

    def state(bias):
        shut = params._replace(bias=bias.astype(jnp.float32))
        return cells.run(cell, shut, jnp.zeros((1, 1)), jnp.ones(1)).final_state[0]

    # e^(-201) / (e^(-201) + e^(-200)), or the other way round.
    first, second = (-201.0, -200.0) if name == "forget" else (-200.0, -201.0)
    bias = jnp.array([[first], [second], [0.0]])
    share = 1 / (1 + np.exp(second - first))
    np.testing.assert_allclose(state(bias), share, rtol=1e-6)
    slope = jax.grad(state)(bias)
    np.testing.assert_allclose(slope[0, 0], share * (1 - share), rtol=1e-6)


@pytest.mark.parametrize("gate, logit", [(-20.0, 2.0), (-60.0, 2.0), (-150.0, 2.0), (0.0, 60.0)])
def test_rg_lru_where_its_decay_rounds_to_one(gate, logit):
    """The gain is sqrt(2 kappa sigma(gate) softplus(-logit)), with slopes of half of it."""
    cell = cells.RGLRU(1, 1)
    params = cells.ParamsRGLRU(
        jnp.full(1, logit, "float32"),
        jnp.zeros((2, 1, 1), "float32"),
        jnp.zeros((2, 1), "float32"),
        None,
    )

    def state(gate, logit):
        bias = jnp.stack((gate, jnp.zeros((), "float32")))[:, None]
        moved = params._replace(bias=bias, decay_logit=logit[None])
        return cells.run(cell, moved, jnp.ones((1, 1), "float32")).final_state[0]

    at = jnp.float32(gate), jnp.float32(logit)
    value, slopes = jax.value_and_grad(state, (0, 1))(*at)
    rate = 8 * np.exp(-np.logaddexp(0, -gate)) * np.log1p(np.exp(-logit))
    expected = 0.5 * np.sqrt(-np.expm1(-2 * rate))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    closed = 1 / (1 + np.exp(gate)), -1 / (1 + np.exp(logit)) / np.log1p(np.exp(-logit))
    np.testing.assert_allclose(slopes, expected / 2 * np.array(closed), rtol=1e-5)


def test_rings_of_diagonal_complex_cells():
    cell = cells.DiagonalComplex(2, 500, least=0.4, most=0.9, phase=1.0)
    params = cell.initialize(jax.random.key(0))
    size, phase = np.exp(-np.exp(params.log_rate)), np.exp(params.log_phase)
    assert 0.4 < size.min() < 0.45 and 0.89 < size.max() < 0.9
    assert 0 < phase.min() < 0.02 and 0.98 < phase.max() <= 1.0
    np.testing.assert_allclose(np.exp(params.log_gain), np.sqrt(1 - size**2), rtol=1e-12)


def test_first_weights():
    """Orthogonal recurrent weights, and the bias of the forget gate alone."""
    params = cells.LSTM(2, 5, forget_bias=3.0).initialize(jax.random.key(0))
    for weights in params.recurrent_weights:
        np.testing.assert_allclose(weights @ weights.T, np.eye(5), atol=1e-14)
    np.testing.assert_array_equal(params.bias[:, 0], [0, 3, 0, 0])
    assert not np.allclose(params.recurrent_weights[0], params.recurrent_weights[1])
