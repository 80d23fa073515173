import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statsmodels.api as sm

from elkax.datasets import load_nile
from elkax.models import LinearGaussianSSM, local_level, maximum_likelihood, transform_errors
from elkax.models.free_parameters import FreeParameters
from elkax.models.information import covariance_of, decompose, parameter_errors

FIXED = [
    (group, name)
    for group, names in (
        ("initial", ("mean", "cov")),
        ("dynamics", ("bias", "input_weights")),
        ("emissions", ("bias", "input_weights")),
    )
    for name in names
]


def freeze(props, places):
    for group, name in places:
        getattr(getattr(props, group), name).trainable = False


def nile_with_variances_free():
    """The local level at the maximum (start N(0, 1e7)), and only its variances trainable."""
    # The maximum to nine digits; a Nelder-Mead search on statsmodels' likelihood ends there too.
    params = local_level(1468.5003284, 15099.6858361)
    model = LinearGaussianSSM(1, 1)
    _, props = model.initialize(jax.random.key(0))
    freeze(props, [*FIXED, ("dynamics", "weights"), ("emissions", "weights")])
    return model, params, props


def test_standard_errors_of_the_nile_equal_statsmodels():
    model, params, props = nile_with_variances_free()
    values = load_nile().values
    # Four times the same series, so four times the information.
    errors = model.standard_errors(params, props, np.stack([values[:, None]] * 4))
    reference = sm.tsa.UnobservedComponents(values, "llevel")
    reference.ssm.initialize_known(np.zeros(1), np.full((1, 1), 1e7))
    reference.ssm.loglikelihood_burn = 0
    at = np.array([params.emissions.cov[0, 0], params.dynamics.cov[0, 0]])
    # By complex steps, of the log-likelihood per observation. ("oim" there is not the Hessian but
    # Harvey's approximation to its expectation, and 20 to 40 % smaller.)
    information = -len(values) * reference.hessian(at, method="approx", approx_complex_step=True)
    ours = 2 * np.array([errors.emissions.cov[0, 0], errors.dynamics.cov[0, 0]])
    np.testing.assert_allclose(ours, np.sqrt(np.diag(np.linalg.inv(information))), rtol=1e-6)
    assert jax.tree.structure(errors) == jax.tree.structure(params)
    assert errors.initial.cov == 0 and errors.emissions.weights == 0


def test_standard_errors_of_what_is_not_identified_are_nan():
    # With z_1 = 0 only the product of H and the scale of the states matters: H / s and s^2 Q give
    # the same likelihood. F and R are identified all the same.
    model = LinearGaussianSSM(1, 1)
    truth, props = model.initialize(
        jax.random.key(0),
        initial_covariance=jnp.zeros((1, 1)),
        dynamics_weights=jnp.array([[0.8]]),
        dynamics_covariance=jnp.array([[1.0]]),
        emission_weights=jnp.array([[0.8]]),
        emission_covariance=jnp.array([[0.5]]),
    )
    freeze(props, FIXED)
    _, emissions = model.sample(truth, jax.random.key(1), 300)
    free = FreeParameters(truth, props)
    fit = maximum_likelihood(free.constrain, free.theta, emissions)
    assert fit.converged

    errors = model.standard_errors(fit.params, props, emissions)
    assert np.isnan(errors.emissions.weights) and np.isnan(errors.dynamics.cov)
    assert errors.dynamics.weights > 0 and errors.emissions.cov > 0
    assert errors.initial.cov == 0
    # The same holds for the numbers of the fit, in their order: F, Q, H and R.
    np.testing.assert_array_equal(np.isnan(fit.standard_errors), [0, 1, 1, 0])
    carried = transform_errors(free.constrain, fit.estimate, fit.covariance)
    np.testing.assert_allclose(carried.dynamics.weights, errors.dynamics.weights, rtol=1e-6)
    np.testing.assert_allclose(carried.emissions.cov, errors.emissions.cov, rtol=1e-6)


INFORMATION = np.array([[4.0, 1.0, 0.0], [1.0, 9.0, 0.0], [0.0, 0.0, 1e-6]])


def test_regular_information_is_inverted_whatever_its_units():
    # The third number has units in which its curvature is tiny; that is not a flat direction.
    covariance = covariance_of(decompose(jnp.asarray(INFORMATION), jnp.zeros(3)))
    np.testing.assert_allclose(covariance, np.linalg.inv(INFORMATION), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("curvature", [0.0, -2.0, 1e-12, np.nan], ids=str)
def test_errors_of_an_information_that_is_not_positive_definite(curvature):
    # Curvature in the direction (1, -1, 0) of the first two, none of the third.
    q, _ = np.linalg.qr(np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]))
    information = q @ np.diag([3.0, curvature, 2.0]) @ q.T
    covariance = covariance_of(decompose(jnp.asarray(information), jnp.zeros(3)))
    assert np.all(np.isnan(covariance[:2])) and np.all(np.isnan(covariance[:, :2]))
    if np.isnan(curvature):
        assert np.all(np.isnan(covariance))
        return
    np.testing.assert_allclose(covariance[2, 2], 0.5)

    top = jnp.array([2.0, 0.0, 1.0])

    def quadratic(x):
        return -0.5 * (x - top) @ information @ (x - top)

    # The sum of the first two is known although neither of them is.
    errors = parameter_errors(quadratic, lambda x: jnp.stack([x[0], x[0] + x[1], x[2] ** 2]), top)
    np.testing.assert_allclose(errors, [np.nan, np.sqrt(2 / 3), np.sqrt(4 / 2)], rtol=1e-12)


def test_a_gradient_that_is_left_hides_weak_directions():
    hessian, gradient = jnp.diag(jnp.array([4.0, 9.0])), jnp.array([0.0, 0.0])
    coupled = jnp.array([[1.0, 0.99], [0.99, 1.0]])
    assert np.all(np.isfinite(covariance_of(decompose(coupled, gradient))))
    # The eigenvalues are 1.99 and 0.01; a gradient of 0.1 standard errors is more than the latter.
    assert np.all(np.isnan(covariance_of(decompose(coupled, jnp.array([0.1, 0.0])))))
    assert np.all(np.isfinite(covariance_of(decompose(hessian, jnp.array([0.2, 0.0])))))
