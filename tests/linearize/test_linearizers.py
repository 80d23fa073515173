"""Every linearizer against moments computed by hand: exact, affine, singular, small covariances."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.linearize import Cubature, GaussHermite, SigmaPoints, Taylor, Unscented

RULES = {
    "cubature": Cubature(),
    "unscented": Unscented(),
    "narrow unscented": Unscented(alpha=0.5, beta=2.0, kappa=0.0),
    "gauss_hermite": GaussHermite(5),
}
LINEARIZERS = {"taylor": Taylor()} | {name: SigmaPoints(rule) for name, rule in RULES.items()}
every_rule = pytest.mark.parametrize("name", RULES)
every_linearizer = pytest.mark.parametrize("name", LINEARIZERS)

RNG = np.random.default_rng(3)
MEAN = RNG.normal(size=3)
ROOT = np.tril(RNG.normal(size=(3, 3))) + np.eye(3)
COV = ROOT @ ROOT.T
WEIGHTS = RNG.normal(size=(2, 3))


def curved(z):
    return jnp.stack([jnp.sin(z[0]) * z[1], jnp.exp(0.3 * z[2]) + z[0] * z[1]])


def affine(z):
    return jnp.asarray(WEIGHTS) @ z + 2.0


def cubic(z):
    return jnp.stack([z[0] ** 3 - z[1] * z[2], z[2] ** 2 * z[0]])


@cache
def compiled(name, function):
    return jax.jit(partial(LINEARIZERS[name], function))


@every_linearizer
@pytest.mark.parametrize("cov", [COV, np.zeros((3, 3)), np.diag([1.0, 0.0, 2.0])])
def test_affine_function_is_itself(name, cov):
    out = compiled(name, affine)(jnp.asarray(MEAN), jnp.asarray(cov))
    # Rounding of values of size 5, divided by a smallest standard deviation of about 0.5.
    np.testing.assert_allclose(out.weights, WEIGHTS, atol=1e-13)
    np.testing.assert_allclose(out.offset, np.full(2, 2.0), atol=1e-13)
    if out.cov is not None:
        np.testing.assert_allclose(out.cov, np.zeros((2, 2)), atol=1e-25)


@every_rule
def test_moments_of_the_rule(name):
    """Second moments are exact; the central weight makes up for what is missing."""
    points, weights, spread = RULES[name](4)
    assert np.all(weights > 0) and spread >= 0
    np.testing.assert_allclose(weights @ points, np.zeros(4), atol=1e-13)
    np.testing.assert_allclose((weights[:, None] * points).T @ points, np.eye(4), atol=1e-13)


def textbook_unscented(function, mean, cov, alpha, beta, kappa):
    """Moments by the usual weights, differences and products of covariances."""
    D = len(mean)
    lam = alpha**2 * (D + kappa) - D
    L = np.linalg.cholesky(cov)
    shifts = np.sqrt(D + lam) * L.T
    points = np.concatenate([mean[None], mean + shifts, mean - shifts])
    w = np.full(2 * D + 1, 0.5 / (D + lam))
    w[0] = lam / (D + lam)
    wc = w.copy()
    wc[0] += 1 - alpha**2 + beta
    values = np.stack([np.asarray(function(p)) for p in points])
    average = w @ values
    dev = values - average
    A = np.linalg.solve(cov, ((points - mean).T * wc) @ dev).T
    return A, average - A @ mean, (dev.T * wc) @ dev - A @ cov @ A.T


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("cubature", (1.0, 0.0, 0.0)),
        ("unscented", (3**0.5, 2.0, 1.0)),
        ("narrow unscented", (0.5, 2.0, 0.0)),
    ],
)
def test_regression_is_the_textbook_one(name, parameters):
    out = compiled(name, curved)(jnp.asarray(MEAN), jnp.asarray(COV))
    expected = textbook_unscented(curved, MEAN, COV, *parameters)
    for actual, wanted in zip(out, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-11, atol=1e-11)


def test_gauss_hermite_integrates_polynomials_exactly():
    """Against Stein's lemma: the slope of E f is E f', here with moments of a Gaussian."""
    out = compiled("gauss_hermite", cubic)(jnp.asarray(MEAN), jnp.asarray(COV))
    m, P = MEAN, COV
    slope = np.array(
        [
            [3 * (m[0] ** 2 + P[0, 0]), -m[2], -m[1]],
            [m[2] ** 2 + P[2, 2], 0.0, 2 * (m[0] * m[2] + P[0, 2])],
        ]
    )
    average = np.array(
        [
            m[0] ** 3 + 3 * m[0] * P[0, 0] - m[1] * m[2] - P[1, 2],
            m[0] * (m[2] ** 2 + P[2, 2]) + 2 * m[2] * P[0, 2],
        ]
    )
    np.testing.assert_allclose(out.weights, slope, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(out.weights @ m + out.offset, average, rtol=1e-11)
    # The variance that is left, against a million draws: their error is about 1e-3 of it.
    draws = np.random.default_rng(0).multivariate_normal(m, P, 10**6)
    values = np.asarray(jax.vmap(cubic)(jnp.asarray(draws)))
    rest = values - draws @ slope.T
    np.testing.assert_allclose(out.cov, np.cov(rest.T), rtol=0.03)


@every_linearizer
def test_limit_of_a_small_covariance_is_taylor(name):
    """P = s^2 COV tends to the Jacobian as s^2, and is it exactly at P = 0."""
    taylor = compiled("taylor", curved)(jnp.asarray(MEAN), jnp.asarray(COV))
    for size in (1e-3, 1e-5, 1e-8, 0.0):
        out = compiled(name, curved)(jnp.asarray(MEAN), jnp.asarray(size**2 * COV))
        # Third differences of the function, and rounding divided by the spread of the points.
        bound = 30 * size**2 + (1e-14 / size if size else 1e-15)
        np.testing.assert_allclose(out.weights, taylor.weights, atol=bound)
        if out.cov is not None:
            assert np.max(np.abs(out.cov)) <= 100 * size**4 + 1e-25


@every_rule
def test_singular_covariance(name):
    """Rank one: the slope along it is the regression's on the line, the Jacobian's elsewhere."""
    direction = np.array([0.0, 1.5, -0.5])
    out = compiled(name, curved)(jnp.asarray(MEAN), jnp.asarray(np.outer(direction, direction)))
    points, weights, _ = RULES[name](3)
    nodes = points[:, 1]  # the only coordinate of the factor that is not zero
    values = np.stack([np.asarray(curved(MEAN + direction * node)) for node in nodes])
    along = (weights * nodes) @ values
    np.testing.assert_allclose(out.weights @ direction, along, atol=1e-12)
    jacobian = np.asarray(jax.jacfwd(curved)(jnp.asarray(MEAN)))
    # The null space of the last row of the inverse factor: states that P leaves where they are.
    np.testing.assert_allclose(out.weights[:, [0, 2]], jacobian[:, [0, 2]], atol=1e-12)
    assert np.min(np.linalg.eigvalsh(out.cov)) >= -1e-15


@every_rule
def test_covariance_is_semidefinite_for_any_function(name):
    rng = np.random.default_rng(5)

    def wild(z):
        return jnp.stack([jnp.sin(40 * z[0]), jnp.cos(37 * z[1] + z[2]), jnp.abs(z[2])])

    linearize = compiled(name, wild)
    for _ in range(20):
        out = linearize(jnp.asarray(rng.normal(size=3)), jnp.asarray(COV))
        assert np.min(np.linalg.eigvalsh(out.cov)) >= -1e-12 * np.max(np.abs(out.cov))


@every_linearizer
def test_expectation_is_that_of_the_affine_map(name):
    linearizer, mean, cov = LINEARIZERS[name], jnp.asarray(MEAN), jnp.asarray(COV)
    out = compiled(name, curved)(mean, cov)
    np.testing.assert_allclose(
        linearizer.expect(curved, mean, cov), out.weights @ mean + out.offset, rtol=1e-13
    )


def test_kink_at_the_mean():
    """The square root has no slope at zero; a regression has one, or none where nothing varies."""

    def root(z):
        return jnp.sqrt(jnp.abs(z))

    for cov in (jnp.ones((1, 1)), jnp.zeros((1, 1))):
        out = jax.jit(partial(SigmaPoints(), root))(jnp.zeros(1), cov)
        np.testing.assert_allclose(out.weights, np.zeros((1, 1)), atol=1e-15)
        np.testing.assert_allclose(out.offset, np.asarray(cov[0]), atol=1e-15)
    exact = jax.jit(partial(Taylor(), root))(jnp.zeros(1), jnp.zeros((1, 1)))
    assert not np.all(np.isfinite(exact.weights))


@pytest.mark.parametrize("parameters", [(1.0, 0.0, -3.0), (1.0, 0.0, -1.0), (0.0, 2.0, 1.0)])
def test_rules_that_cannot_be(parameters):
    with pytest.raises(ValueError, match="unscented"):
        Unscented(*parameters)(2)


@pytest.mark.parametrize("order", [1, 2.5, True])
def test_order_of_gauss_hermite(order):
    with pytest.raises((ValueError, TypeError)):
        GaussHermite(order)
