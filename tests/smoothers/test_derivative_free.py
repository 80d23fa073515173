"""Sigma-point filters and smoothers of models without derivatives, or without one at the mean."""

import warnings
from functools import cache

import dynamax.generalized_gaussian_ssm as dynamax_general
import dynamax.nonlinear_gaussian_ssm as dynamax_nonlinear
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dynamax.generalized_gaussian_ssm.inference import GHKFIntegrals
from dynamax.generalized_gaussian_ssm.models import ParamsGGSSM
from dynamax.nonlinear_gaussian_ssm.inference_ukf import UKFHyperParams

import elkax
from linearize.test_without_derivative import WITHOUT
from nonlinear_problems import gaussian_params, simulate

T = 12


def sine(z):
    return jnp.sin(z[:1])


def model(dynamics):
    return gaussian_params(
        [0.5, 0.0], 0.3 * np.eye(2), dynamics, 0.05 * np.eye(2), sine, 0.1 * np.eye(1)
    )


@cache
def emissions():
    return jnp.asarray(simulate(model(WITHOUT["custom_vjp"][1]), T, 3)[1])


def dynamax_unscented(params, hyperparams):
    call = dynamax_nonlinear.unscented_kalman_smoother
    return jax.jit(lambda y: call(params, y, hyperparams))(emissions())


def dynamax_gauss_hermite(params):
    general = ParamsGGSSM(
        *params[:4],
        emission_mean_function=sine,
        emission_cov_function=lambda z: 0.1 * jnp.eye(1),
    )
    call = dynamax_general.conditional_moments_gaussian_smoother
    return jax.jit(lambda y: call(general, GHKFIntegrals(order=3), y))(emissions())


PAIRS = {
    "unscented": (
        lambda params, y: elkax.unscented_kalman_smoother(params, y, UKFHyperParams()),
        lambda params: dynamax_unscented(params, UKFHyperParams()),
    ),
    "cubature": (
        elkax.cubature_kalman_smoother,
        lambda params: dynamax_unscented(params, UKFHyperParams(1.0, 0.0, 0.0)),
    ),
    "gauss_hermite": (elkax.gauss_hermite_kalman_smoother, dynamax_gauss_hermite),
}


@pytest.mark.parametrize(
    "name, rule",
    [
        ("custom_vjp", "cubature"),
        ("custom_vjp", "gauss_hermite"),
        ("pure_callback", "unscented"),
        ("odeint", "unscented"),
    ],
)
def test_one_pass_is_dynamax(name, rule):
    params = model(WITHOUT[name][0])
    ours, theirs = PAIRS[rule]
    got = jax.jit(lambda y: ours(params, y))(emissions())
    expected = theirs(params)
    # dynamax adds 1e-9 to what it solves with.
    for field in ("marginal_loglik", "filtered_means", "smoothed_means", "smoothed_covariances"):
        np.testing.assert_allclose(getattr(got, field), getattr(expected, field), atol=1e-6)


@jax.custom_vjp
def scaled(theta, z):
    return theta * WITHOUT["custom_vjp"][1](z)


scaled.defvjp(
    lambda theta, z: (scaled(theta, z), (theta, z)),
    lambda kept, g: jax.vjp(lambda t, z: t * WITHOUT["custom_vjp"][1](z), *kept)[1](g),
)


def test_gradient_in_reverse_mode():
    """What has a rule for reverse mode alone is differentiated by it."""

    def value(theta, dynamics):
        params = model(lambda z: dynamics(theta, z))
        return elkax.cubature_kalman_filter(params, emissions()).marginal_loglik

    ours = jax.grad(value)(0.9, scaled)
    expected = jax.grad(value)(0.9, lambda t, z: t * WITHOUT["custom_vjp"][1](z))
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "name, start", [("custom_vjp", "prior"), ("pure_callback", None), ("odeint", None)]
)
def test_iterated_smoother(name, start):
    """The fixed point is that of the same dynamics with a derivative."""
    function, twin, tolerance = WITHOUT[name]

    def smooth(dynamics):
        return elkax.iterated_smoother(
            model(dynamics),
            emissions(),
            linearizer=elkax.SigmaPoints(),
            damping=elkax.GaussNewton(),
            tolerance=1e-10,
            start=start,
        )

    ours, expected = smooth(function), smooth(twin)
    assert int(ours.info.status) == elkax.Status.CONVERGED
    np.testing.assert_allclose(ours.trajectory, expected.trajectory, atol=10 * tolerance + 1e-8)
    np.testing.assert_allclose(
        ours.posterior.smoothed_covariances,
        expected.posterior.smoothed_covariances,
        atol=10 * tolerance + 1e-8,
    )


