"""Sigma points of functions without a derivative: none at all, none at the mean, or too close."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint

from elkax.linearize import Cubature, GaussHermite, SigmaPoints, Taylor, Unscented

MEAN = jnp.array([0.3, -0.4])
COV = jnp.array([[0.5, 0.2], [0.2, 0.3]])
SINGULAR = jnp.array([[0.0, 0.0], [0.0, 0.3]])


def swing(z):
    return jnp.stack([z[0] + 0.2 * z[1], z[1] - 0.3 * jnp.sin(z[0])])


@jax.custom_vjp
def reverse_only(z):
    return swing(z)


reverse_only.defvjp(lambda z: (swing(z), z), lambda z, g: jax.vjp(swing, z)[1](g))


def on_the_host(z):
    shape = jax.ShapeDtypeStruct(z.shape, z.dtype)
    return jax.pure_callback(
        lambda x: np.stack([x[..., 0] + 0.2 * x[..., 1], x[..., 1] - 0.3 * np.sin(x[..., 0])], -1),
        shape,
        z,
        vmap_method="expand_dims",
    )


def solved(z):
    return odeint(lambda y, t: jnp.stack([y[1], -jnp.sin(y[0])]), z, jnp.array([0.0, 0.1]))[-1]


def solved_by_series(z):
    """The same pendulum by Runge-Kutta steps, which have a forward rule."""

    def slope(y):
        return jnp.stack([y[1], -jnp.sin(y[0])])

    def step(y, _):
        a = slope(y)
        b = slope(y + 0.005 * a)
        c = slope(y + 0.005 * b)
        d = slope(y + 0.01 * c)
        return y + 0.01 / 6 * (a + 2 * b + 2 * c + d), None

    return jax.lax.scan(step, z, length=10)[0]


WITHOUT = {
    "custom_vjp": (reverse_only, swing, 1e-12),
    "pure_callback": (on_the_host, swing, 1e-12),
    # The tolerance of odeint, 1.4e-8.
    "odeint": (solved, solved_by_series, 1e-6),
}
RULES = {"cubature": Cubature(), "unscented": Unscented(), "gauss_hermite": GaussHermite(3)}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", WITHOUT)
def test_no_forward_rule(name, rule):
    """Where P is regular the regression is the one that starts from the Jacobian."""
    function, twin, tolerance = WITHOUT[name]
    ours = jax.jit(partial(SigmaPoints(rule), function))(MEAN, COV)
    expected = jax.jit(partial(SigmaPoints(rule), twin))(MEAN, COV)
    for actual, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=tolerance)


def test_no_forward_rule_and_no_variance():
    """A direction that does not vary has slope zero; the moments of f(z) do not need one."""
    ours = jax.jit(partial(SigmaPoints(), reverse_only))(MEAN, SINGULAR)
    expected = jax.jit(partial(SigmaPoints(), swing))(MEAN, SINGULAR)
    np.testing.assert_array_equal(ours.weights[:, 0], 0.0)
    np.testing.assert_allclose(ours.weights[:, 1], expected.weights[:, 1], atol=1e-14)
    np.testing.assert_allclose(
        ours.weights @ MEAN + ours.offset, expected.weights @ MEAN + expected.offset, atol=1e-14
    )
    np.testing.assert_allclose(ours.cov, expected.cov, atol=1e-14)


@pytest.mark.parametrize("name", WITHOUT)
def test_taylor_says_what_needs_none(name):
    with pytest.raises(TypeError, match=r"forward derivative.*SigmaPoints\(\)"):
        jax.eval_shape(lambda z: Taylor()(WITHOUT[name][0], z, None), MEAN)


def test_errors_of_the_function_itself_stay():
    def wrong(z):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        SigmaPoints()(wrong, MEAN, COV)


def range_and_bearing(z):
    return jnp.stack([jnp.sqrt(z[0] ** 2 + z[1] ** 2), jnp.arctan2(z[1], z[0])])


ORIGIN = jnp.zeros(3)
COVS = {
    "regular": jnp.diag(jnp.array([1.0, 2.0, 0.5])),
    "velocity known": jnp.diag(jnp.array([1.0, 2.0, 0.0])),
    "one coordinate known": jnp.diag(jnp.array([0.0, 2.0, 0.5])),
}


@pytest.mark.parametrize("name", COVS)
def test_no_derivative_at_the_mean(name):
    """The moments of a range and a bearing at the sensor, against weighted sums over the points."""
    cov = COVS[name]
    out = jax.jit(partial(SigmaPoints(), range_and_bearing))(ORIGIN, cov)
    root = np.sqrt(np.asarray(cov))
    points = np.sqrt(3) * np.concatenate([root, -root]) + 0.0  # no -0, whose angle is -pi
    values = np.stack([np.hypot(*points[:, :2].T), np.arctan2(*points[:, 1::-1].T)], -1)
    mean, moment = values.mean(0), np.cov(values.T, bias=True)
    np.testing.assert_allclose(out.weights @ ORIGIN + out.offset, mean, atol=1e-14)
    np.testing.assert_allclose(out.weights @ cov @ out.weights.T + out.cov, moment, atol=1e-14)
    np.testing.assert_allclose(out.weights @ cov, (values - mean).T @ points / 6, atol=1e-14)


def test_value_at_the_mean_without_weight():
    """Cubature leaves out the centre: a value that is not finite there counts for nothing."""

    def both(z):
        return jnp.stack([jnp.log(jnp.abs(z[0])), 1 / z[0]])

    linearizer, mean, cov = SigmaPoints(), jnp.zeros(1), jnp.eye(1)
    out = jax.jit(partial(linearizer, both))(mean, cov)
    np.testing.assert_allclose(out.offset, [0.0, 0.0], atol=1e-15)
    np.testing.assert_allclose(out.weights, [[0.0], [1.0]], atol=1e-15)
    np.testing.assert_allclose(linearizer.expect(both, mean, cov), [0.0, 0.0], atol=1e-15)
    seen = SigmaPoints(Unscented())(both, mean, cov)
    assert not np.any(np.isfinite(seen.offset))


def test_gradient_where_there_is_no_derivative_at_the_mean():
    """Nothing depends on the Jacobian at the mean, so its own derivative does no harm either."""
    linearizer = SigmaPoints()

    def value(theta):
        mean, cov = theta * jnp.array([0.0, 0.0]), theta * jnp.diag(jnp.array([1.0, 2.0]))
        out = linearizer(lambda z: theta * range_and_bearing(z), mean, cov)
        average = linearizer.expect(lambda z: theta * range_and_bearing(z), mean, cov)
        return jnp.sum(out.offset) + jnp.sum(out.weights) + jnp.sum(out.cov) + jnp.sum(average)

    both = jax.jit(jax.vmap(value))(jnp.array([1.0 - 1e-6, 1.0 + 1e-6]))
    slope = jax.jit(jax.grad(value))(1.0)
    np.testing.assert_allclose(slope, (both[1] - both[0]) / 2e-6, rtol=1e-8)


def test_steps_that_the_type_cannot_carry():
    """A correction of the mean of 1e-4 keeps two digits in float32, and alpha = 1e-3 none of them.

    f = 100 + z + z^2 over N(0, 0.01): the average is 100.01, exactly for every rule.
    """

    def function(z):
        return 100 + z + z**2

    mean, cov = jnp.zeros(1, jnp.float32), jnp.full((1, 1), 0.01, jnp.float32)
    for alpha in (1e-4, 1e-3, 1e-2, 1.0):
        out = jax.jit(partial(SigmaPoints(Unscented(alpha, 2.0, 0.0)), function))(mean, cov)
        # A hundredth of a deviation, and the rounding of 100 itself.
        np.testing.assert_allclose(out.offset, 100.01, atol=1e-3 + 1e-5)
        np.testing.assert_allclose(out.cov, 2e-4, rtol=0.2)


@pytest.mark.parametrize("dim", [1, 5])
def test_step_in_use(dim):
    """In float64 the usual alpha is taken as it is; in float32 its points are moved out."""
    linearizer = SigmaPoints(Unscented(1e-3, 2.0, 0.0))
    given = Unscented(1e-3, 2.0, 0.0)(dim)
    used = linearizer.points(dim, jnp.float64)
    np.testing.assert_array_equal(used.points, given.points)
    moved = linearizer.points(dim, jnp.float32)
    # A second difference divides by the square of the step what rounding leaves.
    np.testing.assert_allclose(moved.weights.sum() * np.finfo(np.float32).eps, 1e-5, rtol=1e-6)
    np.testing.assert_allclose(
        (moved.weights[:, None] * moved.points).T @ moved.points, np.eye(dim), atol=1e-12
    )
    few = linearizer.points(dim, jnp.float16)
    np.testing.assert_allclose(few.points, Cubature()(dim).points)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearizer.check(dim, jnp.float64)
        SigmaPoints(Unscented(0.5, 2.0, 0.0)).check(dim, jnp.float32)
        SigmaPoints(GaussHermite(9)).check(1, jnp.float32)
        SigmaPoints().check(dim, jnp.float16)
    with pytest.warns(UserWarning, match=r"alpha=0.001.*float32.*0\.\d+ standard deviations"):
        linearizer.check(dim, jnp.float32)
