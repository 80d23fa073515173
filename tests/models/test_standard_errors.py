import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statsmodels.api as sm
from dynamax.linear_gaussian_ssm import PosteriorGSSMSmoothed

from elkax.datasets import load_nile
from elkax.models import LinearGaussianSSM, local_level, maximum_likelihood, transform_errors
from elkax.models.free_parameters import FreeParameters
from elkax.models.identification import _describe_free_basis
from elkax.models.information import covariance_of, decompose, parameter_errors
from elkax.smoothers.diffuse_initial import DiffuseInitial

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
    params = local_level(1468.5003284, 15099.6858361, initial_variance=1e7)
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


def test_what_is_not_identified_is_refused_and_the_rest_is_as_without_it():
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
    # The numbers of the fit, in their order: F, Q, H and R.
    np.testing.assert_array_equal(np.isnan(fit.standard_errors), [0, 1, 1, 0])
    assert "the data do not determine theta[1], theta[2]" in fit.message

    message = "change emissions.weights and dynamics.cov and .* props.emissions.weights.trainable"
    with pytest.raises(ValueError, match=message):
        model.standard_errors(fit.params, props, emissions)
    freeze(props, [("emissions", "weights")])
    errors = model.standard_errors(fit.params, props, emissions)
    assert errors.initial.cov == 0 and errors.emissions.weights == 0
    # However the scale is fixed, what does not depend on it has the same error.
    carried = transform_errors(free.constrain, fit.estimate, fit.covariance)
    np.testing.assert_allclose(carried.dynamics.weights, errors.dynamics.weights, rtol=1e-6)
    np.testing.assert_allclose(carried.emissions.cov, errors.emissions.cov, rtol=1e-6)


def general_model(states=3, emissions=2):
    model = LinearGaussianSSM(states, emissions)
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(states, states)))
    params, props = model.initialize(
        jax.random.key(0),
        dynamics_weights=jnp.asarray(0.9 * q),
        dynamics_covariance=jnp.asarray(np.diag(1.0 + np.arange(states))),
    )
    return model, params, props


@pytest.mark.parametrize(
    ("frozen", "freedoms"),
    [
        # All changes of basis and all shifts of the origin.
        ([], 9 + 3),
        # A shift moves the mean, rotations alone keep a covariance of one.
        ([("initial", "mean"), ("initial", "cov")], 3),
        # Two rows of H: what is added to the states must not be seen.
        ([("initial", "mean"), ("initial", "cov"), ("emissions", "weights")], 0),
        ([("initial", "mean"), ("dynamics", "weights"), ("emissions", "weights")], 0),
        ([("initial", "mean"), ("dynamics", "weights")], 3),
    ],
)
def test_free_changes_of_basis_are_counted(frozen, freedoms):
    _, params, props = general_model()
    freeze(props, frozen)
    message = _describe_free_basis(params, FreeParameters(params, props).constrainers)
    if freedoms == 0:
        assert message is None
    else:
        assert f"({freedoms} free numbers)" in message
        # Doing what the message says is enough.
        advised = re.findall(r"props\.(\w+)\.(\w+)\.trainable = False", message)
        freeze(props, advised)
        assert _describe_free_basis(params, FreeParameters(params, props).constrainers) is None


@pytest.mark.parametrize(("states", "emissions"), [(1, 1), (4, 2)])
def test_a_model_with_everything_free_is_refused_before_anything_is_computed(
    states, emissions, monkeypatch
):
    model = LinearGaussianSSM(states, emissions)
    params, props = model.initialize(jax.random.key(0))
    monkeypatch.setattr(model, "marginal_log_prob", None)
    with pytest.raises(ValueError, match=r"not identified: .*; freeze what fixes the basis"):
        model.standard_errors(params, props, np.zeros((20, emissions)))


def test_a_trainable_covariance_that_is_singular_is_named():
    model, params, props = nile_with_variances_free()
    params = params._replace(dynamics=params.dynamics._replace(cov=jnp.zeros((1, 1))))
    with pytest.raises(ValueError, match="dynamics.cov must be positive definite .* freeze it"):
        model.standard_errors(params, props, np.ones((5, 1)))


@pytest.mark.parametrize("record", [True, False], ids=["record", "infinite variance"])
def test_a_diffuse_start_is_never_free(record):
    _, params, props = general_model()
    mean, cov, diffuse = np.zeros(3), np.eye(3), (False, True, False)
    initial = DiffuseInitial.of(mean, cov, diffuse)
    if not record:
        initial = params.initial._replace(cov=initial.cov)
    params = params._replace(initial=initial)
    free = FreeParameters(params, props)
    assert np.all(np.isfinite(free.theta)) and not any(
        place[0] == "initial" for place in (free.constrainers)
    )
    back = free.constrain(free.theta)
    assert type(back.initial) is type(initial) and back.initial == initial
    np.testing.assert_allclose(back.dynamics.weights, params.dynamics.weights)
    errors = free.place(jnp.ones_like(free.values(free.theta)))
    np.testing.assert_array_equal(errors.initial.cov, np.zeros((3, 3)))


def test_states_that_the_data_do_not_determine_are_named(monkeypatch):
    model, params, props = general_model()
    freeze(props, [("dynamics", name) for name in ("weights", "bias")] + [("emissions", "weights")])
    initial = DiffuseInitial.of(np.zeros(3), np.eye(3), (False, True, True))
    params = params._replace(initial=initial)
    covariances = np.broadcast_to(np.diag([1.0, np.inf, 2.0]), (6, 3, 3))

    def smoother(params, emissions, inputs=None):
        return PosteriorGSSMSmoothed(0.0, None, None, None, jnp.asarray(covariances), None)

    monkeypatch.setattr(model, "smoother", smoother)
    with pytest.raises(ValueError, match="do not determine the states 1 "):
        model.standard_errors(params, props, np.zeros((2, 6, 2)))


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