def range_and_bearing(z):
    return jnp.stack([jnp.sqrt(z[0] ** 2 + z[1] ** 2), jnp.arctan2(z[1], z[0])])


@cache
def tracking():
    """A walk that starts, by the prior, at the sensor, with a velocity that is known."""
    F = np.eye(4) + 0.1 * np.eye(4, k=2)
    P0 = np.diag([1.0, 1.0, 0.0, 0.0])
    Q, R = 0.01 * np.eye(4), np.diag([0.04, 0.01])
    params = gaussian_params(np.zeros(4), P0, lambda z: F @ z, Q, range_and_bearing, R)
    states, emissions = simulate(params, 20, 2, start=np.array([0.8, 1.0, 0.0, 0.0]))
    return params, jnp.asarray(emissions), states


@pytest.mark.parametrize("start", ["prior", "state"])
def test_prior_at_the_sensor(start):
    """No derivative exists at the start, and none is needed."""
    params, emissions, states = tracking()
    solution = elkax.iterated_smoother(
        params,
        emissions,
        linearizer=elkax.SigmaPoints(),
        damping=elkax.GaussNewton(),
        start=jnp.zeros(4) if start == "state" else start,
        max_iters=100,
    )
    assert int(solution.info.status) == elkax.Status.CONVERGED
    # Five measurement errors, a bearing's at a distance of two.
    np.testing.assert_allclose(solution.trajectory[:, :2], states[:, :2], atol=1.0)


def test_start_at_the_prior_has_its_covariance():
    """After no iteration the model is linearized about the prior: its slopes are those there."""
    params = gaussian_params([0.5], [[2.0]], jnp.sin, [[0.3]], jnp.sin, [[0.1]])
    y = jnp.full((3, 1), jnp.nan)
    solution = elkax.iterated_smoother(
        params, y, linearizer=elkax.SigmaPoints(), start="prior", max_iters=0
    )
    filtered = elkax.cubature_kalman_filter(params, y)
    for ours, expected in (
        (solution.trajectory, filtered.filtered_means),
        (solution.posterior.smoothed_covariances, filtered.filtered_covariances),
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


@cache
def slow_pendulum():
    """A well measured state of size 10, far larger than its deviations."""
    params = gaussian_params(
        [10.0, 0.0],
        1e-4 * np.eye(2),
        lambda z: jnp.stack([z[0] + 0.05 * z[1], z[1] - 0.05 * jnp.sin(z[0])]),
        1e-5 * np.eye(2),
        lambda z: z[:1] + 0.1 * jnp.cos(z[:1]),
        [[1e-4]],
    )
    return params, simulate(params, 1000, 0)[1]


def log_likelihood(dtype, alpha):
    params, y = slow_pendulum()
    params = jax.tree.map(lambda x: x if callable(x) else jnp.asarray(x, dtype), params)
    return elkax.unscented_kalman_filter(
        params, jnp.asarray(y, dtype), UKFHyperParams(alpha, 2.0, 0.0)
    ).marginal_loglik


def test_alpha_that_float32_cannot_carry():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = log_likelihood(jnp.float64, 1e-3)
        wide = log_likelihood(jnp.float32, 0.5)
    for _ in range(2):  # also where the program stands already
        with pytest.warns(UserWarning, match="steps of 0.0014 standard deviations.*0.15"):
            short = log_likelihood(jnp.float32, 1e-3)
    assert exact > 2000
    # States of 10 lie 3,000 deviations away from zero, so that rounding moves each average by a
    # few hundredths of one; the sum of a thousand such terms is left to about one.
    np.testing.assert_allclose(wide, exact, atol=1.0)
    np.testing.assert_allclose(short, exact, atol=2.0)
